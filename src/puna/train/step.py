"""One optimizer step: accumulate, clip, guard, update, balance the router.

    loss = sum over all micro-batches and valid tokens of the term / number of valid tokens in the step

The head and the loss run on slices of valid positions only: each slice's backward fills the gradient of its hidden
states, then one backward through the body uses them all. Peak memory holds `slice` rows of logits, never B x T.

A step whose loss or gradient norm is not finite changes nothing: no weight, no moment, no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.model import Llama4
from puna.model.moe import moe_layers
from puna.train.terms import Term

if TYPE_CHECKING:  # one process needs no torch.distributed, a step no pictures
    from puna.data import Batch
    from puna.parallel.mesh import Mesh


@dataclass
class StepResult:
    """What one step measured; losses in nats per valid token."""

    loss: float
    grad_norm: float
    tokens: int  # tokens fed, padding excluded
    valid: int  # tokens the loss counted
    skipped: bool
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: list[Tensor] = field(default_factory=list)  # tokens of each expert [E], one entry a MoE layer


def accumulate_gradients(model: Llama4, batch: Batch, term: Term, denominator: int, slice_size: int):
    """Forward and backward of one micro-batch; gradients of (sum of the term / denominator) are added to .grad.

    Returns (sum of the term, dict of metric sums), detached. Where processes share the rows (`model.share`), hidden
    states are those of this process's own places, and so are the sums; one without any takes part all the same.
    """
    hidden_BTD = term.hidden(model, batch)
    own = model.share.of_batch if model.share is not None else lambda x: x
    place_n = own(batch.valid_BT).flatten().nonzero().squeeze(-1)
    if not place_n.numel() and model.share is None:
        return hidden_BTD.new_zeros((), dtype=torch.float32), {}
    hidden_nD = hidden_BTD.flatten(0, 1).index_select(0, place_n)
    about = {"targets": batch.targets_BT} | dict(batch.extra)
    about = {name: own(each).flatten(0, 1).index_select(0, place_n) for name, each in about.items()}
    total, metrics, gradients = 0.0, {}, []
    for start in range(0, max(place_n.numel(), 1), slice_size):
        part = slice(start, start + slice_size)
        leaf = hidden_nD[part].detach().requires_grad_()
        loss, sums = term(leaf, model.head, {name: each[part] for name, each in about.items()})
        (loss / denominator).backward()
        gradients.append(leaf.grad)
        total = total + loss.detach()
        for name, value in sums.items():
            metrics[name] = metrics.get(name, 0) + value.detach()
    if hidden_nD.requires_grad:  # not where an adapter on the head is all that is trained
        hidden_nD.backward(torch.cat(gradients))
    return total, metrics


def train_step(model: Llama4, optimizer, batches: list[Batch], term: Term, clip: float, slice_size: int,
               mesh: Mesh | None = None) -> StepResult:  # fmt: skip
    """Runs one optimizer step over its micro-batches; the learning rate is already set.

    mesh: the processes that take the step together, each with its own rows; all numbers of the result are the step's.
    """
    own = model.share.of_batch if model.share is not None else lambda x: x
    valid, tokens = (sum(int(own(x).sum()) for x in each) for each in (
        [b.valid_BT for b in batches], [b.doc_ids_BT >= 0 for b in batches]))  # fmt: skip
    if mesh is not None:
        valid, tokens = mesh.sum(torch.tensor([valid, tokens])).tolist()
    total, sums = torch.zeros(()), {}
    layers = moe_layers(model)
    counts = [torch.zeros(m.n_experts, dtype=torch.int64) for m in layers]
    flips = torch.zeros((), dtype=torch.int64)
    for batch in batches:
        loss, metrics = accumulate_gradients(model, batch, term, max(valid, 1), slice_size)
        total = total + loss
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value
        for count, layer in zip(counts, layers, strict=True):
            if layer.counts_E is not None:  # the term may have needed the vision tower alone
                count += layer.counts_E.cpu()
            if layer.flips is not None:
                flips += layer.flips.cpu()
    if mesh is not None:
        total, *summed = mesh.sum(torch.stack([total, *sums.values()]).double())
        sums = dict(zip(sums, summed, strict=True))
        *counts, flips = mesh.sum(torch.stack([*counts, flips.expand(model.config.n_experts)])).cpu()
        flips = flips[0]
    norm, parts = clip_gradients(model, clip, mesh)
    loss, grad_norm = float(total) / max(valid, 1), float(norm)
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm)) or not valid
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = {name: float(value) / max(valid, 1) for name, value in sums.items()}
    measured |= {f"grad/{part}": value for part, value in parts.items()} | router_metrics(counts, flips)
    return StepResult(loss, grad_norm, tokens, valid, skipped, measured, counts)


PARTS = {  # what names hold -> the part that they belong to; the rest are dense layers and shared experts
    ".attention.": "attention", ".router.": "router", ".experts.": "experts", "norm": "norms",
    ".tok_embeddings": "embedding", ".output.": "head",
}  # fmt: skip
ALL_PARTS = (*PARTS.values(), "dense", "vision", "adapter")


def part_of(name: str) -> str:
    """The part of the model that a parameter's gradient is reported under."""
    if name.startswith("vision."):
        return "adapter" if name.startswith(("vision.adapter.", "vision.projector.")) else "vision"
    return next((part for mark, part in PARTS.items() if mark in f".{name}"), "dense")


