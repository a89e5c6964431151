"""How much is measured, and what must be reached.

Goals are fixed before a run and belong to its duration; they may be raised, never lowered to be met. A goal of a bpb
row is the *fraction below chance* to reach: 0.2 means bits per byte <= 0.8 x chance, 0 means below chance at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from puna.errors import PunaError
from puna.fields import nearest
from puna.nursery import LANGUAGES

BELOW_CHANCE = {f"bpb/{lang}": 0.0 for lang in LANGUAGES}
GOALS = BELOW_CHANCE | {"naming/en": 0.35, "addition/2digit": 0.80, "bpb/en": 0.20, "bpb/code": 0.20}
GOALS_HOUR = GOALS | {
    "naming/en": 0.50, "grounding/iou50": 0.50, "addition/2digit": 0.95, "needle/2x": 0.80, "bpb/en": 0.30,
}  # fmt: skip
ROWS = (*(f"naming/{lang}" for lang in LANGUAGES), "grounding/iou50", "addition/2digit", "needle/2x",
        *(f"bpb/{lang}" for lang in LANGUAGES), "bpb/code")  # fmt: skip


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation. Counts are items of a test split; a split that holds fewer gives all it has."""

    naming: int = 200  # pictures named in English, and once more with the pictures exchanged
    naming_languages: int = 40  # pictures named in each other language
    grounding: int = 120
    addition: int = 200
    needle: int = 40
    needle_length: int = 2048  # tokens of the whole question: twice the longest trained length
    languages: tuple[str, ...] = LANGUAGES
    goals: Mapping[str, float] = field(default_factory=lambda: dict(GOALS))
    window: int = 512  # tokens that bits per byte see at once
    batch: int = 32  # sequences decoded together
    bpb_rows: int = 8  # windows scored together
    bpb_bytes: int = 0  # of validation text of each language; 0: all
    chance_chars: int = 0  # of training text of each language counted for chance; 0: all
    samples: int = 12  # answers shown in the report
    seed: int = 0

    def __post_init__(self):
        for name in ("naming", "naming_languages", "grounding", "addition", "needle", "batch", "bpb_rows"):
            least = 2 if name == "naming" else 1  # a lone picture has no other to be exchanged with
            if getattr(self, name) < least:
                raise PunaError(f"eval.{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("bpb_bytes", "chance_chars", "samples"):
            if getattr(self, name) < 0:
                raise PunaError(f"eval.{name} must not be negative, got {getattr(self, name)}")
        if self.window < 2:
            raise PunaError(f"eval.window must be at least 2 (a first token and one to predict), got {self.window}")
        for lang in self.languages:
            if lang not in LANGUAGES:
                raise PunaError(f"eval.languages: no language {lang!r}; did you mean {nearest(lang, LANGUAGES)!r}?")
        for name, goal in self.goals.items():
            if name not in ROWS:
                raise PunaError(f"eval.goals: no row {name!r}; did you mean {nearest(name, ROWS)!r}?")
            if not 0 <= goal <= 1:
                raise PunaError(f"eval.goals.{name} must lie in 0..1, got {goal}")


def smaller(config: EvalConfig) -> EvalConfig:
    """The same rows from a handful of items each: a smoke run's evaluation, in seconds."""
    return dataclasses.replace(
        config, naming=min(config.naming, 16), naming_languages=min(config.naming_languages, 2),
        grounding=min(config.grounding, 8), addition=min(config.addition, 16), needle=min(config.needle, 4),
        bpb_bytes=4096, chance_chars=200_000,
    )  # fmt: skip


def for_minutes(config: EvalConfig, minutes: float) -> EvalConfig:
    """The evaluation of a run of so many minutes: an hour's goals from 60 on, each the higher of its own and the
    configured one, and more items, so that they can be told apart from luck."""
    if minutes < 60:
        return config
    goals = {name: max(goal, config.goals.get(name, 0.0)) for name, goal in GOALS_HOUR.items()}
    return dataclasses.replace(
        config, goals=goals, naming_languages=max(config.naming_languages, 100),
        grounding=max(config.grounding, 300), addition=max(config.addition, 400), needle=max(config.needle, 100),
    )  # fmt: skip
