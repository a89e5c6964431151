"""One optimizer step: accumulate, clip, guard, update, balance the router.

    loss = sum over all micro-batches and valid tokens of the term / number of valid tokens in the step

The head and the loss run on slices of valid positions only: each slice's backward fills the gradient of its hidden
states, then one backward through the body uses them all. Peak memory holds `slice` rows of logits, never B x T.

A step whose loss or gradient norm is not finite changes nothing: no weight, no moment, no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from puna.data import Batch
from puna.model import Llama4
from puna.model.moe import moe_layers
from puna.train.terms import Term


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

    Returns (sum of the term, dict of metric sums), detached.
    """
    hidden_BTD = term.hidden(model, batch)
    place_n = batch.valid_BT.flatten().nonzero().squeeze(-1)
    if not place_n.numel():
        return hidden_BTD.new_zeros((), dtype=torch.float32), {}
    hidden_nD = hidden_BTD.flatten(0, 1).index_select(0, place_n)
    about = {"targets": batch.targets_BT} | dict(batch.extra)
    about = {name: each.flatten(0, 1).index_select(0, place_n) for name, each in about.items()}
    total, metrics, gradients = 0.0, {}, []
    for start in range(0, place_n.numel(), slice_size):
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


def train_step(model: Llama4, optimizer, batches: list[Batch], term: Term, clip: float, slice_size: int) -> StepResult:
    """Runs one optimizer step over its micro-batches; the learning rate is already set."""
    valid = sum(int(b.valid_BT.sum()) for b in batches)
    tokens = sum(int((b.doc_ids_BT >= 0).sum()) for b in batches)
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
    norm, parts = clip_gradients(model, clip)
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


def part_of(name: str) -> str:
    """The part of the model that a parameter's gradient is reported under."""
    if name.startswith("vision."):
        return "adapter" if name.startswith(("vision.adapter.", "vision.projector.")) else "vision"
    return next((part for mark, part in PARTS.items() if mark in f".{name}"), "dense")


def clip_gradients(model: Llama4, clip: float) -> tuple[Tensor, dict[str, float]]:
    """Scales all gradients to a global norm of at most `clip`; returns (the norm before, each part's share of it).

    As `torch.nn.utils.clip_grad_norm_`, bit for bit; it takes the norm of every tensor anyway, and summing their
    squares by part (`part_of`) costs next to nothing: the squares of all parts add up to the square of the whole.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    if not named:
        return torch.zeros(()), {}
    parameters = [p for _, p in named]
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
    total = torch.linalg.vector_norm(norms)
    if total + 1e-6 > clip:  # else all gradients would be read and written to be multiplied by 1
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    squares: dict[str, float] = {}
    for (name, _), norm in zip(named, norms.tolist(), strict=True):
        squares[part_of(name)] = squares.get(part_of(name), 0.0) + norm * norm
    return total, {part: math.sqrt(square) for part, square in sorted(squares.items())}


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
