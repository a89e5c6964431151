"""Which documents are copies: one pass over their fingerprints, whatever their number of bytes.

*Exact*: equal text and pictures (BLAKE2b, 128 bits). *Near*: two texts that share a MinHash band and of whose 128
minima at least the share `near` is equal. Such pairs are edges of a graph; of each connected part the document that was
read first stays, so inputs named first are preferred, and the answer doesn't depend on workers. In a band's bucket
every document is compared with the first one alone: a bucket of a million copies costs a million comparisons, not half
a trillion. Texts with pictures are never near-duplicates: two pictures may well share a name.

A band is looked at at a time, so memory is about 60 bytes a document.
"""

from pathlib import Path

import numpy as np

from puna.data.corpora.grams import BANDS, PERMUTATIONS

CHUNK = 8192  # pairs compared at once
NAMES = ("hashes", "bands", "near")  # arrays of a unit: uint64 [D, 2], uint64 [BANDS, D], bool [D]


class Fingerprints:
    """The fingerprints of all units' documents, numbered through: `first[u]` is the number of unit u's first."""

    def __init__(self, units: list[Path]):
        self.units = units
        self.first = np.cumsum([0, *(len(np.load(f"{unit}.near.npy", mmap_mode="r")) for unit in units)])

    def all(self, name: str, at: object = slice(None)) -> np.ndarray:
        """One array over all documents; `at` picks of each unit's own."""
        parts = [np.load(f"{unit}.{name}.npy", mmap_mode="r")[at] for unit in self.units]
        return np.concatenate(parts) if parts else np.empty(0)

    def signatures(self, numbers: np.ndarray) -> np.ndarray:
        """uint32 [len(numbers), PERMUTATIONS]."""
        result = np.empty((len(numbers), PERMUTATIONS), dtype=np.uint32)
        owner = np.searchsorted(self.first, numbers, "right") - 1
        for unit in np.unique(owner):
            mine = owner == unit
            count = int(self.first[unit + 1] - self.first[unit])
            table = np.memmap(f"{self.units[unit]}.signatures", np.uint32, "r", shape=(count, PERMUTATIONS))
            result[mine] = table[numbers[mine] - self.first[unit]]
        return result


def runs(order: np.ndarray, fresh: np.ndarray) -> np.ndarray:
    """For each sorted place the document that begins its run; fresh: where a run begins, bool [len(order)]."""
    return order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]


def originals(prints: Fingerprints, near: float) -> tuple[np.ndarray, np.ndarray]:
    """(original int64 [N], exact bool [N]): the document each is a copy of, itself where it stays; whether the copy is
    exact. near: least share of equal minima, 0: exact copies alone."""
    total = int(prints.first[-1])
    original = np.arange(total)
    if not total:
        return original, np.zeros(0, dtype=bool)
    hashes = prints.all("hashes")
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: within a run the first read comes first
    fresh = np.append(True, (hashes[order[1:]] != hashes[order[:-1]]).any(1))
    original[order] = runs(order, fresh)
    exact = original != np.arange(total)
    if near:
        others, firsts = _candidates(prints, np.flatnonzero(prints.all("near") & ~exact))
        alike = np.zeros(len(others), dtype=bool)
        for at in range(0, len(others), CHUNK):
            pair = prints.signatures(others[at : at + CHUNK]), prints.signatures(firsts[at : at + CHUNK])
            alike[at : at + CHUNK] = (pair[0] == pair[1]).mean(1) >= near
        original = connected(total, others[alike], firsts[alike])[original]
    return original, exact


def _candidates(prints: Fingerprints, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (document, first document of a bucket it is in), each once."""
    found = np.empty(0, np.uint64)
    for band in range(BANDS):
        keys = prints.all("bands", band)[alive]
        order = np.argsort(keys, kind="stable")
        fresh = np.append(True, keys[order[1:]] != keys[order[:-1]])[: len(order)]
        firsts = runs(order, fresh)
        other = order != firsts
        pairs = alive[order[other]].astype(np.uint64) << np.uint64(32) | alive[firsts[other]].astype(np.uint64)
        found = np.union1d(found, pairs)
    return (found >> np.uint64(32)).astype(np.int64), (found & np.uint64(0xFFFFFFFF)).astype(np.int64)


def connected(total: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The least member of each one's connected part, int64 [total], by passing the least label along every edge."""
    label = np.arange(total)
    while True:
        least = np.minimum(label[a], label[b])
        new = label.copy()
        for end in (label[a], label[b], a, b):
            np.minimum.at(new, end, least)
        new = new[new]
        if (new == label).all():
            return label
        label = new
