"""The shapes of Llama 4, as one frozen dataclass, and the herd's presets.

Everything that tells Scout, Maverick and our nano models apart is a number here; `llama4.py` never asks for a name.
Three rules generate the layer pattern (llama4-facts.md §1.1, 0-based layer i):

* NoPE where (i + 1) % 4 == 0: no rotary embedding, attention over the whole document, temperature tuning;
  every other layer rotates its queries and keys and attends inside its own chunk only;
* a mixture of experts where (i + 1) % moe_step == 0 (Scout 1, Maverick 2), a dense FFN elsewhere;
* one shared expert in every MoE layer, top-1 routing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from puna.errors import PunaError
from puna.fields import nearest


def _from_dict(cls, values: dict[str, Any]):
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise PunaError(f"{cls.__name__} has no field {key!r}; did you mean {nearest(key, names)!r}?")
    return cls(**values)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (llama4-facts.md §3.1-3.2); the defaults are Scout's and Maverick's."""

    image_size: int = 336  # side of one tile, pixels
    patch_size: int = 14
    width: int = 1408
    layers: int = 34
    heads: int = 16
    mlp_width: int = 5632
    adapter_width: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    pixel_shuffle: float = 0.5

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise PunaError(f"vision.image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.head_dim % 4:
            raise PunaError(f"vision.width {self.width} / heads {self.heads} must give a head_dim divisible by 4")
        if self.grid % self.shuffle:
            raise PunaError(f"vision: {self.grid} patches a side cannot be shuffled {self.shuffle} x {self.shuffle}")

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def shuffle(self) -> int:
        """Side of the square of patches that pixel shuffle folds into one token."""
        return round(1 / self.pixel_shuffle)

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid // self.shuffle) ** 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3-type frequency scaling; the defaults are Scout's (llama4-facts.md §1.6)."""

    factor: float = 16.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """One Llama 4. `expert_width` is each routed expert's and the shared expert's, `dense_width` a dense layer's."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    expert_width: int
    dense_width: int
    n_experts: int
    moe_layers: tuple[int, ...] | None = None  # None: every moe_step-th layer
    moe_step: int = 1
    nope_layers: tuple[int, ...] | None = None  # None: (i + 1) % 4 == 0
    chunk: int = 8192
    qk_norm: bool = True
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    temperature_tuning: bool = True
    floor_scale: int = 8192
    attn_scale: float = 0.1
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_context: int = 262144
    patch_token: int | None = None  # id of <|patch|>, set from the processor
    vision: VisionConfig | None = None
    ffn_init: float = 1.0  # initial w2 of experts and feed-forward layers, times this (`init.py`); no weight afterwards

    def __post_init__(self):
        fill = object.__setattr__  # frozen: derived layer lists are filled in once, here
        layers = range(self.n_layers)
        if self.moe_step < 1:
            raise PunaError(f"moe_step must be at least 1, got {self.moe_step}")
        if self.moe_layers is None:
            fill(self, "moe_layers", tuple(i for i in layers if (i + 1) % self.moe_step == 0))
        if self.nope_layers is None:
            fill(self, "nope_layers", tuple(i for i in layers if (i + 1) % 4 == 0))
        for name in ("moe_layers", "nope_layers"):
            fill(self, name, tuple(sorted(getattr(self, name))))
            if any(i not in layers for i in getattr(self, name)):
                raise PunaError(f"{name} {getattr(self, name)} names a layer outside 0..{self.n_layers - 1}")
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "chunk", "floor_scale"):
            if getattr(self, name) < 1:
                raise PunaError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ffn_init < math.inf:
            raise PunaError(f"ffn_init must be 0 or more, got {self.ffn_init}")
        if self.n_heads % self.n_kv_heads:
            raise PunaError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise PunaError(f"head_dim must be even for rotary pairs, got {self.head_dim}")
        if self.moe_layers and self.n_experts < 1:
            raise PunaError(f"n_experts must be at least 1 when there are MoE layers, got {self.n_experts}")
        for name in ("expert_width",) * bool(self.moe_layers) + ("dense_width",) * (
            len(self.moe_layers) < self.n_layers
        ):
            if getattr(self, name) < 1:
                raise PunaError(f"{name} must be at least 1, got {getattr(self, name)}")

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def is_nope(self, layer: int) -> bool:
        return layer in self.nope_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        values = dict(values)
        for name, part in (("vision", VisionConfig), ("rope_scaling", RopeScaling)):
            if isinstance(values.get(name), dict):
                values[name] = _from_dict(part, values[name])
        for name in ("moe_layers", "nope_layers"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return _from_dict(cls, values)


_META = dict(
    vocab_size=202048, d_model=5120, n_layers=48, n_heads=40, n_kv_heads=8, head_dim=128,
    expert_width=8192, dense_width=16384, patch_token=200092, vision=VisionConfig(),
)  # fmt: skip


def scout() -> ModelConfig:
    """Llama 4 Scout, 17B-16E: 108,641,793,536 parameters (llama4-facts.md §1)."""
    return ModelConfig(**_META, n_experts=16, rope_scaling=RopeScaling(), max_context=10485760)


def maverick() -> ModelConfig:
    """Llama 4 Maverick, 17B-128E: 401,583,781,376 parameters; no QK-norm, no RoPE scaling (llama4-facts.md §1)."""
    return ModelConfig(**_META, n_experts=128, moe_step=2, qk_norm=False, max_context=1048576)


def behemoth() -> ModelConfig:
    """*Assumed*: Meta published 288B active, nearly 2T total and 16 experts only; these widths meet the three.

    Active 288.4B, total 1.99T with Scout's layer pattern: 96 layers of width 16,384, experts of 24,064.
    """
    return ModelConfig(
        vocab_size=202048, d_model=16384, n_layers=96, n_heads=128, n_kv_heads=8, head_dim=128,
        expert_width=24064, dense_width=48128, n_experts=16, patch_token=200092, vision=VisionConfig(),
        rope_scaling=RopeScaling(),
    )  # fmt: skip


def _small(n_experts: int, moe_step: int, qk_norm: bool) -> ModelConfig:
    # ~0.5B active, Scout's proportions (F = 1.6 D), one H100.
    return ModelConfig(
        vocab_size=65536, d_model=1280, n_layers=24, n_heads=10, n_kv_heads=2, head_dim=128,
        expert_width=2048, dense_width=4096, n_experts=n_experts, moe_step=moe_step, qk_norm=qk_norm,
        chunk=2048, floor_scale=2048, max_context=262144,
        vision=VisionConfig(image_size=224, width=512, layers=12, heads=8, mlp_width=2048, adapter_width=1536),
    )  # fmt: skip


def small_scout() -> ModelConfig:
    """A Scout of ~0.6B active parameters for real training on one GPU."""
    return _small(16, 1, True)


def small_maverick() -> ModelConfig:
    """A Maverick of ~0.6B active parameters for real training on one GPU."""
    return _small(128, 2, False)


NANO_VISION = VisionConfig(image_size=64, patch_size=16, width=128, layers=2, heads=4, mlp_width=512, adapter_width=256)


def _nano(n_experts: int, moe_step: int, qk_norm: bool, d_model: int = 256, n_layers: int = 4) -> ModelConfig:
    # Two cores: every feature of the architecture, chunk and temperature floor shrunk with the context.
    return ModelConfig(
        vocab_size=8192, d_model=d_model, n_layers=n_layers, n_heads=d_model // 64, n_kv_heads=2, head_dim=64,
        expert_width=d_model, dense_width=2 * d_model, n_experts=n_experts, moe_step=moe_step, qk_norm=qk_norm,
        chunk=256, floor_scale=256, max_context=131072, vision=NANO_VISION,
    )  # fmt: skip


def nano_scout() -> ModelConfig:
    """The laptop Scout: 16 experts, MoE in every layer."""
    return _nano(16, 1, True)


def nano_maverick() -> ModelConfig:
    """The laptop Maverick: 128 experts, MoE in every second layer, no QK-norm."""
    return _nano(128, 2, False)


def nano_behemoth() -> ModelConfig:
    """The laptop herd's teacher: 16 experts, ~5 x a nano student's active parameters."""
    return _nano(16, 1, True, d_model=512, n_layers=8)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f
    for f in (scout, maverick, behemoth, small_scout, small_maverick, nano_scout, nano_maverick, nano_behemoth)
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`; an unknown name is an error that gives the nearest one."""
    if name not in PRESETS:
        raise PunaError(f"unknown model preset {name!r}; did you mean {nearest(name, PRESETS)!r}?")
    return PRESETS[name]()


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; `active` is what one text token touches (llama4-facts.md §1.3)."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    routers: int
    norms: int
    vision: int
    active: int

    @property
    def text(self) -> int:
        return self.total - self.vision

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "active")

    @property
    def active_without_embedding(self) -> int:
        """What 6 N counts: the input embedding is a look-up."""
        return self.active - self.embedding


def count_parameters(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> ParameterCount:
    """Counts by part from a model's own parameter shapes (name -> shape), so that the model is what is counted."""
    part = {f.name: 0 for f in dataclasses.fields(ParameterCount)}
    for name, shape in shapes.items():
        n = 1
        for s in shape:
            n *= s
        if name.startswith("vision."):
            key = "vision"
        elif name.startswith("tok_embeddings"):
            key = "embedding"
        elif name.startswith("output"):
            key = "head"
        elif "norm" in name:
            key = "norms"
        elif ".attention." in name:
            key = "attention"
        elif ".feed_forward." in name:
            key = "dense_ffn"
        elif ".moe.experts." in name:
            key = "routed_experts"
        elif ".moe.shared." in name:
            key = "shared_experts"
        else:
            key = "routers"
        part[key] += n
    idle = part["routed_experts"] - part["routed_experts"] // max(config.n_experts, 1)
    part["active"] = sum(v for k, v in part.items() if k not in ("vision", "active")) - idle
    return ParameterCount(**part)
