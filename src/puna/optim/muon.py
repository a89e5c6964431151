"""Muon (Keller Jordan, 2024; arXiv 2502.16982): a matrix moves by its momentum with all singular values made about one.

    M <- 0.95 M + 0.05 G
    W <- (1 - lr * decay) W - lr * 0.2 sqrt(max(rows, columns)) * NS(0.05 G + 0.95 M)

Adam gives every *entry* its own pace, Muon every *direction*: what a gradient says in few strong directions does not
drown the weak ones. NS is five steps of Newton-Schulz, X <- a X + (b A + c A^2) X with A = X X^T, on X over its norm.
It keeps singular vectors; its coefficients rise as fast as they can at 0 and leave singular values in about 0.7..1.2,
near enough to 1. The entries of an orthogonal matrix have the root mean square 1 / sqrt(max(rows, columns)), those of
Adam's updates about 0.2. Hence the factor: one learning rate and one decay serve both.

**Which.** Hidden matrices of the text model and of the vision encoder. Embeddings, head, norms, biases, routers, the
patch embedding (an input layer) and the adapter with its projector (`optim/adamw.py` says why those must not be pushed)
stay with AdamW, in the same optimizer object.

**Fused matrices are cut.** `wqkv` holds three maps and `w13` two, side by side only to save a launch. Each is
orthogonalised alone, as Jordan advises for q, k, v and Megatron does: an update must not depend on how weights are
stored, and made orthogonal together, the part with the larger gradients would take the smaller one's share.

**Experts** [E, in, out] are E matrices in one batched product. One without a token in a step has no gradient, and stays
where it is: its old momentum, however small, would be blown up to a whole step. Fifteen products for each matrix of a
hundred experts cost more than the step itself where a step is short; `muon_attention` leaves all but attention's
matrices to AdamW.

**Sharded** (FSDP2; parameters, gradients and moments are DTensors). Experts sharded by expert are whole where they are.
Other matrices are gathered, made orthogonal by one rank each in turn, and scattered back, so that the work is shared.
Tensor parallelism cuts matrices before that, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from puna.errors import PunaError
from puna.optim.adamw import DECAYING, group_of

COEFFICIENTS, STEPS, MOMENTUM, RMS, TINY = (3.4445, -4.7750, 2.0315), 5, 0.95, 0.2, 1e-7
HIDDEN = ("matrix", "ffn", "vision")  # groups of hidden matrices


def orthogonalise(update: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of update = U S V^T, nearly (see above), for a matrix or a batch [..., m, n] of them; products in `dtype`.
    A zero matrix stays zero."""
    x_bmn = update.to(dtype).reshape(-1, *update.shape[-2:])
    tall = x_bmn.shape[-2] > x_bmn.shape[-1]
    x_bmn = x_bmn.mT if tall else x_bmn  # A is as small as it can be
    x_bmn = x_bmn / x_bmn.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram_bmm = x_bmn @ x_bmn.mT
        x_bmn = torch.baddbmm(x_bmn, torch.baddbmm(gram_bmm, gram_bmm, gram_bmm, beta=b, alpha=c), x_bmn, beta=a)
    return (x_bmn.mT if tall else x_bmn).reshape(update.shape)


def direction(update: Tensor, cut: tuple[int, tuple[int, ...]] | None, dtype: torch.dtype) -> Tensor:
    """What the learning rate is multiplied by: every logical matrix of `update` orthogonal, with Adam's size.

    cut: (dimension, sizes) of the matrices that are fused side by side; None: one.
    """
    if update.numel() == 0:  # a rank without an expert
        return update
    parts = [update] if cut is None else list(update.split(cut[1], dim=cut[0]))
    parts = [orthogonalise(part, dtype) * (RMS * math.sqrt(max(part.shape[-2:]))) for part in parts]
    return parts[0] if cut is None else torch.cat(parts, dim=cut[0])


