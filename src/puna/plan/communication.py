"""Bytes that one rank sends in a step, by what they are for.

Rings: to gather or to scatter-and-reduce S bytes over n ranks each sends (n - 1) / n S; to all-reduce, twice that; in
an all-to-all it sends what isn't for itself. Forward and backward of one micro-batch of t tokens on a rank, b bytes a
number:

    FSDP        gather b of every weight once or twice, reduce-scatter the gradients; experts over the ranks that `ep`
                leaves, everything else over dp_shard x cp
    HSDP        all-reduce of the rank's shard of the gradients over dp_replicate, once a step
    experts     a MoE layer: 2 b D (rows sent + rows received): tokens out, results back, the gradients of both; 8 bytes
                of counts an expert of other ranks. Balanced routing sends (ep - 1) / ep of t; `leaving` counts it from
                measured routes
    tensor      a layer: 8 (tp - 1) / tp b D t: sequence-parallel norms gather in front of attention and FFN and scatter
                behind them, and their gradients the other way round; embedding and head 4 more
    context     a global layer: keys and values of the other ranks, 2 K d b (cp - 1) t forward, as much of their
                gradients back; a local layer: nothing, chunks are whole
    pipeline    b D t for each border between stages, forward and back; sequence-parallel ranks send their part

A recomputed layer repeats its forward part. Shards are padded to equal size, as FSDP2 pads them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from puna.model import ModelConfig
from puna.plan.flops import shapes
from puna.plan.layout import Layout
from puna.plan.memory import Precision, Schedule, alike, stage_layers


@dataclass(frozen=True)
class Traffic:
    """All of a step's collectives of one kind: bytes a rank sends, calls, the group and how far apart its ranks are."""

    sent: float
    calls: int
    group: int
    stride: int
    exchange: bool = False


@lru_cache(maxsize=65536)
def shards(config: ModelConfig, layout: Layout, layers: tuple[int, ...], first: bool = True,
           last: bool = True) -> tuple[float, float]:  # fmt: skip
    """Numbers that a rank holds of (everything but experts, experts), padded: matrices are cut along their first
    dimension, experts along the input of each."""
    plain = experts = 0.0
    for i, name, shape in _placed(config):
        if i not in layers if i >= 0 else not (last if name.startswith(("output.", "norm.")) else first):
            continue
        split = 1 if "norm" in name or "router" in name or name.startswith("vision.") else layout.tp
        if ".experts." in name:
            experts += shape[0] // layout.ep * math.ceil(shape[1] / layout.expert_shard) * shape[2] / split
        else:
            plain += math.ceil(shape[0] / split / layout.shard) * math.prod(shape[1:])
    return plain, experts


@lru_cache(maxsize=16)
def _placed(config: ModelConfig) -> list[tuple[int, str, tuple[int, ...]]]:
    """(layer or -1, name, shape) of every parameter."""
    found = shapes(config).items()
    return [(int(n.split(".")[1]) if n.startswith("layers.") else -1, n, shape) for n, shape in found]


def fsdp(plain: float, experts: float, layout: Layout, gathers: int, reduces: int, b: int,
         gradient: int) -> tuple[float, float]:  # fmt: skip
    """Bytes a rank sends to gather weights and to reduce gradients: the same for (everything but experts, experts),
    whose shards (numbers a rank holds) are `plain` and `experts`."""
    each = gathers * b + reduces * gradient
    return (layout.shard - 1) * plain * each, (layout.expert_shard - 1) * experts * each


def hsdp(numbers: float, layout: Layout, gradient: int) -> float:
    """Bytes a rank sends to all-reduce the gradients of its shard, once."""
    return 2 * (layout.dp_replicate - 1) / layout.dp_replicate * numbers * gradient


def expert_rows(config: ModelConfig, sent: float, received: float, b: int, forwards: int = 1) -> float:
    """Bytes a rank sends for one MoE layer's rows, forward and back."""
    return (forwards + 1) * (sent + received) * b * config.d_model


def expert_counts(config: ModelConfig, layout: Layout) -> float:
    """Bytes a rank sends to tell the others how many rows will come."""
    return 8 * config.n_experts * (layout.ep - 1) / layout.ep


