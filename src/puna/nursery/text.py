"""Text and code: documents in 12 languages and Python, each source in its own folder beside its licence.

A document is a page, chapter or file, whole. Validation text is never trained on: the Universal Declaration of Human
Rights in each language, and one page in forty of every source, in all its languages,
chosen by a hash of its name.
"""

import json
import lzma
from functools import cache

from puna.errors import PunaError
from puna.nursery.files import LANGUAGES, manifest, read_bytes

SPLITS = ("train", "val")


@cache
def _documents(language: str, split: str) -> tuple[str, ...]:
    if split not in SPLITS:
        raise PunaError(f"unknown split {split!r}: use train or val")
    found = []
    for source in manifest()["sources"].values():
        name = source.get("texts", {}).get(language)
        if name:
            lines = lzma.decompress(read_bytes(name)).decode().splitlines()
            found += [row["text"] for row in map(json.loads, lines) if row["split"] == split]
    return tuple(found)


def texts(language: str, split: str = "train") -> list[str]:
    """Documents in a language (one of LANGUAGES); split "val" begins with the Universal Declaration of Human Rights."""
    if language not in LANGUAGES:
        raise PunaError(f"the nursery has no texts in {language!r}: use one of {', '.join(LANGUAGES)}")
    return list(_documents(language, split))


def code(split: str = "train") -> list[str]:
    """Python source files, whole."""
    return list(_documents("code", split))
