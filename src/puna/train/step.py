"""One optimizer step: accumulate, clip, guard, update, balance the router.

    loss = sum over all micro-batches and valid tokens of the term / number of valid tokens in the step

The head and the loss run on slices of valid positions only: each slice's backward fills the gradient of its hidden
states, then one backward through the body uses them all. Peak memory holds `slice` rows of logits, never B x T.

A step whose loss or gradient norm is not finite changes nothing: no weight, no moment, no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
    metrics: dict[str, float] = field(default_factory=dict)
    counts: list[Tensor] = field(default_factory=list)  # tokens of each expert [E], one entry a MoE layer


def accumulate_gradients(model: Llama4, batch: Batch, term: Term, denominator: int, slice_size: int):
    """Forward and backward of one micro-batch; gradients of (sum of the term / denominator) are added to .grad.

    Returns (sum of the term, dict of metric sums), detached.
    """
    hidden_BTD = model.hidden(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
    place_n = batch.valid_BT.flatten().nonzero().squeeze(-1)
    if not place_n.numel():
        return hidden_BTD.new_zeros((), dtype=torch.float32), {}
    hidden_nD = hidden_BTD.flatten(0, 1).index_select(0, place_n)
    targets_n = batch.targets_BT.flatten().index_select(0, place_n)
    total, metrics, gradients = 0.0, {}, []
    for start in range(0, place_n.numel(), slice_size):
        part = slice(start, start + slice_size)
        leaf = hidden_nD[part].detach().requires_grad_()
        loss, sums = term(leaf, model.head, {"targets": targets_n[part]})
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
            count += layer.counts_E.cpu()
            if layer.flips is not None:
                flips += layer.flips.cpu()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    loss, grad_norm = float(total) / max(valid, 1), float(norm)
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm)) or not valid
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = {name: float(value) / max(valid, 1) for name, value in sums.items()}
    measured |= router_metrics(counts, flips)
    return StepResult(loss, grad_norm, tokens, valid, skipped, measured, counts)


def router_metrics(counts: list[Tensor], flips: Tensor) -> dict[str, float]:
    """Load of the busiest expert relative to the mean, dead experts, and the share of routes the bias changed."""
    if not counts:
        return {}
    load = torch.stack([c.double() / max(1, int(c.sum())) * c.numel() for c in counts])
    routed = sum(int(c.sum()) for c in counts)
    return {
        "router/max_load": float(load.max(dim=1).values.mean()),
        "router/dead": float((load == 0).double().mean()),
        "router/flip_share": float(flips) / max(1, routed),
    }


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
