"""Keeping what a model is tested on out of what it is trained on.

Two texts *collide* if they share 13 consecutive words (the n-gram size GPT-3, Brown et al. 2020, App. C, used). Words
are runs of letters, case-folded; digits, punctuation and markup don't count, so a renumbered or re-tagged copy is still
found. Scripts written without spaces (Thai, Lao, Khmer, Burmese, Han, kana) count four letters as a word.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

N = 13  # words
LETTERS_PER_WORD = 4  # in scripts without spaces
TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>")
# Thai to Lao, Burmese, Khmer, kana, Han
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
PIECE = re.compile(f"[{UNSPACED}]|[^{UNSPACED} ]+")
ALONE = re.compile(f"[{UNSPACED}]")


class _LettersOnly(dict):
    """A str.translate table that keeps letters and combining marks and blanks the rest, filled as met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = character if unicodedata.category(character)[0] in "LM" else " "
        self[code] = kept
        return kept


_LETTERS = _LettersOnly()


def words(text: str) -> list[str]:
    """The text's words, case-folded, without digits, punctuation and markup; single letters in unspaced scripts."""
    plain = unicodedata.normalize("NFKC", TAG.sub(" ", text)).casefold()
    return PIECE.findall(plain.translate(_LETTERS))


def grams(text: str, n: int = N) -> Iterator[bytes]:
    """An 8-byte hash of each n words in a row; none if the text is shorter."""
    pieces = words(text)
    weights = [1 if ALONE.match(piece) else LETTERS_PER_WORD for piece in pieces]
    goal, end, weight = n * LETTERS_PER_WORD, 0, 0
    for start, own in enumerate(weights):
        while end < len(pieces) and weight < goal:
            weight += weights[end]
            end += 1
        if weight < goal:
            return
        yield hashlib.blake2b(" ".join(pieces[start:end]).encode(), digest_size=8).digest()
        weight -= own


@dataclass(frozen=True)
class Collision:
    """A training document that shares ``count`` n-grams with a held-out one (the first it met)."""

    train: str
    held_out: str
    count: int


class HeldOut:
    """An index of held-out documents; documents: (id, text) pairs."""

    def __init__(self, documents: Iterable[tuple[str, str]], n: int = N):
        self.n = n
        self._owner: dict[bytes, str] = {}
        for name, text in documents:
            for gram in grams(text, n):
                self._owner.setdefault(gram, name)

    def __len__(self) -> int:
        return len(self._owner)

    def collision(self, name: str, text: str) -> Collision | None:
        """How the text overlaps the held-out documents, or None if it doesn't."""
        hits = [self._owner[gram] for gram in grams(text, self.n) if gram in self._owner]
        return Collision(name, hits[0], len(hits)) if hits else None


def exclude(
    train: Iterable[tuple[str, str]], held_out: Iterable[tuple[str, str]], n: int = N
) -> tuple[list[str], list[Collision]]:
    """Which training documents may stay: (ids kept, collisions of those dropped). Both inputs are (id, text) pairs."""
    index, kept, collisions = HeldOut(held_out, n), [], []
    for name, text in train:
        if (found := index.collision(name, text)) is None:
            kept.append(name)
        else:
            collisions.append(found)
    return kept, collisions
