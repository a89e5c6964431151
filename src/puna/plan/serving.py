"""A serving plan: weights, keys and values, and the decoding rate that the memory's bandwidth allows.

    weights     bf16, or routed (and, as integers, shared) experts in fp8, int8 or int4: the numbers `puna quantize` and
                `puna convert --to meta --fp8` write; tensor parallelism splits all but norms, routers, the vision tower
    cache       2 K d b (local layers x min(n, C) + global layers x n) a sequence of n tokens (engine/cache.py); heads
                are split over GPUs, and repeated beyond K of them
    a token of every sequence = the most of
                (weights touched + keys and values seen) / (bandwidth x decode_bandwidth)
                2 x active parameters x batch / FLOP/s
                + two all-reduces a layer
    touched     everything but the embedding, and of E experts E (1 - (1 - 1/E)^batch): with one sequence one of them
    dollars     GPUs x price / tokens; three quarters of the context are prompt, read at the rate of the matrix units

A bound: kernels that multiply integers as they are stored, no scheduling gaps. puna's own engine brings integers back
before it multiplies, on one device; over several GPUs vLLM serves its exports.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from puna.engine.cache import bytes_per_sequence
from puna.errors import PunaError
from puna.fields import nearest
from puna.model import ModelConfig
from puna.plan.flops import mean_keys, parameter_count, shapes
from puna.plan.hardware import Cluster
from puna.plan.memory import Fits, weight_bytes

SERVED = ("float32", "bf16", "fp8", "int8", "int4")  # the largest first
CACHES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "float32": torch.float32}
SLICE = 2048  # tokens of a prompt that are read at once


@dataclass(frozen=True)
class ServingWork:
    """What is to be served: `batch` sequences of `context` tokens at once; 0: as many as fit, up to 256."""

    context: int = 8192
    batch: int = 0
    precision: str = "bf16"
    cache: str = "bf16"

    def __post_init__(self):
        for option, value, valid in (("--precision", self.precision, SERVED), ("--cache", self.cache, CACHES)):
            if value not in valid:
                raise PunaError(f"{option} {value!r} is none of serving's: did you mean {nearest(value, valid)!r}? "
                                f"({', '.join(valid)})")  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Decoding `batch` sequences at once: seconds a token of all, what bounds it, and the price."""

    batch: int
    seconds: float
    bound: str
    dollars_output: float  # a million tokens that are written, their prompts' reading included
    dollars_blended: float  # a million tokens, read or written

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class ServingPlan(Fits):
    """Bytes on each of `gpus` GPUs."""

    precision: str
    cache: str
    gpus: int
    context: int
    batch: int
    weights: float  # of the whole model
    sequence: float  # keys and values of one sequence, of the whole model
    memory: dict[str, float]
    usable: float
    longest: int  # tokens of a single sequence that fit
    rates: list[Rate] = field(default_factory=list)


