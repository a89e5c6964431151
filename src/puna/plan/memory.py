"""Where the bytes of a training step are, on the fullest rank.

    parameters    master weights, each rank its shard: fp32 in "mixed" and "fp8"
    gradients     of that shard, in the type they are summed in; in a pipeline of the whole stage, in fp32: it sums
                  its micro-batches' before it reduces them
    optimizer     AdamW's two moments of that shard
    gathered      FSDP's unsharded weights in the type that multiplies: two units (attention, feed-forward, experts), in
                  a pipeline all of them, and one unit's gradient; embedding and head with their gradients, in fp32; on
                  one rank the copies that autograd keeps of all matrices
    activations   what the backward pass keeps of all micro-batches in flight, and one layer recomputed
    hidden, head  the last hidden states, their gradients; a slice of the loss: logits in fp32 and their log-softmax
    working       the widest layer's gradients while its backward runs

Activations, bytes a token and layer, b the bytes of the type that multiplies, from what each operation saves:

    norm          (8 + b) D: its input and quotient in fp32, its output; a frozen one keeps (4 + b) D
    attention     local b (3 H + 3 K) d, and 4 (H + K) d for the QK-norm; global b (3 H + 2 K) d
    MoE           16/2 b F of each SwiGLU (gate and up, silu of gate, product), routed and shared; b D sorted tokens;
                  the router's input in fp32, 4 D, where b is not 4
    dense         8/2 b F'

D, F, F', H, K, d: widths and heads of the configuration. Tensor parallelism divides all but the gathered inputs of
attention and of the shared or dense FFN; context parallelism leaves global layers the whole row's keys and values.
`tests/unit/test_plan_memory.py` holds this against what autograd saves and
against the peak of resident memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from puna.model import ModelConfig
from puna.model.config import VisionConfig
from puna.parallel.layout import Layout, is_expert, is_tensor_parallel
from puna.parallel.pipeline import split_layers
from puna.plan.flops import shapes
from puna.plan.layout import ONE
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


class Fits:
    """What a plan with `memory`, bytes by part on the fullest GPU, and `usable` bytes there says of the two."""

    memory: dict[str, float]
    usable: float

    @property
    def used(self) -> float:
        return sum(self.memory.values())

    @property
    def over(self) -> float:
        """Bytes that are missing; negative: left."""
        return self.used - self.usable

    @property
    def fits(self) -> bool:
        return self.over <= 0


@dataclass(frozen=True)
class Schedule:
    """How a step is run.

    rows: in a micro-batch. micros: micro-batches of a step on each rank. recompute: every n-th layer keeps its input
    alone and runs forward twice (0: none, 1: all). slice: positions of the loss at once. tiles: pictures' tiles in a
    row. imbalance: tokens of the busiest expert rank over the mean.
    """

    rows: int = 1
    micros: int = 1
    recompute: int = 0
    slice: int = 1024
    tiles: float = 0.0
    imbalance: float = 1.0


def kept(config: ModelConfig, layer: int, b: int = 2, layout: Layout = ONE, imbalance: float = 1.0,
         frozen: bool = False) -> float:  # fmt: skip
    """Bytes that the backward pass keeps of one layer for each token of a rank's share of the row, the same of all
    tensor-parallel ranks; frozen: adapters are all that is trained."""
    c, d, heads, tp = config, config.head_dim, config.n_heads + config.n_kv_heads, layout.tp
    norm = 4 * c.d_model + (0 if frozen else 4 * c.d_model)
    if c.is_nope(layer):
        attention = b * (3 * c.n_heads + 2 * c.n_kv_heads + 2 * c.n_kv_heads * layout.cp * (layout.cp > 1)) * d
    else:
        attention = (3 * b + 4 * c.qk_norm) * heads * d
    split = 2 * norm + attention
    if c.is_moe(layer):
        split += 4 * b * c.expert_width * (1 + imbalance) + b * c.d_model * imbalance
        split += (0 if frozen or b == 4 else 4 * c.d_model) + b * c.d_model * (tp > 1)
    else:
        split += 4 * b * c.dense_width
    return split / tp + 2 * b * c.d_model


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
    """Numbers of one layer: what tensor parallelism splits and attention's part of it, what every rank needs whole
    (norms, router), one expert's matrices."""

    split: int
    attention: int
    whole: int
    expert: int


