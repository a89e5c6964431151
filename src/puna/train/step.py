"""One optimizer step: accumulate, clip, guard, update, balance the router.

    loss = sum over all micro-batches and valid tokens of the term / number of valid tokens in the step

The head and the loss run on slices of valid positions only: each slice's backward fills the gradient of its hidden
states, then one backward through the body uses them all. Peak memory holds `slice` rows of logits, never B x T.

A step whose loss or gradient norm is not finite changes nothing: no weight, no moment, no bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.model import Llama4
from puna.train.balance import Routes, router_metrics
from puna.train.terms import Term

if TYPE_CHECKING:  # one process needs no torch.distributed, a step no pictures
    from puna.data import Batch
    from puna.parallel.mesh import Mesh
    from puna.train.workers import Workers


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
    seen: list[dict[str, Tensor]] = field(default_factory=list)  # sums of `MoE.seen`, likewise


def accumulate_gradients(model: Llama4, batch: Batch, term: Term, denominator: int, slice_size: int):
    """Forward and backward of one micro-batch; gradients of (sum of the term / denominator) are added to .grad.

    Returns (sum of the term, dict of metric sums), detached.
    """
    hidden_BTD = term.hidden(model, batch)
    total, metrics, gradient_BTD = loss_gradient(model, batch, hidden_BTD, term, denominator, slice_size)
    if hidden_BTD.requires_grad and gradient_BTD is not None:  # not where an adapter on the head is all that is trained
        hidden_BTD.backward(gradient_BTD)
    return total, metrics


def loss_gradient(model: Llama4, batch: Batch, hidden_BTD: Tensor, term: Term, denominator: int, slice_size: int):
    """(sum of the term, dict of metric sums, gradient of the hidden states or None where no position counts); the
    head's own gradient is added to .grad.

    Where processes share the rows (`model.share`), hidden states are those of this process's own places, and so are the
    sums; one without any takes part all the same.
    """
    own = model.share.of_batch if model.share is not None else lambda x: x
    place_n = own(batch.valid_BT).flatten().nonzero().squeeze(-1)
    if not place_n.numel() and model.share is None:
        return hidden_BTD.new_zeros((), dtype=torch.float32), {}, None
    hidden_nD = hidden_BTD.detach().flatten(0, 1).index_select(0, place_n)
    about = {"targets": batch.targets_BT} | dict(batch.extra)
    about = {name: own(each).flatten(0, 1).index_select(0, place_n) for name, each in about.items()}
    total, metrics, gradients = 0.0, {}, []
    for start in range(0, max(place_n.numel(), 1), slice_size):
        part = slice(start, start + slice_size)
        leaf = hidden_nD[part].requires_grad_()
        loss, sums = term(leaf, model.head, {name: each[part] for name, each in about.items()})
        (loss / denominator).backward()
        gradients.append(leaf.grad)
        total = total + loss.detach()
        for name, value in sums.items():
            metrics[name] = metrics.get(name, 0) + value.detach()
    gradient_nD = torch.zeros_like(hidden_BTD).flatten(0, 1).index_copy(0, place_n, torch.cat(gradients))
    return total, metrics, gradient_nD.view_as(hidden_BTD)


def train_step(model: Llama4, optimizer, batches: list[Batch], term: Term, clip: float, slice_size: int,
               mesh: Mesh | None = None, workers: Workers | None = None) -> StepResult:  # fmt: skip
    """Runs one optimizer step over its micro-batches; the learning rate is already set.

    mesh: the processes that take the step together, each with its own rows; all numbers of the result are the step's.
    workers: threads that do the micro-batches side by side; None: one after the other.
    """
    own = model.share.of_batch if model.share is not None else lambda x: x
    valid, tokens = (sum(int(own(x).sum()) for x in each) for each in (
        [b.valid_BT for b in batches], [b.doc_ids_BT >= 0 for b in batches]))  # fmt: skip
    if mesh is not None:
        valid, tokens = (mesh.sum(torch.tensor([valid, tokens])) // mesh.layout.pp).tolist()
    sums: dict[str, Tensor] = {"loss": torch.zeros(())}
    routes = Routes(model)

    def add(loss: Tensor, metrics: dict[str, Tensor]) -> None:
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums.get(name, 0) + value

    def last_stage(batch: Batch, hidden_BTD: Tensor) -> Tensor:
        loss, metrics, gradient_BTD = loss_gradient(model, batch, hidden_BTD, term, max(valid, 1), slice_size)
        add(loss, metrics)
        return gradient_BTD

    def one(model: Llama4, batch: Batch):
        own_routes = Routes(model)
        with own_routes.watch():
            return accumulate_gradients(model, batch, term, max(valid, 1), slice_size), own_routes

    if model.pipeline is not None:
        model.pipeline.run(model, batches, last_stage, routes.watch)
    else:
        several = map(partial(one, model), batches) if workers is None else workers.run(one, batches)
        for measured, noted in several:
            add(*measured)
            routes.add(noted)
    if mesh is not None:
        sums = mesh.sum_named(sums)
        routes.gather(mesh)
    norm, parts = clip_gradients(model, clip, mesh)
    loss, grad_norm = float(sums.pop("loss")) / max(valid, 1), float(norm)
    skipped = not (math.isfinite(loss) and math.isfinite(grad_norm)) or not valid
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    measured = {name: float(value) / max(valid, 1) for name, value in sums.items()}
    measured |= {f"grad/{part}": value for part, value in parts.items()}
    measured |= router_metrics(routes.counts, routes.flips)
    return StepResult(loss, grad_norm, tokens, valid, skipped, measured, routes.counts, routes.seen)


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
    if total + 1e-6 > clip:  # else all gradients would be read and written to be multiplied by 1
        torch._foreach_mul_(gradients, torch.clamp(clip / (total + 1e-6), max=1.0))
    return total, {part: math.sqrt(square) for part, square in sorted(squares.items()) if square or not mesh}


def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds: its own memory, also of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
