"""Warmup-stable-decay: linear up, flat, linear down.

The flat part needs no horizon, so a run can be extended, and every decay branch from it is a finished model
(arXiv 2404.06395). The last fraction of the steps decays to `floor` times the peak.
"""

from __future__ import annotations


def wsd(step: int, steps: int, warmup: int, decay: float, floor: float = 0.0) -> float:
    """Multiplier on the peak learning rate at 0-based `step` of `steps`.

    warmup: steps of linear warm-up (capped at half the run); decay: fraction of `steps` spent decaying linearly to
    `floor`. The first step already moves (1 / warmup), the last one still does.
    """
    warmup = min(warmup, steps // 2)
    down = round(decay * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps - down:
        left = (steps - step) / (down + 1)
        return floor + (1 - floor) * left
    return 1.0


def anneal(step: int, steps: int, fraction: float = 0.2) -> float:
    """1 until the last `fraction` of the steps, then linearly to 0, reached at the last step.

    It takes the router's selection bias out of training before a stage ends: what is left is the argmax of raw logits.
    """
    start = steps - max(1, round(fraction * steps))
    return 1.0 if step < start else max(0.0, (steps - 1 - step) / max(1, steps - 1 - start))
