"""Rotary positions: interleaved pairs, Scout's frequency scaling, and the attention temperature of NoPE layers.

Dimensions (2j, 2j+1) of a head form one complex number that turns by pos * theta^(-2j/d). Llama 4 interleaves the
pairs (Meta and Hugging Face alike; llama4-facts.md §1.6, §5.1), so a head is simply viewed as d/2 complex numbers.

Scaling (Scout): a pair whose wavelength exceeds `original_context / low` turns `factor` times slower, one shorter
than `original_context / high` keeps its speed, between the two the speed is blended; with low = high = 1 that is a
hard switch.

Temperature: softmax flattens as the number of keys grows, so NoPE layers scale the query at position p by
1 + a ln(floor((p + 1) / f) + 1) (a = attn_scale, f = floor_scale).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puna.model.config import ModelConfig


def frequencies(config: ModelConfig, device=None) -> Tensor:
    """Radians per position of each pair, fp32 [head_dim / 2]."""
    j = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_theta ** (j / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    slow = freqs / scaling.factor
    scaled = torch.where(wavelength > low, slow, freqs)
    if scaling.high_freq_factor != scaling.low_freq_factor:
        blend = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (wavelength <= low) & (wavelength >= high)
        scaled = torch.where(between, (1 - blend) * slow + blend * freqs, scaled)
    return scaled


def rotation(positions_BT: Tensor, freqs: Tensor) -> Tensor:
    """exp(i * position * frequency) as (real, imaginary): fp32 [B, T, 1, d/2, 2], ready to broadcast over heads."""
    return _unit(positions_BT.float()[..., None] * freqs)[:, :, None]


def _unit(angle: Tensor) -> Tensor:
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


def rotate(x_BTHd: Tensor, rotation_BT1c2: Tensor) -> Tensor:
    """Turns the interleaved pairs of every head; computed and returned in fp32 (fp64 for fp64 input)."""
    wide = x_BTHd if x_BTHd.dtype == torch.float64 else x_BTHd.float()
    pairs = wide.unflatten(-1, (-1, 2)).contiguous()
    if not torch.compiler.is_compiling():
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation_BT1c2)
        return torch.view_as_real(turned).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), rotation_BT1c2.unbind(-1)  # the compiler knows no complex numbers
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def temperature(positions_BT: Tensor, config: ModelConfig) -> Tensor:
    """The factor on NoPE queries, fp32 [B, T]."""
    steps = torch.floor((positions_BT.float() + 1) / config.floor_scale)
    return 1 + config.attn_scale * torch.log1p(steps)


def rotation_2d(grid: int, head_dim: int, theta: float, device=None) -> Tensor:
    """The vision tower's positions: fp32 [1, grid^2 + 1, 1, head_dim / 2, 2], the class token (no turn) last.

    The first half of the pairs turns by (column + 1), the second by (row + 1) (llama4-facts.md §3.1).
    """
    freqs = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2))
    place = torch.arange(grid * grid, device=device)
    column, row = (place % grid + 1).float(), (place // grid + 1).float()
    angle = torch.cat([column[:, None] * freqs, row[:, None] * freqs], dim=-1)
    angle = torch.cat([angle, torch.zeros_like(angle[:1])])
    return _unit(angle)[None, :, None]
