"""Runs of small operations as one kernel each, by `torch.compile`, where that pays.

A norm, a rotation, a SwiGLU read and write their whole input several times over; on a GPU, whose products are fast,
that is time lost. Such a run is marked as a *region*. On devices named in `compiled_on` it is compiled, forward and
backward, when it first runs (seconds); everywhere else it runs as it is written. Regions hold no products and no
collectives, so they compose with any parallelism, recomputation and FP8, and with a user's own torch.compile.

A CPU is not among them: compiling takes minutes there. `train.compile on` asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from puna.errors import PunaError

compiled_on = {"cuda"}
"""Types of devices; `compiling` changes it."""


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function`, compiled once for all shapes."""
    return torch.compile(function, dynamic=True)


def region(function: Callable) -> Callable:
    """Marks a function of a tensor (and more) as a region."""

    @functools.wraps(function)
    def call(x: torch.Tensor, *rest):
        return (compiled(function) if x.device.type in compiled_on else function)(x, *rest)

    return call


@contextmanager
def compiling(how: str, device: str) -> Iterator[None]:
    """While it lasts, regions on this type of device are compiled ("on"), not ("off"), or as they were ("auto").

    Errors: PunaError for "on" where torch can't compile.
    """
    before = set(compiled_on)
    if how == "on":
        try:
            compiled(_probe)(torch.ones(2, device=device))
        except Exception as error:  # no compiler, a wrong one, no right to write its files: torch has many ways
            why = str(error).strip().partition("\n")[0]
            fault = f"train.compile on: torch can't compile here ({why}); install g++, or leave it off"
            raise PunaError(fault) from error
        compiled_on.add(device)
    elif how == "off":
        compiled_on.discard(device)
    try:
        yield
    finally:
        compiled_on.clear()
        compiled_on.update(before)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x + 1