def leaving(counts_RE: Sequence[Sequence[int]], ep: int) -> list[tuple[int, int]]:  # noqa: N803 - shapes
    """(rows sent, rows received) of every rank of an expert group, from how many of its tokens each rank routed to each
    expert; rank r holds experts r E / ep to (r + 1) E / ep."""
    own = len(counts_RE[0]) // ep
    to = [[sum(row[k * own : (k + 1) * own]) for k in range(ep)] for row in counts_RE]
    return [(sum(to[r]) - to[r][r], sum(to[k][r] for k in range(ep)) - to[r][r]) for r in range(ep)]


def tensor(
    config: ModelConfig, layout: Layout, tokens: float, b: int, layers: int, forwards: int = 1, ends: int = 2
) -> float:
    """Bytes a rank sends for `layers` layers and `ends` of embedding and head."""
    each = (layout.tp - 1) / layout.tp * b * config.d_model * tokens
    return each * (4 * (forwards + 1) * layers + 2 * ends)


def context(config: ModelConfig, layout: Layout, tokens: float, b: int, global_layers: int, forwards: int = 1) -> float:
    """Bytes a rank sends for keys, values and their gradients; `tokens` are the rank's own."""
    each = 2 * config.n_kv_heads / layout.tp * config.head_dim * b * (layout.cp - 1) * tokens
    return (forwards + 1) * each * global_layers


def pipeline(config: ModelConfig, layout: Layout, tokens: float, b: int, interleave: int = 1) -> float:
    """Bytes a rank in the middle sends."""
    return 2 * interleave * b * config.d_model * tokens / layout.tp if layout.pp > 1 else 0.0


def step(config: ModelConfig, layout: Layout, schedule: Schedule, precision: Precision, seq_len: int,
         stage: int = 0) -> dict[str, Traffic]:  # fmt: skip
    """All that a rank of a stage sends in a step, balanced routing times `schedule.imbalance`."""
    c, s, b, m = config, schedule, precision.compute, schedule.micros
    layers = stage_layers(c, layout.pp, s.interleave, stage)
    first, last = stage == 0, stage == layout.pp - 1
    tokens = s.rows * seq_len / layout.cp
    groups = alike(c, layout.pp, s.interleave, stage, s.recompute)
    every = {1 + g.again: sum(x.count for x in groups if x.again == g.again) for g in groups}  # forwards: layers
    moe, nope = ({f: sum(x.count for x in groups if 1 + x.again == f and kind(x.layer)) for f in every}
                 for kind in (c.is_moe, c.is_nope))  # fmt: skip
    gathers, reduces = {"forward": (2 * m, m), "backward": (m, m), "step": (1, 1)}[s.reshard]
    plain, experts = shards(c, layout, layers, first, last)
    dense, routed = fsdp(plain, experts, layout, gathers, reduces, b, precision.gradient)
    calls = (len(layers) + first + last) * (gathers + reduces)
    rows = tokens * (layout.ep - 1) / layout.ep * s.imbalance
    experts_sent = sum(n * (expert_rows(c, rows, rows, b, f) + f * expert_counts(c, layout)) for f, n in moe.items())
    tensor_sent = sum(tensor(c, layout, tokens, b, n, f, 0) for f, n in every.items())
    tensor_sent += tensor(c, layout, tokens, b, 0, 1, first + last)
    context_sent = sum(context(c, layout, tokens, b, n, f) for f, n in nope.items())
    found = {
        "FSDP": Traffic(dense, calls, layout.shard, layout.tp),
        "FSDP experts": Traffic(routed, sum(moe.values()) * (gathers + reduces), layout.expert_shard,
                                layout.tp * layout.ep),
        "HSDP": Traffic(hsdp(plain + experts, layout, precision.gradient), len(layers), layout.dp_replicate,
                        layout.tp * layout.shard),
        "experts": Traffic(m * experts_sent, m * sum(n * (2 + 3 * f) for f, n in moe.items()), layout.ep, layout.tp,
                           exchange=True),
        "tensor": Traffic(m * tensor_sent, m * sum(4 * n * (1 + f) for f, n in every.items()), layout.tp, 1),
        "context": Traffic(m * context_sent, m * sum(n * (1 + f) for f, n in nope.items()), layout.cp, layout.tp),
        "pipeline": Traffic(m * pipeline(c, layout, tokens, b, s.interleave), 2 * m * s.interleave, layout.pp,
                            layout.world // layout.pp),
    }  # fmt: skip
    return {name: traffic for name, traffic in found.items() if traffic.group > 1 and traffic.sent}
