"""Two-digit addition with the work shown, digit by digit.

A small model adds well when each step is a look-up: the ones column, then the tens column with the carry, then the
sum read off the two results. The answer is therefore `7+8=15, 3+4+1=8: 85` for 37 + 48: always both columns, always
the carry (also a 0), the sum last, so that every digit is one single-digit addition or a copy (a scratchpad: Nye et
al. 2021, arXiv 2112.00114).

Held out are 10 % of the 8,100 ordered pairs of two-digit numbers, a pair always together with its swap, chosen by
hash whatever the seed. Level 0 also trains on one-digit numbers; level 1 is two digits only. The test is the held-out
pairs at both levels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256

from puna.errors import PunaError
from puna.tasks.base import Item, Task, assistant, check, user
from puna.tasks.seeding import rng, shuffle_order

QUESTIONS = (
    "{a} + {b} = ?",
    "{a}+{b}",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
)
HELD_OUT_SHARE = 0.1
ONE_DIGIT_SHARE = 0.2


@lru_cache(maxsize=1)
def held_out() -> frozenset[tuple[int, int]]:
    """The held-out ordered pairs: with (a, b) always (b, a); 10 % of all ordered pairs, first by hash."""
    wanted = round(90 * 90 * HELD_OUT_SHARE)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    pairs.sort(key=lambda pair: sha256(f"puna addition {pair[0]} {pair[1]}".encode()).digest())
    chosen: set[tuple[int, int]] = set()
    for a, b in pairs:
        both = {(a, b), (b, a)}
        if len(chosen) + len(both) <= wanted:
            chosen |= both
    return frozenset(chosen)


def worked(a: int, b: int) -> str:
    """The answer with its work: `7+8=15, 3+4+1=8: 85` for 37 and 48. a, b: 0 to 99."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={tens}: {a + b}"


class Addition(Task):
    """Sums of two numbers up to 99; the test asks the held-out pairs."""

    name = "addition"

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return len(held_out()) if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 2, self.size(split))
        rand = rng(self.name, split, seed, index, level)
        if split == "test":
            a, b = _test_pairs(seed)[index]
        else:
            while True:
                a, b = (
                    rand.randint(0, 9) if level == 0 and rand.random() < ONE_DIGIT_SHARE else rand.randint(10, 99)
                    for _ in range(2)
                )
                if (a, b) not in held_out():
                    break
        question = rand.choice(QUESTIONS).format(a=a, b=b)
        meta = {"task": self.name, "lang": "en", "a": a, "b": b}
        return Item([user(question), assistant(worked(a, b))], str(a + b), meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the last integer in `text` is the sum; else 0."""
        numbers = re.findall(r"\d+", text, re.ASCII)
        return float(bool(numbers) and numbers[-1].lstrip("0") == item.answer.lstrip("0"))

    def chance(self, items: Iterable[Item]) -> float:
        """Share of the most frequent sum."""
        counts = Counter(item.answer for item in items)
        if not counts:
            raise PunaError("a chance level needs at least one item")
        return max(counts.values()) / counts.total()


@lru_cache(maxsize=8)
def _test_pairs(seed: int) -> list[tuple[int, int]]:
    pairs = sorted(held_out())
    return [pairs[k] for k in shuffle_order(("addition test", seed), len(pairs))]
