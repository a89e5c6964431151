"""One result: a row with all that is needed to doubt it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvalConfig:
    """How much is measured, and what it should reach.

    goals: row name -> goal; for bpb rows the goal is a fraction below chance (0.2: at most 80 % of it). Rows without
    an entry are reported without a goal.
    """

    naming: int = 200  # test pictures asked in English
    naming_other: int = 40  # ... and in each of the other languages
    grounding: int = 100
    addition: int = 300
    needle: int = 40
    needle_length: int = 2048  # tokens: twice the longest trained length
    window: int = 1024  # tokens a document is read in for bits per byte
    documents: int = 12  # validation documents of each language
    batch: int = 64
    seed: int = 0
    goals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """name, value, unit, n, standard error, chance level, goal (None: none) and whether it is met."""

    name: str
    value: float
    unit: str
    n: int
    stderr: float | None
    chance: float | None = None
    goal: float | None = None
    met: bool | None = None
    note: str = ""


def share(name: str, grades: list[float], chance: float | None, goal: float | None, note: str = "") -> Row:
    """A row for a share of right answers; its error is the binomial one."""
    n = len(grades)
    value = sum(grades) / n
    return Row(name, value, "share", n, math.sqrt(value * (1 - value) / n), chance, goal,
               None if goal is None else value >= goal, note)  # fmt: skip


def bits(name: str, value: float, n: int, stderr: float, chance: float, below: float | None) -> Row:
    """A row for bits per byte; `below` is the wanted fraction below chance."""
    goal = None if below is None else chance * (1 - below)
    return Row(name, value, "bits/byte", n, stderr, chance, goal, None if goal is None else value <= goal)
