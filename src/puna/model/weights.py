"""Weights that are more than one tensor: the objects behind the seams `ops.linear` and `ops.expert_mm`.

A layer says `ops.linear(x, self.wo.weight)` and does not know what a weight is made of. Mostly it is a parameter. It
may be integers with scales (precision/quantized.py), or any of these with a low-rank adapter beside it (lora.py). Such
a `Weight` is a module that stands under the parameter's own name, so its parts are `layers.0.attention.wo.weight.A`
and so on in state dicts and checkpoints, and `plain` still finds it as `layers.0.attention.wo.weight`.

In both kinds of matrix the second dimension is the input: linear [out, in], experts [E, in, out].
"""

from __future__ import annotations

from abc import abstractmethod
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from puna.errors import PunaError


class Weight(nn.Module):
    """A matrix [out, in] or experts [E, in, out] that `ops` asks to multiply itself."""

    shape: torch.Size
    dtype: torch.dtype  # of the numbers it stands for

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `ops.linear`."""

    @abstractmethod
    def expert_mm(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        """As `ops.expert_mm`."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """The numbers themselves, [stop - start, ...] of the first dimension, in float32 at least."""

    def numel(self) -> int:
        return self.shape.numel()


def plain(model: nn.Module) -> dict[str, Tensor | Weight]:
    """The model's weights by the names they have in a model of parameters alone."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Weight)}
    outer = {name: weight for name, weight in found.items() if not any(_inside(name, other) for other in found)}
    rest = {name: p for name, p in model.named_parameters() if not any(_inside(name, other) for other in outer)}
    return rest | outer


def _inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def matrices(model: nn.Module) -> list[str]:
    """Names of all that goes through `ops.linear` and `ops.expert_mm`, in the model's order."""
    from puna.model.moe import Experts  # which imports ops, which imports this module

    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            names.append(f"{name}.weight")
        elif isinstance(module, Experts):
            names += [f"{name}.w13", f"{name}.w2"]
    return names


def matching(model: nn.Module, patterns) -> list[str]:
    """Names of the matrices that match a pattern (`*.attention.*`; * stands for anything). PunaError for a pattern that
    matches none."""
    names = matrices(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(dict.fromkeys(".".join(p for p in n.split(".") if not p.isdigit()) for n in names))
            raise PunaError(f"no matrix of the model is called like {pattern!r}; there are (layers.N.) {known}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def replace(model: nn.Module, name: str, weight: Tensor | Weight) -> None:
    """Puts a weight in the place of another of the same name; the model owns it."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, last)
    setattr(module, last, weight)


def get(model: nn.Module, name: str) -> Tensor | Weight:
    """The weight of this plain name."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)
