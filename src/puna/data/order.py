"""Stateless order: which row is read at index i is a function of (seed, n, epoch, i) and of nothing else.

A data loader that carries a shuffled list has state, and state has to be saved, restored and split over ranks. A
*permutation you can evaluate at one point* has none: resuming a run is one integer. A Feistel network is such a
permutation (the same construction that makes block ciphers invertible). For n rows take the smallest even number of
bits 2h with 2^(2h) >= n, and split the index x in two halves of h bits, x = (l, r). One round is

    (l, r)  ->  (r, l XOR (f(r, key_k) mod 2^h)),       k = 1..8,  key_k = mix(seed, n, epoch, k),  f = splitmix64

Each round can be undone whatever f is, so eight of them permute 0 .. 2^(2h) - 1. Results beyond n are handled by
*cycle walking*: apply the network again until the result is < n (fewer than 4 times on average, since 2^(2h) < 4n),
which keeps it a permutation of 0 .. n-1. The arithmetic is written out here in 64-bit integers, so that the order
doesn't change with a library's version.

Sources: Luby and Rackoff 1988 (Feistel networks as permutations); Black and Rogaway 2002 (cycle walking); levanter's
block-deterministic mixture uses the same idea (training.md §B7).
"""

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 8
_64 = np.uint64


def derive(*parts: object) -> int:
    """A 63-bit seed from any printable parts: the one way this package makes independent random streams."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): uint64 in, well-mixed uint64 out, overflow intended."""
    with np.errstate(over="ignore"):
        x = x + _64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> _64(30))) * _64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _64(27))) * _64(0x94D049BB133111EB)
        return x ^ (x >> _64(31))


def shuffled(index: np.ndarray | int, n: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Rows read at `index` (int64, any shape, each in 0 .. n-1) in pass `epoch` over n rows. ValueError outside that
    range."""
    index_N = np.atleast_1d(np.asarray(index, dtype=np.int64)).ravel()
    if n < 1:
        raise ValueError(f"a permutation needs at least one row, not {n}")
    if index_N.size and (index_N.min() < 0 or index_N.max() >= n):
        raise ValueError(f"index outside 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = _64((1 << half) - 1), _64(half)
    keys = [_64(derive("feistel", seed, n, epoch, k)) for k in range(ROUNDS)]
    x_N = index_N.astype(np.uint64)
    todo = np.arange(x_N.size)  # positions still outside 0..n-1
    while todo.size:
        left, right = x_N[todo] >> shift, x_N[todo] & mask
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        x_N[todo] = (left << shift) | right
        todo = todo[x_N[todo] >= n]
    return x_N.astype(np.int64).reshape(np.shape(index))


@lru_cache(maxsize=128)
def permutation(seed: int, n: int, epoch: int = 0) -> np.ndarray:
    """The whole pass as one array: int64 [n], read-only, `permutation(s, n, e)[i] == shuffled(i, n, s, e)`. Cached."""
    order_n = shuffled(np.arange(n), n, seed, epoch)
    order_n.setflags(write=False)
    return order_n
