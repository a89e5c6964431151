"""A model whose large matrices are integers: which ones, and how they multiply.

By default those that Meta quantises on loading: routed and shared experts of all MoE layers (llama4-facts.md §5.3),
102.7 of Scout's 107.8 billion parameters of text. All else stays what it was.

Nothing is multiplied in integers: a matrix, or one expert that has tokens, is brought back to the activations' type,
used, and dropped; in the backward pass again, so that no full copy waits for it. The integers are frozen; what is
trained over them is an adapter (model/lora.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model.weights import Weight, get, matching, replace
from puna.precision import int4, int8

SCHEMES: dict[str, ModuleType] = {"int8": int8, "int4": int4}
PARTS = ("q", "scale")
EXPERTS = ("*.moe.experts.*", "*.moe.shared.*")


@dataclass(frozen=True)
class Quantization:
    """A scheme and the patterns of parameter names it is for."""

    scheme: str
    targets: tuple[str, ...] = EXPERTS

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise PunaError(f"there is no scheme {self.scheme!r}: use {' or '.join(SCHEMES)}")


class Quantized(Weight):
    """Integers `q` and `scale` of a weight of `shape`; empty until filled, a row at a time or at once."""

    def __init__(self, scheme: str, shape: torch.Size, dtype: torch.dtype):
        super().__init__()
        self.scheme, self.shape, self.dtype = SCHEMES[scheme], shape, dtype
        stored, scales = self.scheme.shapes(tuple(shape))
        self.register_buffer("q", torch.empty(stored, dtype=self.scheme.DTYPE))
        self.register_buffer("scale", torch.empty(scales, dtype=torch.float32))

    def rows(self, start: int, stop: int) -> Tensor:
        return self._values(start, stop, torch.float32)

    def _values(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.scheme.dequantize(self.q[start:stop], self.scale[start:stop], dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = _Linear.apply(x, self)
        return y if bias is None else y + bias.to(y.dtype)

    def expert_mm(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        return _ExpertMM.apply(x_TD, self, counts_E.tolist())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Quantized) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight._values(0, weight.shape[0], x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.weight._values(0, ctx.weight.shape[0], dy.dtype), None


class _ExpertMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight: Quantized, counts: list[int]) -> Tensor:
        ctx.weight, ctx.counts = weight, counts
        return _per_expert(x_TD, weight, counts, lambda w_DF: w_DF, weight.shape[2])

    @staticmethod
    def backward(ctx, dy_TF: Tensor):
        return _per_expert(dy_TF, ctx.weight, ctx.counts, lambda w_DF: w_DF.t(), ctx.weight.shape[1]), None, None


def _per_expert(x_TD: Tensor, weight: Quantized, counts: list[int], side, width: int) -> Tensor:
    """x[s_e] @ side(w[e]) for the experts that have rows."""
    if sum(counts) != len(x_TD):
        raise ValueError(f"expert counts sum to {sum(counts)}, but there are {len(x_TD)} rows")
    y_TF = x_TD.new_empty(len(x_TD), width)
    start = 0
    for e, n in enumerate(counts):
        if n:
            w_DF = weight._values(e, e + 1, x_TD.dtype)[0]
            torch.mm(x_TD[start : start + n], side(w_DF), out=y_TF[start : start + n])
            start += n
    return y_TF


def attach(model: nn.Module, quantization: Quantization) -> None:
    """Puts empty integers in the places of the targets. PunaError: a pattern that matches nothing."""
    for name in matching(model, quantization.targets):
        old = get(model, name)
        with torch.device(old.device):
            replace(model, name, Quantized(quantization.scheme, old.shape, old.dtype))
