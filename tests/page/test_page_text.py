"""Rendered text: markdown as it grows, hostile answers, and what it costs."""

import hashlib
import random
import time
from pathlib import Path

from page_acts import Torrent, answer, ask, attach, done, wait
from server_fakes import FakeEngine, until

import puna.serve

PAGE = Path(puna.serve.__file__).parent / "page"

# Runs inside the page: a Flow fed `step` characters at a time, and what came out.
FLOW = """async ([texts, step]) => {
    const { Flow } = await import("/page/markdown.js");
    return texts.map((text) => {
        const root = document.createElement("div");
        const flow = new Flow(root);
        for (let end = step; end < text.length + step; end += step) flow.show(text.slice(0, end));
        root.normalize();
        return root.innerHTML;
    });
}"""


def rendered(page, *texts, step=10**9):
    return page.evaluate(FLOW, [list(texts), step])


# ------------------------------------------------------------------------------------------------ markdown

DOCUMENT = """# Title

Text with **bold**, *italic*, ~~gone~~, `code <b>`, [a link](https://example.org/a?b=1&c) and <https://example.org>.
A second line &amp; &lt;entities&gt; &#233;, 5 $ and 6 $, but $a_1 * b_2 * c$ and \\(x^2\\).

1. one

2. two
   - deep

- [ ] open
- [x] done

| a | b |
|:--|--:|
| 1 | **2** |

> quoted

```py title
if a < b:

    pass
```
***
![a picture](https://example.org/p.png)
"""


def test_markdown_becomes_the_right_elements(site):
    page = site()
    (html,) = rendered(page, DOCUMENT)
    for part in (
        "<h3>Title</h3>",
        "<strong>bold</strong>",
        "<em>italic</em>",
        "<del>gone</del>",
        "<code>code &lt;b&gt;</code>",
        'href="https://example.org/a?b=1&amp;c"',
        'rel="noopener noreferrer nofollow"',
        "<br>A second line &amp; &lt;entities&gt; é",
        "5 $ and 6 $",
        '<code class="math">$a_1 * b_2 * c$</code>',
        '<code class="math">\\(x^2\\)</code>',
        "<ol><li><p>one</p></li><li><p>two</p><ul><li>",
        '<li class="task"><input type="checkbox" disabled="" aria-label="to do">',
        '<th class="to-right" scope="col">b</th>',
        '<td class="to-right"><strong>2</strong></td>',
        "<blockquote><p>quoted</p></blockquote>",
        "if a &lt; b:\n\n    pass</code>",
        "<span>py</span>",
        "<hr>",
        '<a href="https://example.org/p.png"',
    ):
        assert part in html, (part, html)
    assert "<img" not in html, "a picture of a stranger's server would be fetched"


PARTS = [
    "word ",
    "two words ",
    "\n",
    "\n\n",
    "# h\n",
    "- a\n",
    "- b\n  - c\n",
    "1. x\n",
    "2. y\n\n",
    "> q\n",
    "```\n",
    "```js\n",
    "**b** ",
    "*i* ",
    "`c` ",
    "[l](http://a.b) ",
    "| a | b |\n|---|---|\n",
    "| 1 | 2 |\n",
    "~~d~~",
    "---\n",
    "    code\n",
    "&amp;",
    "<b>",
    "$x$ ",
    "http://x.yz/a_b ",
    '<box label="a">1,2,3,4</box>',
    "===\n",
    "\\*",
    "![p](http://a.b/c)",
]


def test_text_that_grows_ends_as_text_shown_at_once(site):
    """The literal reference of the growing reader is the reader itself, given the whole text."""
    rand = random.Random(1)
    texts = [DOCUMENT, *("".join(rand.choices(PARTS, k=rand.randint(2, 40))) for _ in range(300))]
    page = site()
    whole = rendered(page, *texts)
    for step in (1, 7):
        for text, one, grown in zip(texts, whole, rendered(page, *texts, step=step), strict=True):
            assert grown == one, text


