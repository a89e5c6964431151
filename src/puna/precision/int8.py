"""int8 with a scale for every 128 numbers along the input: value = number * scale, scale = max |w| / 127.

The group's largest number becomes +-127, so a value is at most scale / 2 = max |w| / 254 off. In puna both kinds of
matrix have the input as their second dimension (linear [out, in], experts [E, in, out]), and so have the groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128  # numbers along the input that share a scale; the last group of a row may have fewer
SMALLEST = 1e-6  # of a group's largest number
DTYPE = torch.int8
BITS = 8


def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the stored numbers and of the scales of a weight [R, in, ...]."""
    return shape, (shape[0], -(-shape[1] // GROUP), *shape[2:])


def quantize(w_RI: Tensor) -> tuple[Tensor, Tensor]:
    """[R, in, ...] of any floating type -> (int8 of that shape, float32 scales [R, groups, ...])."""
    return in_groups(w_RI, 127, -127, 127)


def dequantize(q_RI: Tensor, scale_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, [R, in, ...], multiplied in float32."""
    wide_RI = scale_RG.repeat_interleave(GROUP, dim=1)[:, : q_RI.shape[1]]
    return wide_RI.mul_(q_RI).to(dtype)


def in_groups(w_RI: Tensor, steps: int, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """round(w / scale) in lowest..highest as int8, and scale = max |w| of the group / steps."""
    n = w_RI.shape[1]
    padding = (0, 0) * (w_RI.dim() - 2) + (0, -n % GROUP)
    w_RGI = F.pad(w_RI.float(), padding).unflatten(1, (-1, GROUP))
    scale_RG = w_RGI.abs().amax(dim=2).clamp_(min=SMALLEST) / steps
    q_RGI = (w_RGI / scale_RG.unsqueeze(2)).round_().clamp_(lowest, highest).to(torch.int8)
    return q_RGI.flatten(1, 2)[:, :n].contiguous(), scale_RG