def clip_gradients(model: Llama4, clip: float, mesh: Mesh | None = None) -> tuple[Tensor, dict[str, float]]:
    """Scales all gradients to a global norm of at most `clip`; returns (the norm before, each part's share of it).

    As `torch.nn.utils.clip_grad_norm_`, bit for bit; it takes the norm of every tensor anyway, and summing their
    squares by part (`part_of`) costs next to nothing: the squares of all parts add up to the square of the whole. Of
    several processes each squares what it holds; every number is on one process of each copy (parallel/layout.py).
    """
    named = [(part_of(name), local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
    if not named and mesh is None:
        return torch.zeros(()), {}
    gradients = [gradient for _, gradient in named]
    norms = torch.stack(torch._foreach_norm(gradients))
    squares = dict.fromkeys(ALL_PARTS if mesh else {part for part, _ in named}, 0.0)
    for (part, _), norm in zip(named, norms.tolist(), strict=True):
        squares[part] += norm * norm
    total = torch.linalg.vector_norm(norms)
    if mesh is not None:
        summed = mesh.sum(torch.tensor(list(squares.values()), dtype=torch.float64)) / mesh.layout.dp_replicate
        squares = dict(zip(squares, summed.tolist(), strict=True))
        total = summed.sum().sqrt().to(norms)
    torch._foreach_mul_(gradients, torch.clamp(clip / (total + 1e-6), max=1.0))
    return total, {part: math.sqrt(square) for part, square in sorted(squares.items()) if square or not mesh}


def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds: its own memory, also of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def router_metrics(counts: list[Tensor], flips: Tensor) -> dict[str, float | list[float]]:
    """How evenly a step's tokens went to the experts: per MoE layer, and the layers' mean. With load_e the share of
    the tokens times E (1 is even):

        max_load   the busiest expert's load: its layer takes that much longer
        entropy    -sum p ln p / ln E of the shares p = load / E: 1 is even, 0 is one expert for all
        dead       the share of experts without a token

    and `flip_share`, the routes that the balance bias changed. "router/layers" has a list by layer of each.
    """
    if not any(int(count.sum()) for count in counts):  # no experts, or a term that needs the vision tower alone
        return {}
    counts_LE = torch.stack(counts).double()
    share_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp_min(1)
    n_experts = counts_LE.shape[1]
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(dim=1) / max(math.log(n_experts), 1e-9)
    layers = {
        "max_load": share_LE.max(dim=1).values * n_experts,
        "entropy": entropy_L.clamp(0, 1),
        "dead": (counts_LE == 0).double().mean(dim=1),
    }
    means = {f"router/{name}": float(value_L.mean()) for name, value_L in layers.items()}
    rounded = {name: [round(x, 4) for x in value_L.tolist()] for name, value_L in layers.items()}
    return means | {"router/flip_share": float(flips) / max(1, int(counts_LE.sum())), "router/layers": rounded}


class Balancer:
    """Loss-free load balancing (arXiv 2408.15664): b_e += u * sign(mean load - load_e), re-centred to mean 0.

    The bias moves the argmax while training and nothing else. It is training state: saved with checkpoints, never
    part of the model. `scale` in 0..1 fades its effect out before a stage ends (`optim.schedule.anneal`). Frozen
    routers (LoRA) are left alone: they could not learn to do without it.
    """

    def __init__(self, model: Llama4, update: float):
        self.layers = moe_layers(model)
        self.update = update if any(p.requires_grad for m in self.layers for p in m.router.parameters()) else 0.0
        device = model.tok_embeddings.weight.device
        self.bias = [torch.zeros(m.n_experts, device=device) for m in self.layers]

    def apply(self, scale: float) -> None:
        """Hands the faded bias to the routers for the coming step."""
        for layer, bias in zip(self.layers, self.bias, strict=True):
            layer.selection_bias_E = bias * scale if self.update > 0 else None

    def adjust(self, counts: list[Tensor]) -> None:
        """Moves the bias by a step's loads: tokens of each expert [E] over all micro-batches, one entry a layer."""
        if self.update <= 0:
            return
        for count_E, bias in zip(counts, self.bias, strict=True):
            load = count_E.to(bias)
            bias += self.update * torch.sign(load.mean() - load)
            bias -= bias.mean()

    def detach(self) -> None:
        """Leaves the model as it is used elsewhere: routing by raw logits."""
        for layer in self.layers:
            layer.selection_bias_E = None
