"""Where the bytes of a training step are, on the fullest rank.

    parameters    master weights, each rank its shard: fp32 in "mixed" and "fp8"
    gradients     of that shard, in the type they are summed in
    optimizer     AdamW's two moments of that shard
    gathered      weights in the type that multiplies: FSDP's unsharded layers and the gradient of one of them; on one
                  rank the copies that autograd keeps of all matrices
    activations   what the backward pass keeps of all micro-batches in flight, and one layer recomputed
    hidden, head  the last hidden states, their gradients; a slice of the loss: logits in fp32 and their log-softmax
    working       the widest layer's gradients while its backward runs

Activations, bytes a token and layer, b the bytes of the type that multiplies, from what each operation saves:

    norm          (8 + b) D: its input and quotient in fp32, its output; a frozen one keeps (4 + b) D
    attention     local b (3 H + 3 K) d, and 4 (H + K) d for the QK-norm; global b (3 H + 2 K) d
    MoE           16/2 b F of each SwiGLU (gate and up, silu of gate, product), routed and shared; b D sorted tokens;
                  the router's input in fp32, 4 D, where b is not 4
    dense         8/2 b F'

D, F, F', H, K, d: widths and heads of the configuration. Tensor parallelism divides all but each sublayer's gathered
input. `tests/unit/test_plan_memory.py` holds this against what autograd saves and against the peak of resident memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from puna.model import ModelConfig
from puna.model.config import VisionConfig
from puna.plan.flops import shapes
from puna.plan.layout import Layout
from puna.precision.quantized import EXPERTS, SCHEMES


@dataclass(frozen=True)
class Precision:
    """Bytes a number: master weight, gradient, both moments, products; `rate`: which units of a GPU multiply."""

    master: int
    gradient: int
    moments: int
    compute: int
    rate: str


PRECISIONS = {
    "mixed": Precision(4, 4, 8, 2, "bf16"),
    "fp8": Precision(4, 4, 8, 2, "fp8"),
    "bfloat16": Precision(2, 2, 4, 2, "bf16"),
    "float32": Precision(4, 4, 8, 4, "fp32"),
}
RESHARD = ("forward", "backward", "step")


@dataclass(frozen=True)
class Schedule:
    """How a step is run.

    rows: in a micro-batch. micros: micro-batches of a step on each rank. recompute: every n-th layer keeps its input
    alone and runs forward twice (0: none, 1: all). reshard: FSDP drops gathered weights after the "forward" (gathers
    twice a micro-batch), after the "backward" (once), or at the end of the "step" (once a step, and whole gradients
    are kept until then). interleave: stages that a pipeline rank holds. slice: positions of the loss at once.
    tiles: pictures' tiles in a row. imbalance: tokens of the busiest expert rank over the mean.
    """

    rows: int = 1
    micros: int = 1
    recompute: int = 0
    reshard: str = "backward"
    interleave: int = 1
    slice: int = 1024
    tiles: float = 0.0
    imbalance: float = 1.0


def kept(
    config: ModelConfig, layer: int, b: int = 2, tp: int = 1, imbalance: float = 1.0, frozen: bool = False
) -> float:
    """Bytes a token that the backward pass keeps of one layer; frozen: adapters are all that is trained."""
    c, d, heads = config, config.head_dim, config.n_heads + config.n_kv_heads
    norm = 4 * c.d_model + (0 if frozen else 4 * c.d_model)
    if c.is_nope(layer):
        attention = b * (3 * c.n_heads + 2 * c.n_kv_heads) * d
    else:
        attention = (3 * b + 4 * c.qk_norm) * heads * d
    split, whole = 2 * norm + attention, 2 * b * c.d_model
    if c.is_moe(layer):
        routed = 4 * b * c.expert_width
        whole += b * c.d_model * imbalance + (0 if frozen or b == 4 else 4 * c.d_model)
        split += routed * (1 + imbalance)
    else:
        split += 4 * b * c.dense_width
    return split / tp + whole


def kept_by_tile(v: VisionConfig, b: int = 2) -> float:
    """Bytes a tile that the backward pass keeps of the vision tower: 8 W + 2 W' a place and layer (two norms' inputs
    and outputs; q, k, v and what attention gives; the MLP before and after its GELU), and what stands around them."""
    places, folded = v.patches + 1, v.width * v.shuffle**2
    layers = v.layers * (8 * v.width + 2 * v.mlp_width) * places
    around = 3 * v.patch_size**2 * v.patches + 3 * v.width * places
    return b * (layers + around + (folded + 4 * v.adapter_width) * v.tokens_per_tile)


def working(config: ModelConfig, layer: int, b: int = 2, tp: int = 1, imbalance: float = 1.0) -> float:
    """Bytes a token of gradients that live at once inside a layer's backward, beyond what was kept and is gone by then:
    of silu(gate), up and the product; of the layer's input from everything that reads it."""
    moe = config.is_moe(layer)
    width = config.expert_width * imbalance if moe else config.dense_width
    return b * (3 * width / tp + (7 if moe else 3) * config.d_model)


