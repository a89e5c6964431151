"""One measured number with everything needed to judge it, and one answer to look at."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from puna.tasks import Item

SHARE, BITS = "share", "bits/byte"


@dataclass(frozen=True)
class Row:
    """A line of report.json.

    value, stderr, chance, goal are in `unit`. better: which way is good. met: whether the goal is reached; None where
    there is no goal, False where there is one and nothing could be measured (value None; `note` says why).
    """

    name: str
    value: float | None
    unit: str
    n: int
    stderr: float | None = None
    chance: float | None = None
    goal: float | None = None
    met: bool | None = None
    better: str = "higher"
    note: str = ""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def judge(value: float | None, goal: float | None, better: str) -> bool | None:
    """Whether a goal is met. Lower is better: at or below it."""
    if goal is None:
        return None
    if value is None or not math.isfinite(value):
        return False
    return value >= goal if better == "higher" else value <= goal


def share_row(name: str, grades: list[float], chance: float, goal: float | None, note: str = "") -> Row:
    """Mean of grades in 0..1; stderr is that of n independent draws, sqrt(p (1 - p) / n)."""
    n = len(grades)
    value = sum(grades) / n
    return Row(name, value, SHARE, n, math.sqrt(value * (1 - value) / n), chance, goal, judge(value, goal, "higher"),
               note=note)  # fmt: skip


def chance_row(name: str, grades: list[float], chance: float, note: str = "") -> Row:
    """A control that must *fall to chance* c: met up to two standard errors above it, c + 2 sqrt(c (1 - c) / n)."""
    plain = share_row(name, grades, chance, None, note)
    goal = chance + 2 * math.sqrt(chance * (1 - chance) / plain.n)
    return dataclasses.replace(plain, goal=goal, met=judge(plain.value, goal, "lower"), better="lower")


def bits_row(name: str, bits: float, tokens: int, stderr: float, chance: float, fraction: float | None) -> Row:
    """Bits per byte; the goal is chance x (1 - fraction); a fraction of 0 asks for less than chance."""
    goal = None if fraction is None else chance * (1 - fraction)
    met = judge(bits, goal, "lower")
    if met and fraction == 0:
        met = bits < chance
    return Row(name, bits, BITS, tokens, stderr, chance, goal, met, "lower")


def missing_row(name: str, unit: str, goal: float | None, note: str) -> Row:
    """A row that could not be measured: shown all the same, and a goal on it is not met. A goal in bits per byte stays
    empty, since it is relative to a chance that was not measured either."""
    better, shown = ("lower", None) if unit == BITS else ("higher", goal)
    return Row(name, None, unit, 0, goal=shown, met=judge(None, goal, better), better=better, note=note)


@dataclass(frozen=True)
class Sample:
    """An answer of the model to look at: the row it counted in, the item, what was generated, how it was graded."""

    row: str
    item: Item
    text: str
    grade: float

    def to_dict(self) -> dict:
        """JSON; pictures as recipes."""
        return {"row": self.row, "item": self.item.to_json(), "text": self.text, "grade": self.grade}

    @classmethod
    def from_dict(cls, data: dict) -> Sample:
        return cls(data["row"], Item.from_json(data["item"]), data["text"], data["grade"])
