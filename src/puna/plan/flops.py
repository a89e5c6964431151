"""Training work in floating-point operations (a multiply-add is two), forward and backward.

    per token = 6 N + 12 sum over layers of H d k
        N   active parameters without the input embedding (a look-up): 2 forward, 4 backward (arXiv 2001.08361)
        H d width of all query heads; scores and their sum over values: 4 H d a key forward, three times that in all
        k   keys a query sees on average: (T + 1) / 2 in global layers, in local ones inside chunks of C only

    per tile  = 6 N_tower (P + 1) + 12 L W (P + 1)^2 + 6 N_joint t
        P + 1 patches and the class token in the tower's L layers of width W; t tokens leave the adapter and projector

Exact for whole rows of one document; packed short documents attend less. Recomputed or padded work is not counted.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from puna.model import Llama4, ModelConfig
from puna.model.config import ParameterCount, count_parameters


@lru_cache(maxsize=16)
def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, without making the model."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama4(config).named_parameters()}


@lru_cache(maxsize=16)
def parameter_count(config: ModelConfig) -> ParameterCount:
    """Parameters by part, without making the model."""
    return count_parameters(config, shapes(config))


def mean_keys(seq_len: int, chunk: int | None = None) -> float:
    """Keys a causal query sees on average in a document of `seq_len` tokens; chunk: it looks no further back than its
    chunk's start."""
    if chunk is None or chunk >= seq_len:
        return (seq_len + 1) / 2
    whole, rest = divmod(seq_len, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / seq_len


@lru_cache(maxsize=1024)
def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward work for one token in rows of `seq_len`; pictures' towers not counted."""
    keys = sum(mean_keys(seq_len, None if config.is_nope(layer) else config.chunk) for layer in range(config.n_layers))
    return 6 * parameter_count(config).active_without_embedding + 12 * config.n_heads * config.head_dim * keys


@lru_cache(maxsize=64)
def flops_per_tile(config: ModelConfig) -> float:
    """Forward and backward work of the vision tower for one tile; 0 for a model without."""
    if config.vision is None:
        return 0.0
    v, sizes = config.vision, {name: math.prod(shape) for name, shape in shapes(config).items()}
    joint = sum(n for name, n in sizes.items() if name.startswith(("vision.adapter", "vision.projector")))
    tower = sum(n for name, n in sizes.items() if name.startswith("vision.")) - joint
    tower -= sizes["vision.positional_embedding"] + sizes["vision.class_embedding"]  # added, not multiplied
    places = v.patches + 1
    return 6 * tower * places + 12 * v.layers * v.width * places**2 + 6 * joint * v.tokens_per_tile