@lru_cache(maxsize=4096)
def layer_size(config: ModelConfig, layer: int) -> LayerSize:
    split = attention = whole = expert = 0
    for name, shape in shapes(config).items():
        if name.startswith(f"layers.{layer}."):
            n = math.prod(shape)
            if ".experts." in name:
                expert += n // config.n_experts
            elif "norm" in name or "router" in name:
                whole += n
            else:
                split, attention = split + n, attention + n * (".attention." in name)
    return LayerSize(split, attention, whole, expert)


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
def stage_layers(n_layers: int, pp: int, chunks: int, stage: int) -> tuple[int, ...]:
    """Layers of a pipeline rank."""
    return tuple(i for run in split_layers(n_layers, pp, chunks)[stage::pp] for i in run)


@lru_cache(maxsize=8192)
def alike(config: ModelConfig, pp: int, chunks: int, stage: int, recompute: int) -> tuple[Like, ...]:
    """The layers of a stage, those together that differ in nothing a plan counts."""
    groups: dict[tuple, list[int]] = {}
    for i in stage_layers(config.n_layers, pp, chunks, stage):
        again = recompute > 0 and i % recompute == 0
        groups.setdefault((config.is_moe(i), config.is_nope(i), again), []).append(i)
    return tuple(Like(g[0], len(g), key[2], layer_size(config, g[0])) for key, g in groups.items())


