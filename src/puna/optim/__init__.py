"""Optimizers and learning-rate schedules."""

from puna.optim.adamw import build_adamw
from puna.optim.schedule import wsd

__all__ = ["build_adamw", "wsd"]
