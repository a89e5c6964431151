"""Random numbers as a function of a key, not of what was drawn before.

`random.Random(text)` seeds its Mersenne Twister with the SHA-512 of the text: the same on every platform and Python
version, so item number i of a task can be made alone, without making the i before it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def rng(*key) -> random.Random:
    """A generator that depends on `key` alone (text and numbers), equal on every platform."""
    return random.Random("\x1f".join(map(str, key)))


def log_even(rand: random.Random, least: int, most: int) -> int:
    """A whole number from `least` (at least 1) to `most`, evenly on a log scale: small ones more often than large."""
    low, high = least - 0.5, most + 0.5
    return min(most, max(least, round(low * (high / low) ** rand.random())))


def shuffle_order(key: Sequence, n: int) -> list[int]:
    """A permutation of range(n) that depends on `key` alone."""
    order = list(range(n))
    rng(*key).shuffle(order)
    return order
