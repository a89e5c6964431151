"""A built corpus as a source of training data: `corpus:PATH`, or one of its languages or sources, `corpus:PATH/NAME`.

Documents stream from the corpus to the packer; pictures stay where they are until a batch needs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from puna.data.corpora.clean import PLACE
from puna.data.corpora.store import Corpus
from puna.data.order import derive, permutation
from puna.errors import PunaError
from puna.processor import open_picture
from puna.tasks.pictures import PictureRef


@dataclass(frozen=True)
class StoredPicture(PictureRef):
    """A picture's file inside a corpus: `length` bytes from `offset` on in `path`; `width` x `height` pixels
    upright."""

    kind: ClassVar[str] = "stored"
    path: str
    offset: int
    length: int
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def open(self) -> Image.Image:
        """The upright RGB picture. PunaError: the corpus is gone or damaged."""
        try:
            data = os.pread(_opened(self.path), self.length, self.offset)  # no position: threads share the file
        except OSError as error:
            raise PunaError(f"can't read {self.path}: {error.strerror}; is the corpus still there?") from None
        return open_picture(data)


@cache
def _opened(path: str) -> int:
    """A file's descriptor, kept open: a batch reads dozens of pictures."""
    return os.open(path, os.O_RDONLY)


def documents(name: str, options: Mapping[str, Any], seed: int) -> tuple[Iterator[str | list], int]:
    """(texts, and segments of texts and pictures, in order; their number) of PATH or PATH/NAME.

    options: `max_chars`, no more than so many characters, whole documents chosen by the seed.
    """
    corpus, only = Corpus.find(name)
    chosen, count = None, 0
    limit = options.get("max_chars")
    if limit is None:
        count = sum(v[0] for key, v in corpus.about["groups"].items() if not only or only in key.split("|")[:2])
    else:
        chosen = choose(corpus.sizes(only), limit, derive("choose", seed, name))
        count = int(chosen.sum())

    def read() -> Iterator[str | list]:
        for i, row in enumerate(corpus.rows(only)):
            if chosen is None or chosen[i]:
                yield segments(corpus, row) if row["pictures"] else row["text"]

    return read(), count


def choose(sizes: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """bool [documents]: those taken in a seeded order until they hold `limit` characters; one that is too long for what
    is left is passed over, unless it would be the first."""
    chosen, total = np.zeros(len(sizes), dtype=bool), 0
    for i in permutation(seed, len(sizes)).tolist() if len(sizes) else ():
        if total and total + sizes[i] > limit:
            continue
        chosen[i] = True
        total += int(sizes[i])
        if total >= limit:
            break
    return chosen


def segments(corpus: Corpus, row: dict) -> list[str | StoredPicture]:
    """A document's texts and pictures, in order."""
    path = str(corpus.parts[row["part"]].with_suffix(".pictures").resolve())
    pictures = iter([StoredPicture(path, *(p[k] for k in ("offset", "length", "width", "height")))
                     for p in row["pictures"]])  # fmt: skip
    first, *others = row["text"].split(PLACE)
    found: list[str | StoredPicture] = [first]
    for text in others:
        found += [next(pictures), text]
    return [each for each in found if each != ""]
