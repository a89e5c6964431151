"""The one loop: every stage of a model's life is this loop with its own data, loss and schedule."""

from importlib import import_module

_HOME = {"TrainConfig": "config", "Evaluation": "loop", "Job": "loop", "train": "loop"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # On demand: who takes a step alone (benchmarks/gpu.py, on a bare machine) needs no pictures and no tokenizer.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
