"""Words and runs of words as numbers, a megabyte of documents at a time: for near-duplicates and held-out texts.

Two questions are asked of every document: is it nearly another one, and does it hold a piece of a test set? Both are
about n words in a row, and at 5 MB/s a core nothing may be done word by word in Python. So a batch of documents is one
array of code points c, and all of it is prefix sums modulo 2^64:

    P[i] = sum of mix(c[k]) B^k for k < i        word [s, e):    (P[e] - P[s]) B^-s
    Q[i] = sum of w[k] C^k      for k < i        n-gram [s, e):  (Q[e] - Q[s]) C^-s        w: mixed word hashes

What a word is, is decided in `puna.nursery.heldout`, the slow literal form that the tests compare with: runs of letters
after NFKC and case folding, markup left out; in scripts without spaces every letter, four of which count as a word.

**Near-duplicates**: the MinHash of a document's 5-grams (Broder 1997; library: rensa) are 128 minima of random
functions; the share of equal ones estimates the Jaccard index of two documents' sets. 16 *bands* of 8 minima are
hashed: documents of similarity s share a band with probability 1 - (1 - s^8)^16, 95 % at 0.8, 6 % at 0.5.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from puna.data.corpora.extra import need
from puna.nursery.heldout import LETTERS_PER_WORD, TAG, UNSPACED, N

SEPARATOR = "\n\0"  # between documents; clean.py leaves no \0 in a text, and no tag goes past a line's end
SHINGLE = 5  # words of a MinHash element
PERMUTATIONS, BANDS, SEED = 128, 16, 1
_B, _C = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # odd, so they have inverses


@lru_cache(maxsize=1)
def _classes() -> np.ndarray:
    """uint8 per code point: 0 no letter, 1 letter or mark, 2 one of a script without spaces."""
    table = np.array([unicodedata.category(chr(c))[0] in "LM" for c in range(0x110000)], dtype=np.uint8)
    for first, last in zip(UNSPACED[0::3], UNSPACED[2::3], strict=True):  # pairs joined by "-"
        table[ord(first) : ord(last) + 1] *= 2
    return table


@lru_cache(maxsize=1)
def _compatible() -> np.ndarray:
    """bool per code point: NFKC changes it by itself. NFC text without one is NFKC text."""
    return np.array([not unicodedata.is_normalized("NFKC", chr(c)) for c in range(0x110000)])


def _composed(text: str) -> str:
    """NFKC of a text without its markup. Normalising costs more than all the rest, so it is asked for first, and what
    ordinary text holds most (no-break space, ellipsis, Thai's sara am) is replaced by hand."""
    text = TAG.sub(" ", text)
    if text.isascii():
        return text
    text = text.replace("\u00a0", " ").replace("\u2026", "...").replace("\u0e33", "\u0e4d\u0e32")
    if unicodedata.is_normalized("NFC", text):
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        if not _compatible()[points].any():
            return text
    return unicodedata.normalize("NFKC", text)


@lru_cache(maxsize=1)
def _code_hashes() -> np.ndarray:
    """uint64 per code point."""
    return _mix(np.arange(1, 0x110001, dtype=np.uint64))


@lru_cache(maxsize=8)
def _powers(base: int, size: int) -> np.ndarray:
    """base^0 .. base^(size-1) modulo 2^64."""
    powers = np.full(size, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _sums(values: np.ndarray, base: int, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Polynomial hash of each values[start:stop], whatever stands before it."""
    size = 1 << max(int(len(values)).bit_length(), 16)
    prefix = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(base, size)[: len(values)], out=prefix[1:])
    return _mix((prefix[stops] - prefix[starts]) * _powers(pow(base, -1, 1 << 64), size)[starts])


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads every bit (splitmix64's last steps; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Words:
    """The words of D documents: hashes uint64 [W], weights uint8 [W] (in letters of an unspaced script), offsets int64
    [D+1]: document d has words offsets[d]:offsets[d+1]. letters, visible int64 [D]: characters that are letters, and
    that aren't white space."""

    hashes: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    letters: np.ndarray
    visible: np.ndarray


def words(texts: Sequence[str]) -> Words:
    """All words of `texts` (no "\\0" in them)."""
    plain = SEPARATOR.join(map(_composed, texts)).casefold()
    points = np.frombuffer(plain.encode("utf-32-le"), dtype=np.uint32)
    kind = _classes()[points]
    edge = np.zeros(len(points) + 2, dtype=np.uint8)
    edge[1:-1] = kind
    alone, run = kind == 2, kind == 1
    starts = np.flatnonzero(alone | (run & (edge[:-2] != 1)))
    stops = np.flatnonzero(alone | (run & (edge[2:] != 1))) + 1
    bounds = np.concatenate([[0], np.flatnonzero(points == 0), [len(points)]])
    per_document = []
    for mask in (kind > 0, points > 32):  # reduceat gives an empty slice the value at its place: put right by length
        sums = np.add.reduceat(np.append(mask, False), bounds[:-1], dtype=np.int64)
        per_document.append(np.where(np.diff(bounds) > 0, sums, 0))
    hashes = _sums(_code_hashes()[points], _B, starts, stops)
    weights = np.where(alone[starts], 1, LETTERS_PER_WORD).astype(np.uint8)
    return Words(hashes, weights, np.searchsorted(starts, bounds), *per_document)


def grams(found: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash of every n words in a row within a document, uint64 [G]; offsets int64 [D+1] of the documents' own)."""
    reach = np.concatenate([[0], np.cumsum(found.weights, dtype=np.int64)])
    count = len(found.hashes)
    stops = np.searchsorted(reach, reach[:count] + n * LETTERS_PER_WORD)
    last = np.repeat(found.offsets[1:], np.diff(found.offsets))  # where each word's document ends
    starts = np.flatnonzero(stops <= last)
    return _sums(found.hashes, _C, starts, stops[starts]), np.searchsorted(starts, found.offsets)


def signatures(found: Words) -> tuple[np.ndarray, np.ndarray]:
    """MinHash of each document, uint32 [D, PERMUTATIONS], and how many n-grams it was made from [D]; a document with
    none resembles nothing."""
    hashes, offsets = grams(found, SHINGLE)
    matrix = need("rensa").RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, offsets.astype(np.uint64), PERMUTATIONS, SEED
    )
    rows = np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(offsets) - 1, PERMUTATIONS)
    return rows, np.diff(offsets)


def bands(rows: np.ndarray) -> np.ndarray:
    """uint64 [D, BANDS]: equal where a band's minima are."""
    parts = rows.reshape(len(rows), BANDS, -1).astype(np.uint64)
    return _mix((_mix(parts) * _powers(_B, 1 << 16)[: parts.shape[2]]).sum(2, dtype=np.uint64))


class HeldOut:
    """An index of held-out documents' 13-grams: hashes uint64 [G], sorted; owners int64 [G], the first document of
    each."""

    def __init__(self, hashes: np.ndarray, owners: np.ndarray):
        self.hashes, self.owners = hashes, owners
        self._maybe = np.zeros(1 << 22, dtype=bool)  # nearly all are told apart by 22 bits, without a search
        self._maybe[hashes & np.uint64(len(self._maybe) - 1)] = True

    @classmethod
    def of(cls, texts: Iterable[str]) -> "HeldOut":
        """The index of `texts`, their owners counted from 0."""
        found, owners = [], []
        for owner, text in enumerate(texts):
            found.append(grams(words([text.replace("\0", " ")]), N)[0])
            owners.append(np.full(len(found[-1]), owner))
        hashes, first = np.unique(np.concatenate([np.empty(0, np.uint64), *found]), return_index=True)
        return cls(hashes, np.concatenate([np.empty(0, np.int64), *owners])[first])

    def check(self, found: Words) -> dict[int, tuple[int, int]]:
        """Of `found`'s documents those that share an n-gram with a held-out one: document -> (owner, how many)."""
        hashes, offsets = grams(found, N)
        some = np.flatnonzero(self._maybe[hashes & np.uint64(len(self._maybe) - 1)])
        if not len(self.hashes) or not len(some):
            return {}
        place = np.searchsorted(self.hashes, hashes[some]).clip(max=len(self.hashes) - 1)
        hit = self.hashes[place] == hashes[some]
        result: dict[int, tuple[int, int]] = {}
        for document, at in zip(np.searchsorted(offsets, some[hit], "right") - 1, place[hit], strict=True):
            owner, count = result.get(int(document), (int(self.owners[at]), 0))
            result[int(document)] = (owner, count + 1)
        return result
