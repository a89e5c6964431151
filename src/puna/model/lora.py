"""LoRA: a frozen weight with a low-rank change beside it (arXiv 2106.09685), on linears and on experts alike.

    linear    W [out, in]      y = x W^T + s (x A^T) B^T      A [r, in]       B [out, r]
    experts   W_e [in, out]    y = x W_e + s (x A_e) B_e      A [E, in, r]    B [E, r, out]        s = alpha / r

B starts at zero: the first output is the base's, bitwise. Only A and B have gradients, moments and a place in the
checkpoints. Each expert has its own pair, so a token trains those of the expert it was sent to. The small products go
through the same `ops` as the large one.

`merge` adds s B A to the weight, after which nothing shows that there was an adapter; rounded to bfloat16 the sum is
not exactly what was trained, so it is done on demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model import ops
from puna.model.init import generator
from puna.model.weights import Weight, get, matching, plain, replace

BASES = ("stored", "float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get an adapter of which rank. rank 0: none, the whole model is trained.

    targets: patterns on parameter names, such as `*.attention.*`, `*.moe.experts.w13` or `*` (docs/finetuning.md).
    ranks: pattern -> another rank, the last that matches (0: no adapter). alpha: the change counts alpha / rank.
    base: what the frozen weights are held as (int8 and int4: the experts and shared experts; the rest as stored).
    """

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("layers.*.attention.*", "layers.*.w13*", "layers.*.w2*")  # text, without routers
    ranks: Mapping[str, int] = field(default_factory=dict)
    base: str = "stored"

    def __post_init__(self):
        for name, rank in {"rank": self.rank, **{f"ranks.{p}": r for p, r in self.ranks.items()}}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise PunaError(f"lora.{name} must be a whole number >= 0, not {rank!r}")
        if not self.alpha > 0:
            raise PunaError(f"lora.alpha must be positive, not {self.alpha}")
        if self.base not in BASES:
            raise PunaError(f"lora.base must be {', '.join(BASES)}, not {self.base!r}")
        if not self.targets:
            raise PunaError("lora.targets is empty: name what gets an adapter, or leave --lora settings out")

    def rank_of(self, name: str) -> int:
        """The rank of a target."""
        own = [rank for pattern, rank in self.ranks.items() if fnmatchcase(name, pattern)]
        return own[-1] if own else self.rank


class LoRA(Weight):
    """`base` and its adapter."""

    def __init__(self, base: Tensor | Weight, A: Tensor, B: Tensor, scale: float):  # noqa: N803 - the paper's names
        super().__init__()
        self.base, self.shape, self.dtype, self.scale = base, base.shape, base.dtype, scale
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.base, bias) + ops.linear(ops.linear(x, self.A), self.B) * self.scale

    def expert_mm(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        y_TF = ops.expert_mm(x_TD, self.base, counts_E)
        return y_TF + ops.expert_mm(ops.expert_mm(x_TD, self.A, counts_E), self.B, counts_E) * self.scale

    def rows(self, start: int, stop: int) -> Tensor:
        base = self.base.rows(start, stop) if isinstance(self.base, Weight) else self.base[start:stop]
        return merged_rows(base, self.A, self.B, self.scale, start)


@torch.no_grad()
def merged_rows(base: Tensor, A: Tensor, B: Tensor, scale: float, start: int) -> Tensor:  # noqa: N803
    """Rows of W + s B A, from row `start` on, those of W given; in float32 at least."""
    wide = torch.promote_types(base.dtype, torch.float32)
    A, B = A.to(base.device, wide), B.to(base.device, wide)  # noqa: N806
    part = slice(start, start + len(base))
    delta = B[part] @ A if A.dim() == 2 else A[part] @ B[part]
    return torch.add(base.to(wide), delta, alpha=scale)


def attach(model: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Freezes the model and gives its targets adapters; A is drawn by (seed, name, expert) alone, B is zero.

    Errors: PunaError where a pattern matches nothing, or no target has a rank.
    """
    found = {name: config.rank_of(name) for name in matching(model, config.targets)}
    matching(model, config.ranks)
    if not any(found.values()):
        raise PunaError("every target of lora.targets has rank 0: set lora.rank, or leave --lora settings out")
    adapters = {}
    for name, rank in found.items():
        if rank:
            shape = get(model, name).shape
            device = model.tok_embeddings.weight.device
            adapters[name] = (*_initial(name, shape, rank, seed, device), config.alpha / rank)
    put(model, adapters)


def _initial(name: str, shape: torch.Size, rank: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A ~ N(0, 1 / in) and B = 0 for a matrix of this shape."""
    experts = len(shape) == 3
    A = torch.empty((shape[0], shape[1], rank) if experts else (rank, shape[1]))  # noqa: N806
    if device.type != "meta":
        for part, expert in [(A[e], e) for e in range(shape[0])] if experts else [(A, None)]:
            part.normal_(0, shape[1] ** -0.5, generator=generator(seed, f"{name}.A", expert))
    return A.to(device), torch.zeros((shape[0], rank, shape[2]) if experts else (shape[0], rank), device=device)


def put(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Freezes the model and puts adapters (A, B, scale) beside the weights of these names. PunaError naming the weight
    that is not there or does not fit."""
    model.requires_grad_(False)
    weights = plain(model)
    for name, (A, B, scale) in adapters.items():  # noqa: N806
        if name not in weights:
            raise PunaError(f"there is an adapter for {name}, which the base has not: it belongs to another model")
        shape, r = tuple(weights[name].shape), A.shape[-1 if A.dim() == 3 else 0]
        fits = ((r, shape[1]), (shape[0], r)) if len(shape) == 2 else ((*shape[:2], r), (shape[0], r, shape[-1]))
        if (tuple(A.shape), tuple(B.shape)) != fits:
            raise PunaError(f"the adapter of {name} is {list(A.shape)} and {list(B.shape)}, the weight {list(shape)}")
        replace(model, name, LoRA(weights[name], A, B, scale))


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of all adapters by their whole names; empty for a model without."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    return {f"{name}.{part}": getattr(weight, part) for name, weight in found.items() for part in "AB"}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Adds every adapter to its weight, which becomes a plain parameter of the base's type again, integers too."""
    for name, weight in plain(model).items():
        if isinstance(weight, LoRA):
            replace(model, name, nn.Parameter(weight.rows(0, weight.shape[0]).to(weight.dtype)))
