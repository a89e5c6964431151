"""Bytes that one rank sends in a step, by what they are for.

Rings: to gather or to scatter-and-reduce S bytes over n ranks each sends (n - 1) / n S; to all-reduce, twice that; in
an all-to-all it sends what isn't for itself. Forward and backward of one micro-batch of t tokens on a rank, b bytes a
number; FSDP and HSDP in a pipeline once a step, for all its micro-batches (parallel/pipeline.py):

    FSDP        gather b of every matrix twice, in a pipeline once, and reduce-scatter its gradient in fp32: attention
                and dense or shared FFN over dp_shard x cp, experts over copy / ep; as stored, over the whole copy,
                norms, routers, the vision tower, and what is gathered once: embedding, head and last norm
    HSDP        all-reduce of the rank's shard of the gradients over dp_replicate
    experts     a MoE layer: 2 b D (rows sent + rows received): tokens out, results back, the gradients of both; 8 bytes
                of counts an expert of other ranks. Balanced routing sends (ep - 1) / ep of a rank's t / tp tokens;
                `leaving` counts it from measured routes
    tensor      a layer: 8 (tp - 1) / tp b D t, recomputed 11: gathered in front of attention and FFN, scattered behind
                them, and the gradients the other way round
    context     a global layer: keys and values to the other ranks, 2 K / tp d b (cp - 1) t forward, as much of their
                gradients back; a local layer: nothing, chunks are whole
    pipeline    b D t / tp forward behind each run of blocks but the last, and back before each but the first

copy = dp_shard x cp x tp. A recomputed layer repeats its forward part, but for tp's last scattering, whose result
nobody needs again. Shards are padded to equal size, as FSDP2 pads them. Left out: sums of a few numbers (loss, norm,
routes), features of pictures. All this equals what benchmarks/scaling.py counts, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from puna.model import ModelConfig
from puna.parallel.layout import Layout
from puna.plan.memory import Precision, Schedule, alike, shards, stage_layers, tower_shard


@dataclass(frozen=True)
class Traffic:
    """All of a step's collectives of one kind: bytes a rank sends, calls, the group and how far apart its ranks are."""

    sent: float
    calls: int
    group: int
    stride: int
    exchange: bool = False


def fsdp(held: dict[str, int], layout: Layout, micros: int, precision: Precision) -> dict[str, float]:
    """Bytes a rank sends to gather weights and to reduce gradients, by kind of unit; `held`: what `shards` returns."""
    times = reductions(layout, micros)
    gathers = times * (2 if layout.pp == 1 else 1)
    dense, spread = layout.dp_shard * layout.cp, layout.copy // layout.ep
    matrix = gathers * precision.compute + times * max(4, precision.gradient)
    return {
        "matrices": (dense - 1) * held["matrices"] * matrix,
        "experts": (spread - 1) * held["experts"] * matrix,
        "rest": (layout.copy - 1) * held["rest"] * (gathers * precision.master + times * precision.gradient),
        "root": (layout.copy - 1) * held["root"] * times * (precision.master + precision.gradient),
    }


def reductions(layout: Layout, micros: int) -> int:
    """How often a step reduces gradients: after every micro-batch, in a pipeline once."""
    return micros if layout.pp == 1 else 1


def hsdp(held: dict[str, int], layout: Layout, micros: int, precision: Precision) -> float:
    """Bytes a rank sends to all-reduce the gradients of its shard."""
    matrices = held["matrices"] + held["experts"]
    size = matrices * max(4, precision.gradient) + (held["rest"] + held["root"]) * precision.gradient
    return 2 * (layout.dp_replicate - 1) / layout.dp_replicate * size * reductions(layout, micros)


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


def tensor(config: ModelConfig, layout: Layout, tokens: float, b: int, layers: int, forwards: int = 1) -> float:
    """Bytes a rank sends for `layers` layers."""
    return (layout.tp - 1) / layout.tp * b * config.d_model * tokens * (5 + 3 * forwards) * layers