def head_slice(rows: int, vocab: float) -> float:
    """Bytes of one slice of the loss: logits in fp32 and their log-softmax, over which the gradient is written."""
    return 8 * rows * vocab


def weight_bytes(config: ModelConfig, precision: str, name: str, shape: tuple[int, ...]) -> float:
    """Bytes of one parameter as it is stored, scales included; "bf16", "float32", or experts alone in "fp8" (as `puna
    convert --to meta --fp8` writes them: not those of the first and last layer), "int8", "int4" (`puna quantize`)."""
    n = math.prod(shape)
    if precision in SCHEMES and any(fnmatchcase(name, pattern) for pattern in EXPERTS):
        scheme = SCHEMES[precision]
        return n * scheme.BITS / 8 + 4 * math.prod(scheme.shapes(shape)[1])
    if precision == "fp8" and ".moe.experts." in name and 0 < int(name.split(".")[1]) < config.n_layers - 1:
        return n + 4 * shape[0] * shape[2]  # a float32 scale for every output of every expert
    return n * (4 if precision == "float32" else 2)


@dataclass(frozen=True)
class LayerSize:
    """Numbers of one layer: what tensor parallelism splits, what it repeats (norms, router), one expert's matrices."""

    split: int
    whole: int
    expert: int


@lru_cache(maxsize=4096)
def layer_size(config: ModelConfig, layer: int) -> LayerSize:
    split = whole = expert = 0
    for name, shape in shapes(config).items():
        if name.startswith(f"layers.{layer}."):
            n = math.prod(shape)
            if ".experts." in name:
                expert += n // config.n_experts
            elif "norm" in name or "router" in name:
                whole += n
            else:
                split += n
    return LayerSize(split, whole, expert)


@lru_cache(maxsize=64)
def ends(config: ModelConfig) -> tuple[int, int, int]:
    """Numbers of the embedding, the head with the last norm, the vision tower."""
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    vision = sum(n for name, n in sizes.items() if name.startswith("vision."))
    return sizes["tok_embeddings.weight"], sizes.get("output.weight", 0) + sizes["norm.weight"], vision


@dataclass(frozen=True)
class Like:
    """Layers of a stage that are alike: one of them, how many, and whether they are recomputed."""

    layer: int
    count: int
    again: bool
    size: LayerSize


@lru_cache(maxsize=8192)
def stage_layers(config: ModelConfig, pp: int, interleave: int, stage: int) -> tuple[int, ...]:
    """Layers of a pipeline rank: `interleave` runs of neighbours."""
    size = config.n_layers // (pp * interleave)
    starts = ((turn * pp + stage) * size for turn in range(interleave))
    return tuple(i for start in starts for i in range(start, start + size))


@lru_cache(maxsize=8192)
def alike(config: ModelConfig, pp: int, interleave: int, stage: int, recompute: int) -> tuple[Like, ...]:
    """The layers of a stage, those together that differ in nothing a plan counts."""
    groups: dict[tuple, list[int]] = {}
    for n, i in enumerate(stage_layers(config, pp, interleave, stage)):
        again = recompute > 0 and n % recompute == 0
        groups.setdefault((config.is_moe(i), config.is_nope(i), again), []).append(i)
    return tuple(Like(g[0], len(g), key[2], layer_size(config, g[0])) for key, g in groups.items())


