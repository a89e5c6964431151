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
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np

from puna.data.corpora.extra import need
from puna.nursery.heldout import ALONE, LETTERS_PER_WORD, TAG, N

GAP = "\n\0"  # after each text; clean.py leaves no \0 in one, and no tag goes past a line's end
SHINGLE = 5  # words of a MinHash element
PERMUTATIONS, BANDS, SEED = 128, 16, 1
_B, _C = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95  # odd, so they have inverses

OTHER, LETTER, ALONE_, SPECIAL, UNMET = range(5)  # kinds of code points; alone: of a script without spaces


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits that spreads every bit (splitmix64's last steps; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# By code point, after case folding, filled as texts are met: a text holds some hundreds, all take half a second.
_kinds = np.full(0x110000, UNMET, dtype=np.uint8)
_hashes = _mix(np.arange(1, 0x110001, dtype=np.uint64))


def _look_up(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(code points uint32, kinds uint8) of a text."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    kinds = _kinds.take(points)
    if kinds.max(initial=OTHER) < UNMET:
        return points, kinds
    for letter in map(chr, np.unique(points[kinds == UNMET]).tolist()):
        folded = letter.casefold()
        if len(folded) > 1 or not unicodedata.is_normalized("NFKC", letter):
            kind = SPECIAL  # what comes out of NFKC and folding holds none
        elif unicodedata.category(folded)[0] not in "LM":
            kind = OTHER
        else:
            kind = ALONE_ if ALONE.match(folded) else LETTER
            _hashes[ord(letter)] = _hashes[ord(folded)]
        _kinds[ord(letter)] = kind
    return points, _kinds.take(points)


def _letters(texts: Sequence[str], composed: bool) -> tuple[np.ndarray, np.ndarray]:
    """`_look_up` of all texts, GAP after each, without markup and after NFKC. Folding is the tables' business, and so
    is NFKC of an NFC text, unless one of its code points becomes several. Normalising costs more than all the rest, so
    what ordinary text holds most of those (no-break space, ellipsis, sara am, sharp s) is replaced by hand."""
    plain = TAG.sub(" ", GAP.join([*texts, ""]))
    for common, instead in ("\u00a0", " "), ("\u2026", "..."), ("\u0e33", "\u0e4d\u0e32"), ("ß", "ss"):
        plain = plain.replace(common, instead)
    points, kinds = _look_up(plain)
    others = np.searchsorted(np.flatnonzero(points == 0), np.flatnonzero(kinds == SPECIAL)).tolist()
    others += [] if composed else [i for i, text in enumerate(texts) if not unicodedata.is_normalized("NFC", text)]
    if others:
        plains = plain.split(GAP)
        for i in set(others):
            plains[i] = unicodedata.normalize("NFKC", TAG.sub(" ", texts[i])).casefold()
        points, kinds = _look_up(GAP.join(plains))
    return points, kinds


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


@dataclass(frozen=True)
class Words:
    """The words of D documents: hashes uint64 [W]; offsets int64 [D+1]: document d has words offsets[d]:offsets[d+1].
    A word is LETTERS_PER_WORD units long, a letter of an unspaced script one: begins int64 [W], units before a word;
    at int64 [units+1], the number of words that the first 1, 2, ... units need, W+1 where there are too few. letters,
    visible int64 [D]: characters that are letters, and that aren't white space."""

    hashes: np.ndarray
    offsets: np.ndarray
    begins: np.ndarray
    at: np.ndarray
    letters: np.ndarray
    visible: np.ndarray


def words(texts: Sequence[str], composed: bool = False) -> Words:
    """All words of `texts` (no "\0" in them); composed: they are NFC, and needn't be looked at for that."""
    points, kinds = _letters(texts, composed)
    alone, run = np.zeros((2, len(kinds) + 2), dtype=bool)  # with an edge on both sides
    np.equal(kinds, ALONE_, out=alone[1:-1])
    np.equal(kinds, LETTER, out=run[1:-1])
    starts = np.flatnonzero(alone[1:-1] | (run[1:-1] & ~run[:-2]))
    stops = np.flatnonzero(alone[1:-1] | (run[1:-1] & ~run[2:])) + 1
    bounds = np.append(0, np.flatnonzero(points == 0) + 1)
    offsets = np.searchsorted(starts, bounds)
    units = np.where(alone[1:-1].take(starts), 1, LETTERS_PER_WORD)
    at = np.append(np.repeat(np.arange(1, len(units) + 1), units), len(units) + 1)
    letters = np.append(0, np.cumsum(stops - starts)).take(offsets)
    blanks = np.searchsorted(np.flatnonzero(points <= 32), bounds)
    return Words(_sums(_hashes.take(points), _B, starts, stops), offsets, np.cumsum(units) - units, at,
                 np.diff(letters), np.diff(bounds - blanks))  # fmt: skip


def grams(found: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash of every n words in a row within a document, uint64 [G]; offsets int64 [D+1] of the documents' own)."""
    stops = found.at.take(found.begins + (n * LETTERS_PER_WORD - 1), mode="clip")
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
    rows = np.array(array("I", chain.from_iterable(matrix.to_rows())), dtype=np.uint32)
    return rows.reshape(len(offsets) - 1, PERMUTATIONS), np.diff(offsets)


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
