"""Tiny Llama 4s with strong random weights, and the tolerances of the design.

The released models' widths don't matter for conformance; their *features* do.  So the shapes here keep every feature
and shrink the rest: two chunks are 64 tokens, the temperature starts at position 23, one tile is 16 pixels and 4
tokens.  Weights are larger than at initialisation, so that attention is sharp and no feature hides behind rounding.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from puna.model import Llama4, ModelConfig, RopeScaling, VisionConfig

CHUNK = 32
PATCH = 7
TENSOR_TOLERANCE = 1e-5  # ||a - b|| / ||b||, float32
LOGPROB_TOLERANCE = 5e-5
CHANGED = 1e-3  # a feature that is switched off must move the output by more than this

VISION = VisionConfig(image_size=16, patch_size=4, width=32, layers=2, heads=2, mlp_width=128, adapter_width=48)
SCOUT = ModelConfig(
    vocab_size=128, d_model=64, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=32, expert_width=48, dense_width=96,
    n_experts=4, chunk=CHUNK, floor_scale=24, max_context=4096, patch_token=PATCH, vision=VISION,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 64),
)  # fmt: skip
MAVERICK = dataclasses.replace(
    SCOUT,
    n_layers=6,
    head_dim=16,
    n_experts=8,
    moe_layers=None,
    nope_layers=None,
    moe_step=2,
    qk_norm=False,
    rope_scaling=None,
)
SHAPES = {"scout": SCOUT, "maverick": MAVERICK}
TEXT_ONLY = {"scout": dataclasses.replace(SCOUT, vision=None, patch_token=None),
             "maverick": dataclasses.replace(MAVERICK, vision=None, patch_token=None)}  # fmt: skip


def strong_model(config: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32, gain: float = 1.5) -> Llama4:
    """A model in evaluation mode with random weights; norms and biases are random too, so that a swapped pair shows."""
    model = Llama4(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            elif name == "tok_embeddings.weight" or name == "vision.positional_embedding":
                p.copy_(
                    noise * (0.2 if config.tie_embeddings and name.startswith("tok") else 1)
                )  # tied: logits of order 1
            else:
                p.copy_(
                    gain * noise * p.shape[1] ** -0.5
                )  # Linear [out, in] and experts [E, in, out]: shape[1] is the fan-in
    return model


def text(config: ModelConfig, T: int, B: int = 2, seed: int = 2) -> Tensor:
    """Random tokens without patches."""
    tokens = torch.randint(PATCH + 1, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
    return tokens


def with_pictures(config: ModelConfig, T: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Two rows with three tiles: two in the first (one across the first chunk border), one in the second."""
    tokens, n = text(config, T, 2, seed), config.vision.tokens_per_tile
    for row, start in ((0, 2), (0, config.chunk - 2), (1, 9)):
        tokens[row, start : start + n] = config.patch_token
    side = config.vision.image_size
    tiles = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    assert int((tokens == config.patch_token).sum()) == 3 * n
    return tokens, tiles


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def assert_same(a: Tensor, b: Tensor, what: str = "logits") -> None:
    """Equal within the design's tolerance; for logits the log-probabilities too."""
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert torch.isfinite(a).all(), what
    assert distance(a, b) <= TENSOR_TOLERANCE, (what, distance(a, b))
    if what == "logits":
        gap = float((a.detach().log_softmax(-1) - b.detach().log_softmax(-1)).abs().max())
        assert gap <= LOGPROB_TOLERANCE, (what, gap)