def in_flight(layout: Layout, schedule: Schedule, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved 1F1B (arXiv 2104.04473 §2.2)."""
    v, ahead = schedule.interleave, layout.pp - stage - 1
    warm = ahead + 1 if v == 1 else (2 * ahead + (v - 1) * layout.pp + 1) / v
    return min(schedule.micros, warm)


def held(
    config: ModelConfig, layout: Layout, layers: tuple[Like, ...], first: bool, last: bool
) -> tuple[float, float, float]:
    """Numbers of a stage's weights: (a rank's shard, all of a rank's once gathered, the largest unit gathered)."""
    share = whole = unit = 0.0
    for like in layers:
        plain = like.size.split / layout.tp + like.size.whole
        mine = like.size.expert * config.n_experts / layout.ep / layout.tp
        share += like.count * (plain / layout.shard + mine / layout.expert_shard)
        whole, unit = whole + like.count * (plain + mine), max(unit, plain + mine)
    embedding, head, vision = ends(config)
    for n in (embedding / layout.tp, vision) * first + (head / layout.tp,) * last:
        share, whole, unit = share + n / layout.shard, whole + n, max(unit, n)
    return share, whole, unit


def training_memory(config: ModelConfig, layout: Layout, schedule: Schedule, precision: Precision, seq_len: int,
                    stage: int | None = None) -> dict[str, float]:  # fmt: skip
    """Bytes by part on the fullest rank of a stage (of all stages: None) at the fullest moment of a step."""
    if stage is None:
        found = [training_memory(config, layout, schedule, precision, seq_len, s) for s in fullest(layout)]
        return max(found, key=lambda parts: sum(parts.values()))
    c, b, s, tp = config, precision.compute, schedule, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    layers = alike(c, layout.pp, s.interleave, stage, s.recompute)
    share, whole, unit = held(c, layout, layers, first, last)
    tokens = s.rows * seq_len / layout.cp
    parts = {"parameters": precision.master * share, "gradients": precision.gradient * share,
             "optimizer": precision.moments * share, "activations": 0.0}  # fmt: skip
    flight, again, parts["working"] = in_flight(layout, s, stage), 0.0, 0.0
    for like in layers:
        each = kept(c, like.layer, b, tp, s.imbalance)
        again = max(again, each * like.again)
        parts["activations"] += flight * tokens * like.count * (b * c.d_model / tp if like.again else each)
        parts["working"] = max(parts["working"], tokens * working(c, like.layer, b, tp, s.imbalance))
    parts["activations"] += tokens * again
    if first and c.vision and s.tiles:
        parts["activations"] += flight * s.rows * s.tiles * kept_by_tile(c.vision, b)
    if layout.shard > 1:
        parts["gathered"] = {
            "forward": 2 * b * unit + (b + precision.gradient) * unit,
            "backward": b * whole + (b + precision.gradient) * unit,
            "step": (b + precision.gradient) * whole,
        }[s.reshard]
    elif b != precision.master:
        copied = [x.count * (x.size.split + x.size.expert * c.n_experts) for x in layers if not x.again]
        parts["gathered"] = b * (sum(copied) / tp or unit)
    if last:
        parts["head"] = head_slice(min(s.slice, tokens), c.vocab_size / tp)
        parts["hidden"] = tokens * c.d_model * ((8 + b) / tp + 3 * b)
    if layout.world > 1 or s.micros > 1:
        return parts
    return _fullest_moment(c, parts, s, precision, tokens)


def _fullest_moment(config: ModelConfig, parts: dict[str, float], schedule: Schedule, precision: Precision,
                    tokens: float) -> dict[str, float]:  # fmt: skip
    """One rank and one micro-batch: gradients come while activations go, so they are never whole together. Returns the
    parts at the head, behind some layer's backward, or in the optimizer, whichever is most."""
    c, b, every = config, precision.compute, schedule.recompute
    made = precision.gradient * ends(c)[1]  # the head's
    none = dict.fromkeys(parts.keys() - {"parameters", "gradients", "optimizer"}, 0.0)
    moments = [parts | {"gradients": made, "working": 0.0}, parts | none]
    left = parts["activations"]
    for i in reversed(range(c.n_layers)):
        size = layer_size(c, i)
        made += precision.gradient * (size.split + size.whole + size.expert * c.n_experts)
        now = {"gradients": made, "activations": left, "working": tokens * working(c, i, b), "head": 0.0, "hidden": 0.0}
        if "gathered" in parts:
            now["gathered"] = parts["gathered"] * (i + 1) / c.n_layers
        moments.append(parts | now)
        left -= tokens * (b * c.d_model if every and i % every == 0 else kept(c, i, b))
    return max(moments, key=lambda each: sum(each.values()))


def fullest(layout: Layout) -> tuple[int, ...]:
    """The stages that can be the fullest: the first has the embedding and most in flight, the last has the head."""
    return tuple(sorted({0, min(1, layout.pp - 1), layout.pp - 1}))
