"""Optimizers and learning-rate schedules."""

from functools import partial

from puna.optim.adamw import build_adamw
from puna.optim.muon import build_muon
from puna.optim.schedule import wsd

OPTIMIZERS = {"adamw": build_adamw, "muon": build_muon, "muon_attention": partial(build_muon, moved=("matrix",))}

__all__ = ["OPTIMIZERS", "build_adamw", "build_muon", "wsd"]
