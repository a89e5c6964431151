"""A training plan: memory, communication, time and dollars of one layout, and the search for the fastest that fits.

    micro-batch   of a pipeline rank: FLOPs of its layers (forward, backward, what is recomputed) / (peak x mfu),
                  or what the busiest expert rank makes of them, + exchanges that are waited for
    step          (m + (pp - 1) / v) micro-batches of the slowest stage (1F1B's bubble: arXiv 2104.04473 §2.2)
                  + FSDP and HSDP beyond what hides behind `overlap` of the computing
                  + the optimizer: its numbers read and written once, at the memory's bandwidth

Attention counts its exact causal keys, chunked in local layers. The mfu of `hardware.toml` is what layers reach while
nothing is waited for; the plan's own MFU is model FLOPs, none of them recomputed, over peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from puna.errors import PunaError
from puna.fields import nearest
from puna.model import ModelConfig
from puna.parallel.layout import Layout
from puna.plan import communication
from puna.plan.communication import Traffic
from puna.plan.flops import flops_per_tile, flops_per_token, mean_keys, parameter_count
from puna.plan.hardware import Cluster
from puna.plan.layout import layouts
from puna.plan.memory import PRECISIONS, Fits, Schedule, alike, fullest, training_memory


@dataclass(frozen=True)
class Work:
    """What is to be trained: rows of `seq_len` tokens, about `batch` of them a step."""

    seq_len: int = 8192
    batch: int = 2048
    precision: str = "mixed"
    tiles: float = 0.0
    slice: int = 1024
    imbalance: float = 1.0

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise PunaError(f"--precision {self.precision!r} is none of training's: did you mean "
                            f"{nearest(self.precision, PRECISIONS)!r}? ({', '.join(PRECISIONS)})")  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan(Fits):
    """Numbers of one layout; bytes and seconds, on the fullest and the slowest rank."""

    layout: Layout
    schedule: Schedule
    precision: str
    gpus: int
    rows: int  # of a step, after rounding up to whole micro-batches
    tokens: int  # of a step
    memory: dict[str, float]
    usable: float
    traffic: dict[str, Traffic]
    seconds: dict[str, float] = field(default_factory=dict)
    mfu: float = 0.0
    price: float = 0.0  # $ a GPU-hour

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 86400

    def dollars(self, tokens: float) -> float:
        return self.days(tokens) * 24 * self.gpus * self.price


@lru_cache(maxsize=65536)
def stage_flops(config: ModelConfig, pp: int, interleave: int, stage: int, seq_len: int, recompute: int,
                imbalance: float) -> float:  # fmt: skip
    """FLOPs for one token of what a stage computes, forward and backward, recomputed layers once more."""
    c, total = config, 6.0 * (config.vocab_size + 1) * config.d_model * (stage == pp - 1)
    for like in alike(c, pp, interleave, stage, recompute):
        keys = mean_keys(seq_len, None if c.is_nope(like.layer) else c.chunk)
        numbers = like.size.split + like.size.whole + like.size.expert * imbalance
        total += like.count * (4 if like.again else 3) * (2 * numbers + 4 * c.n_heads * c.head_dim * keys)
    return total


def _fit(config: ModelConfig, cluster: Cluster, work: Work, layout: Layout, schedule: Schedule) -> TrainingPlan:
    """A plan's memory; its time is not known yet."""
    micros = -(-work.batch // (layout.rows * schedule.rows))
    if layout.pp_chunks > 1:
        micros = -(-micros // layout.pp) * layout.pp
    schedule = dataclasses.replace(
        schedule, micros=micros, slice=work.slice, tiles=work.tiles, imbalance=work.imbalance
    )
    memory = training_memory(config, layout, schedule, PRECISIONS[work.precision], work.seq_len)
    rows = layout.rows * schedule.rows * micros
    return TrainingPlan(layout, schedule, work.precision, cluster.count, rows, rows * work.seq_len, memory,
                        cluster.gpu.usable, {}, price=cluster.gpu.price)  # fmt: skip


def _timed(config: ModelConfig, cluster: Cluster, work: Work, made: TrainingPlan) -> TrainingPlan:
    c, layout, s, precision = config, made.layout, made.schedule, PRECISIONS[work.precision]
    rate = cluster.gpu.flops(precision.rate)
    per_token = max(
        stage_flops(c, layout.pp, layout.pp_chunks, stage, work.seq_len, s.recompute, s.imbalance)
        for stage in fullest(layout)
    )
    tiles = flops_per_tile(c) * s.tiles * s.rows / layout.cp / layout.tp if c.vision else 0.0
    compute = (per_token * s.rows * work.seq_len / layout.cp / layout.tp + tiles) / rate  # of one micro-batch
    traffic = communication.step(c, layout, s, precision, work.seq_len, min(1, layout.pp - 1))
    took = {n: cluster.seconds(t.sent, t.calls, t.group, t.stride, t.exchange) for n, t in traffic.items()}
    hide = cluster.assumptions
    waits = sum(took.get(name, 0.0) for name in ("experts", "tensor", "context", "pipeline")) / s.micros
    waits = max(0.0, waits - hide.overlap_exchange * compute)
    weights = sum(took.get(name, 0.0) for name in ("FSDP", "FSDP experts", "FSDP rest", "HSDP"))
    bubble = (layout.pp - 1) / layout.pp_chunks * (compute + waits)
    numbers = made.memory["parameters"] / precision.master
    touched = 2 * (precision.master + precision.moments) + precision.gradient
    seconds = {
        "compute": compute * s.micros,
        "exchanges": waits * s.micros,
        "bubble": bubble,
        "weights": max(0.0, weights - hide.overlap * compute * s.micros),
        "optimizer": numbers * touched / (cluster.gpu.bandwidth * 1e9),
    }
    useful = flops_per_token(c, work.seq_len) * made.tokens + flops_per_tile(c) * s.tiles * made.rows
    peak = getattr(cluster.gpu, precision.rate) * 1e12 * cluster.count
    return dataclasses.replace(made, traffic=traffic, seconds=seconds, mfu=useful / sum(seconds.values()) / peak)


def used(cluster: Cluster) -> list[int]:
    """How many of the GPUs a layout may use: all, or the multiples of 2, 4, 8 ... nodes that leave at most one in ten
    as spares. Numbers such as 32,000 have factors that no dimension of a model has."""
    sizes = {cluster.count, *(cluster.count // m * m for m in (cluster.gpu.node * 2**k for k in range(1, 16)))}
    return sorted((n for n in sizes if n >= 0.9 * cluster.count), reverse=True)


def candidates(config: ModelConfig, cluster: Cluster, work: Work, fixed: Layout | None = None,
               recompute: int | None = None) -> Iterator[TrainingPlan]:  # fmt: skip
    """Plans that are worth timing: of every layout and micro-batch the one that fits with the least recomputed; of a
    layout in which nothing fits, the smallest one."""
    levels = (0, 4, 2, 1) if recompute is None else (recompute,)
    worlds = [] if fixed else used(cluster)
    for layout in [fixed] if fixed else (x for n in worlds for x in layouts(config, n, work.seq_len, cluster.gpu.node)):
        for rows in (1, 2, 4):
            turn = rows * layout.rows * (layout.pp if layout.pp_chunks > 1 else 1)  # rows come in multiples of it
            if -(-work.batch // turn) * turn > 1.25 * work.batch and not fixed:
                break
            smallest = _fit(config, cluster, work, layout, Schedule(rows, recompute=levels[-1]))
            if not smallest.fits:
                yield smallest
                break
            for again in levels:
                made = _fit(config, cluster, work, layout, Schedule(rows, recompute=again))
                if made.fits:
                    yield made
                    break


def suggest(config: ModelConfig, cluster: Cluster, work: Work, fixed: Layout | None = None,
            recompute: int | None = None, count: int = 5) -> list[TrainingPlan]:  # fmt: skip
    """The fastest plans that fit, one a layout, by predicted time a token; where none fits, the one that misses least.
    PunaError: no layout of so many ranks suits the model."""
    best: dict[Layout, TrainingPlan] = {}
    least = None
    for made in candidates(config, cluster, work, fixed, recompute):
        if made.fits:
            made = _timed(config, cluster, work, made)
            old = best.get(made.layout)
            if old is None or made.tokens_per_second > old.tokens_per_second:
                best[made.layout] = made
        elif least is None or made.used < least.used:
            least = made
    if best:
        return sorted(best.values(), key=lambda made: -made.tokens_per_second)[:count]
    if least is None:
        raise PunaError(f"no layout of {cluster.count} ranks can share {work.batch} rows a step: use fewer GPUs or a "
                        "larger --batch")  # fmt: skip
    return [_timed(config, cluster, work, least)]


def smallest(config: ModelConfig, cluster: Cluster, work: Work, limit: int = 65536) -> TrainingPlan | None:
    """The plan of the fewest whole nodes that fits; None: not within `limit` GPUs."""
    gpu, kind = cluster.gpu, PRECISIONS[work.precision]
    state = parameter_count(config).total * (kind.master + kind.gradient + kind.moments)
    fewest = max(cluster.count + 1, state / gpu.usable)
    sizes = [n for n in (gpu.node * k * 2**e for e in range(16) for k in (1, 3)) if fewest <= n <= limit]
    for n in sorted(sizes):
        larger = dataclasses.replace(cluster, count=n)
        wide = dataclasses.replace(work, batch=max(work.batch, n))
        if any(made.fits for made in candidates(config, larger, wide)):
            return suggest(config, larger, wide, count=1)[0]
    return None


def precisions_that_fit(config: ModelConfig, cluster: Cluster, work: Work) -> list[TrainingPlan]:
    """The best plan of every other precision that fits on these GPUs and that they can multiply in."""
    found = []
    for name, precision in PRECISIONS.items():
        if name != work.precision and getattr(cluster.gpu, precision.rate):
            found += suggest(config, cluster, dataclasses.replace(work, precision=name), count=1)
    return [made for made in found if made.fits]
