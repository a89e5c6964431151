"""int4 as Meta's int4_mixed makes it on loading (llama4-facts.md §5.3): groups of 128 along the input, symmetric,

    scale = max |w| / 8 (max at least 1e-6)    number = round(w / scale), clamped to -8 .. 7    value = number * scale

two numbers a byte, the one at the even place of the input in the low half. A value is at most scale / 2 off, a group's
largest positive number, 8 clamped to 7, a whole scale. With its float32 scales a weight takes 4.25 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.precision import int8

DTYPE = torch.uint8
BITS = 4


def shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the bytes and of the scales of a weight [R, in, ...]. PunaError: an odd number of inputs."""
    if shape[1] % 2:
        raise PunaError(f"int4 packs two inputs into a byte, a weight {list(shape)} has an odd number: use int8")
    return (shape[0], shape[1] // 2, *shape[2:]), int8.shapes(shape)[1]


def quantize(w_RI: Tensor) -> tuple[Tensor, Tensor]:
    """[R, in, ...] of any floating type -> (bytes [R, in / 2, ...], float32 scales [R, groups, ...])."""
    q_RI, scale_RG = int8.in_groups(w_RI, 8, -8, 7)
    return (q_RI[:, 0::2] & 15 | q_RI[:, 1::2] << 4).view(torch.uint8), scale_RG


def dequantize(q_RI: Tensor, scale_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, [R, in, ...], multiplied in float32."""
    pairs = q_RI.view(torch.int8)
    numbers_RI = torch.stack((pairs << 4 >> 4, pairs >> 4), dim=2).flatten(1, 2)  # shifts of int8 keep the sign
    return int8.dequantize(numbers_RI, scale_RG, dtype)