def serve(config: ModelConfig, cluster: Cluster, work: ServingWork) -> ServingPlan:
    """The plan of one precision on all GPUs of the cluster (tensor parallel)."""
    c, n = config, cluster.count
    if c.n_heads % n:
        raise PunaError(f"--gpus: tensor parallelism over {n} GPUs does not divide {c.n_heads} heads: plan one replica")
    split = whole = 0.0
    for name, shape in shapes(c).items():
        size = weight_bytes(c, work.precision, name, shape)
        if "norm" in name or "router" in name or name.startswith("vision."):
            whole += size
        else:
            split += size
    b = 4 if work.precision == "float32" else 2
    width = 2 * c.expert_width if c.moe_layers else 0
    widest = max(3 * width + 2 * c.d_model, 3 * c.dense_width * (len(c.moe_layers) < c.n_layers))
    qkv = (c.n_heads + 2 * c.n_kv_heads) * c.head_dim * 2
    memory = {
        "weights": split / n + whole,
        "cache": 0.0,
        "activations": b * min(SLICE, work.context) * (4 * c.d_model + max(widest, qkv) / n),
        "logits": 0.0,
    }
    heads = min(n, c.n_kv_heads)
    dtype = CACHES[work.cache]
    sequence = bytes_per_sequence(c, work.context, dtype)
    each = sequence / heads + 4 * c.vocab_size  # logits of a sequence, gathered
    free = cluster.gpu.usable - sum(memory.values())
    batch = work.batch or max(1, min(256, int(free // each)))
    memory |= {"cache": batch * sequence / heads, "logits": 4.0 * batch * c.vocab_size}
    made = ServingPlan(work.precision, work.cache, n, work.context, batch, split + whole, sequence, memory,
                       cluster.gpu.usable, _longest(c, free * heads, dtype))  # fmt: skip
    batches = sorted({1, *(k for k in (8, 32, 128) if k < batch), batch})
    return dataclasses.replace(made, rates=[_rate(c, cluster, work, k, heads) for k in batches] if made.fits else [])


def _longest(config: ModelConfig, free: float, dtype: torch.dtype) -> int:
    """Tokens of the longest sequence whose keys and values take no more than `free` bytes."""
    low, high = 0, config.max_context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_per_sequence(config, middle, dtype) <= free else (low, middle - 1)
    return low


def _rate(config: ModelConfig, cluster: Cluster, work: ServingWork, batch: int, heads: int) -> Rate:
    c, n, gpu = config, cluster.count, cluster.gpu
    met = c.n_experts * (1 - (1 - 1 / max(c.n_experts, 1)) ** batch) if c.moe_layers else 0
    read = 0.0
    for name, shape in shapes(c).items():
        if not name.startswith(("vision.", "tok_embeddings.")) or (name.startswith("tok_") and c.tie_embeddings):
            size = weight_bytes(c, work.precision, name, shape)
            read += size * met / c.n_experts if ".experts." in name else size
    seen = sum(work.context if c.is_nope(i) else mean_keys(work.context, c.chunk) for i in range(c.n_layers))
    read = read / n + batch * 2 * c.n_kv_heads / heads * c.head_dim * CACHES[work.cache].itemsize * seen
    kind = "fp32" if work.precision == "float32" else "bf16"
    active = 2 * parameter_count(c).active_without_embedding
    flops = n * gpu.flops(kind)
    limits = {
        "memory": read / (gpu.bandwidth * 1e9 * cluster.assumptions.decode_bandwidth),
        "compute": batch * (active + 4 * c.n_heads * c.head_dim * seen) / flops,
    }
    bound = max(limits, key=limits.get)
    sent = 2 * c.n_layers * 2 * (n - 1) / n * batch * c.d_model * 2
    links = cluster.seconds(sent, 2 * c.n_layers, n)
    seconds = limits[bound] + links
    prompt, output = 0.75 * work.context, 0.25 * work.context
    keys = sum(mean_keys(int(prompt) or 1, None if c.is_nope(i) else c.chunk) for i in range(c.n_layers))
    reading = prompt * (active + 4 * c.n_heads * c.head_dim * keys) / flops
    whole = reading + output * seconds / batch  # seconds of the GPUs a conversation takes
    dollars = n * gpu.price / 3600 * whole * 1e6
    return Rate(batch, seconds, bound if links < limits[bound] else "links", dollars / output, dollars / work.context)


def every_precision(work: ServingWork) -> list[ServingWork]:
    """The same work in bf16 and all that is smaller."""
    return [dataclasses.replace(work, precision=p) for p in SERVED if p != "float32"]


def precisions_that_fit(config: ModelConfig, cluster: Cluster, work: ServingWork) -> list[ServingPlan]:
    """The plan of every precision that fits on these GPUs, the largest first."""
    return [made for made in (serve(config, cluster, each) for each in every_precision(work)) if made.fits]


def smallest(config: ModelConfig, cluster: Cluster, work: ServingWork) -> ServingPlan | None:
    """The plan of the fewest GPUs that fits in the asked precision; None: no number that divides the heads does."""
    for n in range(1, config.n_heads + 1):
        if config.n_heads % n == 0:
            made = serve(config, dataclasses.replace(cluster, count=n), work)
            if made.fits:
                return made
    return None