def in_flight(layout: Layout, micros: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once: 1F1B, or interleaved 1F1B (arXiv 2104.04473 §2.2)."""
    v, ahead = layout.pp_chunks, layout.pp - stage - 1
    return min(micros, ahead + 1 if v == 1 else (2 * ahead + (v - 1) * layout.pp + 1) / v)


@lru_cache(maxsize=2048)
def _shapes_of(config: ModelConfig, layer: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's parameters; layer -1: of all that is in no layer."""
    start = f"layers.{layer}." if layer >= 0 else ("tok_embeddings.", "norm.", "output.", "vision.")
    return [(n, shape) for n, shape in shapes(config).items() if n.startswith(start)]


@lru_cache(maxsize=65536)
def _layer_shards(config: ModelConfig, layer: int, tp: int, ep: int, dense: int, copy: int) -> tuple[int, int, int]:
    spread, matrices, experts, others = copy // ep, 0, 0, 0
    for name, shape in _shapes_of(config, layer):
        if is_expert(name):  # whole ones where there are enough, else along their input, else all on some ranks
            own = (shape[0] // ep, *shape[1:])
            dim = 0 if own[0] % spread == 0 or own[1] % spread else 1
            experts += math.ceil(own[dim] / spread) * math.prod(own) // own[dim]
        elif is_tensor_parallel(name):
            cut = tp if ".w13." in name or ".wqkv." in name else 1
            matrices += math.ceil(shape[0] // cut / dense) * math.prod(shape[1:]) * cut // tp
        else:
            others += math.ceil(shape[0] / copy) * math.prod(shape[1:])
    return matrices, experts, others


@lru_cache(maxsize=4096)
def _root_shards(config: ModelConfig, copy: int, first: bool, last: bool) -> tuple[int, int]:
    tower = root = 0
    for name, shape in _shapes_of(config, -1):
        if last if name.startswith(("output.", "norm.")) else first:
            n = math.ceil(shape[0] / copy) * math.prod(shape[1:])
            tower, root = (tower + n, root) if name.startswith("vision.") else (tower, root + n)
    return tower, root


def tower_shard(config: ModelConfig, copy: int, first: bool) -> int:
    """Numbers of the vision tower that a rank of the first stage holds; `shards` counts them among "rest"."""
    return _root_shards(config, copy, first, False)[0]


def shards(config: ModelConfig, layout: Layout, layers: tuple[Like, ...], first: bool = True,
           last: bool = True) -> dict[str, int]:  # fmt: skip
    """Numbers that a rank holds, padded to equal shards, by FSDP's kinds of units (parallel/apply.py)."""
    rest, root = _root_shards(config, layout.copy, first, last)
    found = {"matrices": 0, "experts": 0, "rest": rest, "root": root}
    for like in layers:
        own = _layer_shards(config, like.layer, layout.tp, layout.ep, layout.dp_shard * layout.cp, layout.copy)
        for kind, n in zip(("matrices", "experts", "rest"), own, strict=True):
            found[kind] += like.count * n
    return found


def gathered(config: ModelConfig, layout: Layout, layers: tuple[Like, ...], first: bool,
             last: bool) -> dict[str, float]:  # fmt: skip
    """Numbers of a stage's weights that a rank gathers: of all "blocks", of the largest "unit" of them, of embedding
    and head, the "root", of the vision "tower"."""
    blocks = unit = 0.0
    for like in layers:
        size, experts = like.size, like.size.expert * config.n_experts / layout.ep
        blocks += like.count * (size.split / layout.tp + size.whole + experts)
        unit = max(unit, size.attention / layout.tp, (size.split - size.attention) / layout.tp, experts)
    embedding, head, tower = ends(config)
    return {"blocks": blocks, "unit": unit, "root": embedding * first + head * last, "tower": tower * first}


def training_memory(config: ModelConfig, layout: Layout, schedule: Schedule, precision: Precision, seq_len: int,
                    stage: int | None = None) -> dict[str, float]:  # fmt: skip
    """Bytes by part on the fullest rank of a stage (of all stages: None) at the fullest moment of a step."""
    if stage is None:
        found = [training_memory(config, layout, schedule, precision, seq_len, s) for s in fullest(layout)]
        return max(found, key=lambda parts: sum(parts.values()))
    c, b, s, tp = config, precision.compute, schedule, layout.tp
    first, last = stage == 0, stage == layout.pp - 1
    layers = alike(c, layout.pp, layout.pp_chunks, stage, s.recompute)
    numbers, share = gathered(c, layout, layers, first, last), sum(shards(c, layout, layers, first, last).values())
    tokens = s.rows * seq_len / layout.cp
    parts = {"parameters": precision.master, "gradients": precision.gradient, "optimizer": precision.moments}
    parts = {name: size * share for name, size in parts.items()} | {"activations": 0.0, "working": 0.0}
    flight, again = in_flight(layout, s.micros, stage), 0.0
    for like in layers:
        each = kept(c, like.layer, b, layout, s.imbalance)
        again = max(again, each * like.again)
        parts["activations"] += flight * tokens * like.count * (b * c.d_model / tp if like.again else each)
        parts["working"] = max(parts["working"], tokens * working(c, like.layer, b, tp, s.imbalance))
    parts["activations"] += tokens * again
    if first and c.vision and s.tiles:
        share = math.ceil(s.rows * s.tiles / layout.cp / tp)
        parts["activations"] += flight * share * kept_by_tile(c.vision, b)
    if layout.world > 1:
        weights = numbers["blocks"] if layout.pp > 1 else 2 * numbers["unit"]
        parts["gathered"] = b * weights + (b + precision.gradient) * numbers["unit"]
        parts["gathered"] += (precision.master + precision.gradient) * numbers["root"]
        if layout.pp > 1 and s.tiles:
            parts["gathered"] += (precision.master + precision.gradient) * numbers["tower"]
        if layout.pp > 1 and s.micros > 1:
            parts["gradients"] = max(4, precision.gradient) * numbers["blocks"]
    elif b != precision.master:
        copied = [x.count * (x.size.split + x.size.expert * c.n_experts) for x in layers if not x.again]
        parts["gathered"] = b * (sum(copied) or numbers["unit"])
    if last:
        parts["head"] = head_slice(min(s.slice, tokens / tp), c.vocab_size)
        parts["hidden"] = tokens / tp * c.d_model * (8 + 4 * b)
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