def cut_of(name: str, shape: torch.Size, config) -> tuple[int, tuple[int, ...]] | None:
    """Where a parameter of this name holds several matrices: (dimension of its outputs, their sizes), else None."""
    if name.endswith("attention.wqkv.weight"):
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return 0, (queries, keys, keys)
    if name.endswith((".w13", ".w13.weight")):
        dim = len(shape) - 1 if len(shape) == 3 else 0  # experts are input-major
        return dim, (shape[dim] // 2,) * 2
    return None


class Muon(torch.optim.AdamW):
    """Muon for the groups with a "cut", fused AdamW for the rest; one state, one `param_groups`, one `step`."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, dtype: torch.dtype):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups; a parameter without a gradient stays, as in AdamW."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if "cut" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        turn = 0
        for group in groups:
            for parameter in group["params"] if "cut" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, group, turn)
                    turn += 1
        return loss

    def _move(self, parameter: Tensor, group: dict, turn: int) -> None:
        state, grad = self.state[parameter], _local(parameter.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = _local(state["momentum_buffer"])
        momentum.lerp_(grad, 1 - MOMENTUM)
        update = grad.lerp(momentum, MOMENTUM)
        local = _local(parameter)
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(self._direction(update, parameter, group["cut"], turn), alpha=-group["lr"])

    def _direction(self, update: Tensor, parameter: Tensor, cut, turn: int) -> Tensor:
        """`direction` of a parameter's update, of which this rank holds a part."""
        experts, placements = parameter.dim() == 3, getattr(parameter, "placements", ())
        if all(p.is_replicate() or experts and p.is_shard(0) for p in placements):
            if experts:
                update = update * (_local(parameter.grad).abs().amax(dim=(1, 2), keepdim=True) > 0)
            return direction(update, cut, self.dtype).to(update.dtype)
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # half of torch's import time

        mesh, over = parameter.device_mesh, [i for i, p in enumerate(placements) if not p.is_replicate()]
        if len(over) > 1 or type(placements[over[0]]) is not Shard:
            raise PunaError(f"train.optimizer muon can't move a matrix placed as {placements}: use adamw")
        mesh = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[over[0]]]
        about = dict(device_mesh=mesh, placements=[placements[over[0]]], run_check=False)
        if experts:  # cut within: whether an expert has a gradient, all ranks know together
            largest = DTensor.from_local(_local(parameter.grad), **about).abs().amax(dim=(1, 2), keepdim=True)
            update = update * (largest.full_tensor() > 0)
        part = DTensor.from_local(update.to(self.dtype), shape=parameter.shape, stride=parameter.stride(), **about)
        whole, owner = part.full_tensor(), turn % mesh.size()
        if mesh.get_local_rank() == owner:
            whole = direction(whole, cut, self.dtype)
        return distribute_tensor(whole, mesh, about["placements"], src_data_rank=owner).to_local().to(update.dtype)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "placements") else tensor


def build_muon(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
               multipliers: Mapping[str, float] | None = None, moved: Container[str] = HIDDEN) -> Muon:  # fmt: skip
    """Muon and AdamW over the trainable parameters, in `build_adamw`'s groups (those of matrices once for every way of
    cutting them); betas and eps are AdamW's. Newton-Schulz runs in the model's compute dtype. moved: the groups
    that are Muon's."""
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(name, parameter)
        hidden = group in moved and "patch_embedding" not in name
        part = getattr(model, "parts", {}).get(name)  # of a parallel model: what this process has of the whole
        if hidden and part is not None and part.shape[-2:] != tuple(parameter.shape[-2:]):
            raise PunaError("train.optimizer muon needs whole matrices, parallel.tp cuts them: use adamw")
        cut = cut_of(name, parameter.shape, model.config) if hidden else None
        entry = groups.setdefault((group, hidden, cut, getattr(parameter, "device_mesh", None)), {
            "params": [], "name": group, "peak": lr * (multipliers or {}).get(group, 1.0),
            "weight_decay": weight_decay if group in DECAYING else 0.0,
        } | ({"cut": cut} if hidden else {}))  # fmt: skip
        entry["params"].append(parameter)
    return Muon(list(groups.values()), lr, betas, eps, model.dtype)
