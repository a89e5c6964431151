"""HTML and help-page markup to paragraphs of plain text."""

import re
from collections.abc import Iterator

from puna.nursery.building.fetch import tool

BLOCKS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "pre", "blockquote", "td", "th", "caption"),
    *("figcaption", "div", "section", "article", "title", "desc", "item", "screen", "code", "example", "note"),
    *("list", "steps", "table", "tr"),
}
SKIPPED = {"script", "style", "nav", "noscript", "footer", "aside", "button", "info", "img", "svg", "table"}
SPACE = re.compile(r"[ \t\r\n\u00a0]+")
INLINE = re.compile(r"(?s)<br\s*/?>|</?(?:p|li|ul|ol|div)\b[^>]*>")


def tag(node) -> str:
    return node.tag.rsplit("}", 1)[-1] if isinstance(node.tag, str) else ""


def paragraphs(node, verbatim: tuple[str, ...] = ("pre", "screen")) -> Iterator[str]:
    """The text under a node, a paragraph per block element, in reading order; verbatim elements keep their lines."""
    pending: list[str] = []

    def flush() -> Iterator[str]:
        text = SPACE.sub(" ", "".join(pending)).strip()
        pending.clear()
        if text:
            yield text

    def walk(node) -> Iterator[str]:
        name = tag(node)
        if not name or name in SKIPPED or "headerlink" in node.get("class", ""):
            pass
        elif name in verbatim:
            yield from flush()
            text = "".join(node.itertext()).strip("\n").rstrip()
            if text:
                yield text
        else:
            block = name in BLOCKS and not (name == "code" and node.getparent() is not None)
            if block:
                yield from flush()
            pending.append(node.text or "")
            for child in node:
                yield from walk(child)
                pending.append(child.tail or "")
            if block:
                yield from flush()

    yield from walk(node)
    yield from flush()


def page(content: bytes, xpath: str) -> list[str]:
    """Paragraphs of the first element of an HTML page that the XPath finds; none if it finds nothing."""
    html = tool("lxml.html")
    found = html.document_fromstring(content, parser=html.HTMLParser(encoding="utf-8")).xpath(xpath)
    return list(paragraphs(found[0])) if found else []


def fragment(text: str) -> str:
    """Plain text of a short HTML fragment; block tags become spaces, entities characters."""
    plain = tool("lxml.html").fromstring(f"<div>{INLINE.sub(' ', text)}</div>").text_content()
    return SPACE.sub(" ", plain).strip()