def test_long_blocks_are_whole(site):
    """Lists, tables, code, paragraphs beyond what a step reads again: every item, row, line and word is there."""
    texts = {
        "li": "".join(f"{i}. item **{i}**\n" for i in range(1, 501)),
        "tr": "| a | b |\n|---|---|\n" + "".join(f"| {i} | x{i} |\n" for i in range(1, 500)),
        "pre": "```\n" + "".join(f"line {i}\n" for i in range(1, 501)) + "```\n",
        "p": " ".join(f"word{i}" for i in range(1, 2001)),
    }
    page = site()
    for name, text in texts.items():
        for html in rendered(page, text + "\n\nafter", step=50):
            assert html.endswith("<p>after</p>"), name
            if name in ("li", "tr"):
                assert html.count(f"<{name}>") == 500 and html.count(f"<{name}>") == html.count(f"</{name}>")
                assert html.count("<table>") == (name == "tr") and html.count("<ol") == (name == "li")
            elif name == "pre":
                assert html.count("<pre") == 1 and all(f"line {i}\n" in html for i in range(1, 500))
            else:
                assert all(f"word{i}" in html for i in range(1, 2001))


def test_long_blocks_of_equal_parts_are_whole(site):
    """Rows, items and lines that repeat, fed so that what is read next looks like what was read before."""
    row = "|" + "cell|" * 40 + "\n"
    texts = {"tr": "|" + "h|" * 40 + "\n|" + "-|" * 40 + "\n" + row * 300, "li": "- the same item\n" * 2000,
             "x": "```\n" + "x x x x x x x x\n" * 3000}  # fmt: skip
    page = site()
    for name, text in texts.items():
        for step in (len(row), 10 * len(row), len(text) // 8, 4000):
            [html] = rendered(page, text, step=step)
            counted = html.count("x x x x x x x x") if name == "x" else html.count(f"<{name}>")
            assert counted == {"tr": 301, "li": 2000, "x": 3000}[name], (name, step)


def test_code_is_copied_as_it_was_written(site):
    page = site(FakeEngine(lambda m: "```py\nx = '<b>'\n\n  y\n```"), permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Code")
    done(page)
    page.click(".code .copy")
    wait(page, "document.querySelector('#announcer').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "x = '<b>'\n\n  y"


def test_nodes_survive_while_the_text_grows(site):
    """What the user holds (a selection, the focus) is not torn away by the next token."""
    page = site(FakeEngine(lambda m: "First **bold** words. " + "and more " * 60, pause=0.02))
    ask(page, "Talk")
    wait(page, "document.querySelector('.assistant strong') !== null")
    page.evaluate("window.held = document.querySelector('.assistant strong')")
    before = len(answer(page))
    until(lambda: len(answer(page)) > before + 60)
    assert page.evaluate("window.held.isConnected")
    page.click("#stop")
    done(page)


# ------------------------------------------------------------------------------------------------ hostile answers

EVIL = "window.hacked=1"
HOSTILES = {
    "html": f"<img src=x onerror={EVIL}> <script>{EVIL}</script> <svg onload={EVIL}> "
    f"<iframe srcdoc='<script>{EVIL}</script>'></iframe>",
    "closing": "</script></div></article></main></body><style>*{display:none}</style><base href=//evil>"
    "<form action=//evil>",
    "links": "[a](javascript:window.hacked=1) [b](JaVaScRiPt&colon;window.hacked=1) "
    "[c](data:text/html,<script>1</script>) "
    "[d](vbscript:x) <javascript:window.hacked=1> [e]( javascript:x) [f](\x01javascript:x) "
    "[g](file:///etc/passwd) "
    "[r] ![i](javascript:window.hacked=1)\n\n[r]: javascript:window.hacked=1",
    "html block": f"<div onclick={EVIL}>\n<details open ontoggle={EVIL}>\n</details>\n</div>\n\n"
    f"<!-- <img onerror={EVIL}> -->",
    "titles": f'[x](https://a.b "\\" onmouseover={EVIL} x=\\"") `<img onerror={EVIL}>` '
    f'```<b>``` <https://a.b/"onclick={EVIL}>',
    "lang": f'```<img/onerror={EVIL}>"><script>\n</code></pre><script>{EVIL}</script>\n```',
    "huge table": "|" + "a|" * 200 + "\n|" + "-|" * 200 + "\n" + ("|" + f"<b onclick={EVIL}>|" * 200 + "\n") * 100,
    "unclosed fence": "text\n```html\n<script>" + "x\n" * 5000,
    "unclosed everything": "**bold *it ~~del `code [link](http://a " * 300,
    "maths": "$\\def\\a{\\a\\a}\\a$ $$"
    + "\\frac{" * 3000
    + "1"
    + "}" * 3000
    + "$$ \\("
    + "x^{" * 3000
    + "\\) $"
    + "\\sqrt" * 9000,
    "quotes": ">" * 10_000,
    "nested list": "\n".join("  " * i + "- a" for i in range(150)),
    "brackets": "[" * 20_000,
    "stars": "**a" * 5000,
    "ticks": "x".join("`" * i for i in range(150)),
    "entities": "&#0;&#xD800;&#x110000;&#99999999;&bogus;&lt;script&gt;",
    "controls": "\x00\x01\u202e\u2066 x \ufeff\u200b" + "e\u0301" * 50 + "Z" + "\u0301" * 5000,
}
ALLOWED = [
    "a",
    "blockquote",
    "br",
    "button",
    "code",
    "del",
    "div",
    "em",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "input",
    "li",
    "ol",
    "p",
    "path",
    "pre",
    "span",
    "strong",
    "svg",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
]


def test_hostile_answers_stay_text(site):
    """F.4, case 82. After each: no element, no attribute but ours, no address but http(s) and mailto, nothing ran."""
    page = site()
    for name, text in HOSTILES.items():
        begun = time.monotonic()
        wrong = page.evaluate(
            """async ([text, allowed]) => {
            const { Flow } = await import("/page/markdown.js");
            const root = document.querySelector("#log").appendChild(document.createElement("div"));
            const flow = new Flow(root), step = Math.max(64, text.length / 8);
            for (let end = step; end < text.length + step; end += step) flow.show(text.slice(0, end));
            const wrong = [];
            for (const e of root.querySelectorAll("*")) {
                if (!allowed.includes(e.localName)) wrong.push(e.localName);
                for (const { name } of e.attributes) if (/^on|^style$|^srcdoc$/.test(name)) wrong.push(name);
                if (e.href && !/^(https?|mailto):$/.test(e.protocol)) wrong.push(e.href);
            }
            if (!root.textContent.trim()) wrong.push("nothing is shown");
            root.remove();
            return wrong;
        }""",
            [text, ALLOWED],
        )
        assert wrong == [], (name, wrong[:5])
        assert page.evaluate("window.hacked") is None, name
        print(f"{name}: {len(text)} characters, {time.monotonic() - begun:.2f} s")
    assert page.is_visible("#prompt")


def test_hostile_words_of_both_sides_in_the_page(site):
    text = HOSTILES["html"] + HOSTILES["closing"] + ' <box label="<b onclick=hacked()>">1,2,3,4</box> **<i>bold</i>**'
    page = site(FakeEngine(lambda m: text))
    ask(page, text)
    done(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".turn :is(script, iframe, style, form, base, i, b, u, img:not(.face))").count() == 0
    assert f"<img src=x onerror={EVIL}>" in answer(page) and "<i>bold</i>" in answer(page)
    assert page.inner_text(".user .text") == text


def test_hostile_label_stays_text(site):
    label = "&lt;img src=x onerror=window.hacked=1&gt;"
    page = site(FakeEngine(lambda m: f'<box label="{label}">100,100,300,300</box>'))
    attach(page)
    ask(page, "Where?")
    done(page)
    assert page.inner_text(".chip") == page.inner_text(".tag") == "<img src=x onerror=window.hacked=1>"
    assert page.evaluate("window.hacked") is None


def test_policy_blocks_markup_scripts_and_styles(site):
    page = site()
    assert page.complaints == []
    tried = """(make) => { try { make(); return "done" } catch (error) { return error.name } }"""
    for attempt in (
        "() => { document.querySelector('#log').innerHTML = '<b>x</b>' }",
        "() => { document.createElement('script').textContent = 'window.hacked = 1' }",
        "() => { document.write('<b>x</b>') }",
        "() => { document.createElement('iframe').srcdoc = '<b>x</b>' }",
    ):
        assert page.evaluate(f"({tried})({attempt})") == "TypeError", attempt
    page.evaluate("""() => {
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.body.append(style);
    }""")
    assert page.evaluate("window.hacked") is None and page.is_visible("#prompt") and page.locator("#log b").count() == 0
    assert len(page.complaints) == 5 and all(
        "Content Security Policy" in text or "Trusted" in text for text in page.complaints
    )
    page.complaints.clear()


def test_scripts_of_others_are_as_they_were_published():
    sums = dict(reversed(line.split()) for line in (PAGE / "vendor/SHA256SUMS").read_text().splitlines())
    files = {path.name for path in (PAGE / "vendor").iterdir()} - {"SHA256SUMS"}
    assert files == set(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest, name


# ------------------------------------------------------------------------------------------------ what it costs

SHAPES = {
    "prose": lambda i: f"Sentence {i} has **some** words in `it`. " + ("\n\n" if i % 6 == 5 else ""),
    "list": lambda i: f"{i + 1}. item {i} with a few words\n",
    "table": lambda i: ("| a | b |\n|---|---|\n" if i == 0 else "") + f"| {i} | some words {i} |\n",
    "code": lambda i: ("```py\n" if i == 0 else "") + f"value_{i} = {i} + {i}\n",
    "one paragraph": lambda i: f"words without an end {i} ",
    "boxes": lambda i: f'<box label="b{i % 9}">{i % 900},1,{i % 900 + 9},99</box> and\n' + "\n" * (i % 5 == 4),
}


def test_cost_of_an_answer_grows_with_its_length_not_its_square(site):
    """20,000 tokens of five characters, ten a step: what is read and what is changed, counted, since clocks are noisy.
    Twice the length may cost twice as much."""
    page = site()
    for name, part in SHAPES.items():
        pieces, length, i = [], 0, 0
        while length < 100_000:
            pieces.append(part(i))
            length, i = length + len(pieces[-1]), i + 1
        halves = page.evaluate(
            """async (text) => {
            const { Flow } = await import("/page/markdown.js");
            const flow = new Flow(document.createElement("div")), halves = [];
            let read = 0, changed = 0, begun = performance.now();
            const step = flow.step;
            flow.step = (tail) => ((read += tail.length), step.call(flow, tail));
            const watch = new MutationObserver(() => {});
            watch.observe(flow.root, { childList: true, characterData: true, subtree: true });
            for (let i = 1; i <= 2000; i++) {
                flow.show(text.slice(0, 50 * i));
                for (const { addedNodes } of watch.takeRecords()) changed += 1 + addedNodes.length;
                if (i % 1000) continue;
                halves.push([read, changed, Math.round(performance.now() - begun)]);
                [read, changed, begun] = [0, 0, performance.now()];
            }
            return halves;
        }""",
            "".join(pieces)[:100_000],
        )
        (read, changed, first), (read2, changed2, second) = halves
        print(f"{name}: {read} + {read2} characters read, {changed} + {changed2} changes, {first} + {second} ms")
        assert read2 < 1.25 * read + 20_000 and changed2 < 1.25 * changed + 100, name
        assert read + read2 < 2000 * 6000, "a step reads more than the open end"


def test_twenty_thousand_tokens_through_the_server(site):
    """As fast as the server sends them: all shown, and the page answers the keyboard meanwhile."""
    text = "".join(SHAPES["prose"](i) for i in range(2600))[:100_000]
    page = site(Torrent(lambda m: text))
    page.evaluate("""() => {
        window.slowest = 0;
        let before = performance.now();
        const beat = () => {
            const now = performance.now();
            window.slowest = Math.max(window.slowest, now - before);
            before = now;
            setTimeout(beat, 0);
        };
        beat();
    }""")
    begun = time.monotonic()
    ask(page, "Talk")
    until(lambda: page.query_selector(".assistant") and not page.query_selector(".streaming"), 180)
    spent, slowest = time.monotonic() - begun, page.evaluate("window.slowest")
    print(f"20,000 tokens in {spent:.1f} s ({page.inner_text('.speed')}), the longest pause {slowest:.0f} ms")
    shown = page.evaluate("document.querySelector('.assistant .text').textContent")
    assert "Sentence 2000 has some words in it." in shown and len(shown) > 80_000