def context(config: ModelConfig, layout: Layout, tokens: float, b: int, global_layers: int, forwards: int = 1) -> float:
    """Bytes a rank sends for keys, values and their gradients; `tokens` are the rank's own."""
    each = 2 * config.n_kv_heads / layout.tp * config.head_dim * b * (layout.cp - 1) * tokens
    return (forwards + 1) * each * global_layers


def borders(layout: Layout, stage: int) -> int:
    """Messages that a rank of a stage sends for a micro-batch: activations on, gradients back."""
    return 2 * layout.pp_chunks - (stage == 0) - (stage == layout.pp - 1)


def step(config: ModelConfig, layout: Layout, schedule: Schedule, precision: Precision, seq_len: int,
         stage: int = 0) -> dict[str, Traffic]:  # fmt: skip
    """All that a rank of a stage sends in a step, balanced routing times `schedule.imbalance`."""
    c, s, b, m = config, schedule, precision.compute, schedule.micros
    layers = stage_layers(c.n_layers, layout.pp, layout.pp_chunks, stage)
    tokens = s.rows * seq_len / layout.cp
    groups = alike(c, layout.pp, layout.pp_chunks, stage, s.recompute)
    every = {1 + g.again: sum(x.count for x in groups if x.again == g.again) for g in groups}  # forwards: layers
    moe, nope = ({f: sum(x.count for x in groups if 1 + x.again == f and kind(x.layer)) for f in every}
                 for kind in (c.is_moe, c.is_nope))  # fmt: skip
    own = shards(c, layout, groups, stage == 0, stage == layout.pp - 1)
    tower = c.vision.layers + 1 if c.vision and s.tiles and stage == 0 else 0  # units; without pictures it rests
    if not tower:
        own["rest"] -= tower_shard(c, layout.copy, stage == 0)
    weights = fsdp(own, layout, m, precision)
    times = reductions(layout, m)
    calls = times * (3 if layout.pp == 1 else 2)  # of each unit
    rows = tokens / layout.tp * (layout.ep - 1) / layout.ep * s.imbalance
    experts_sent = sum(n * (expert_rows(c, rows, rows, b, f) + f * expert_counts(c, layout)) for f, n in moe.items())
    tensor_sent = sum(tensor(c, layout, tokens, b, n, f) for f, n in every.items())
    context_sent = sum(context(c, layout, tokens, b, n, f) for f, n in nope.items())
    found = {
        "FSDP": Traffic(weights["matrices"], 2 * len(layers) * calls, layout.dp_shard * layout.cp, layout.tp),
        "FSDP experts": Traffic(weights["experts"], sum(moe.values()) * calls, layout.copy // layout.ep, layout.ep),
        "FSDP rest": Traffic(weights["rest"] + weights["root"], (len(layers) + tower) * calls + 2 * times,
                             layout.copy, 1),
        "HSDP": Traffic(hsdp(own, layout, m, precision), (3 * len(layers) + sum(moe.values()) + tower + 1) * times,
                        layout.dp_replicate, layout.copy),
        "experts": Traffic(m * experts_sent, m * sum(n * (2 + 3 * f) for f, n in moe.items()), layout.ep, 1,
                           exchange=True),
        "tensor": Traffic(m * tensor_sent, m * sum(n * (5 + 3 * f) for f, n in every.items()), layout.tp, 1),
        "context": Traffic(m * context_sent, m * sum(2 * n * (1 + f) for f, n in nope.items()), layout.cp, layout.tp),
        "pipeline": Traffic(m * borders(layout, stage) * b * c.d_model * tokens / layout.tp, m * borders(layout, stage),
                            layout.pp, layout.world // layout.pp),
    }  # fmt: skip
    return {name: traffic for name, traffic in found.items() if traffic.group > 1 and traffic.sent}
