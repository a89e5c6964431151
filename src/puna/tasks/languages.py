"""Which language to speak: weights over the nursery's languages, checked once, drawn by the item's own generator."""

from __future__ import annotations

from collections.abc import Iterable

from puna import nursery
from puna.errors import PunaError

LANGUAGE_WEIGHTS = {lang: 11.0 if lang == "en" else 1.0 for lang in nursery.LANGUAGES}  # half English


def check_languages(task: str, languages: Iterable[str]) -> None:
    """PunaError if one of them is not a nursery language."""
    for lang in languages:
        if lang not in nursery.LANGUAGES:
            raise PunaError(f"{task}: unknown language {lang!r}; choose from {', '.join(nursery.LANGUAGES)}")


def language_weights(task: str, weights: dict[str, float] | None) -> dict[str, float]:
    """`weights`, or half English without; PunaError for unknown languages, negative weights or none above 0."""
    weights = dict(LANGUAGE_WEIGHTS if weights is None else weights)
    check_languages(task, weights)
    if not any(weights.values()) or min(weights.values()) < 0:
        raise PunaError(f"{task}: language weights must not be negative, and one must be above 0; got {weights}")
    return weights


def weighted(weights: dict[str, float], rand) -> str:
    """One key, drawn by weight."""
    return rand.choices(list(weights), list(weights.values()))[0]
