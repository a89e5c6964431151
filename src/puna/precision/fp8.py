"""FP8 numbers with a scale: x is divided by max |x| / top, so that its largest number is the type's largest, and
rounded; value = number * scale.

    e4m3   top 448      three bits of mantissa: at most 1/16 off, relative to a number not far below the largest
    e5m2   top 57,344   two bits, at most 1/8 off, but 2^31 between largest and smallest: for gradients

A scale a row is the form of Meta's FP8 checkpoints (`quantize_rows`; a row of zeros keeps the smallest scale;
llama4-facts.md §5.3). What training multiplies has a scale a row or one in all (fp8_training.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST = 1e-12  # of a row's largest number


def quantize(x: Tensor, dim: int | tuple[int, ...] | None, dtype: torch.dtype = E4M3,
             smallest: float = SMALLEST) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x in FP8 and the float32 scales that numbers along `dim` share (None: all), in a shape that broadcasts.

    A NaN or an infinity makes NaN of all that share its scale, never a number.
    """
    wide, top = x.float(), torch.finfo(dtype).max
    largest = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
    scale = largest.clamp(min=smallest) / top
    return (wide / scale).clamp(-top, top).to(dtype), scale


def quantize_rows(w_RI: Tensor) -> tuple[Tensor, Tensor]:
    """[..., rows, in] of any floating type -> (e4m3 of that shape, float32 scales [..., rows])."""
    q_RI, scale_R1 = quantize(w_RI, -1)
    return q_RI, scale_R1[..., 0]


def dequantize_rows(q_RI: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `quantize_rows`, [..., rows, in]."""
    return (q_RI.float() * scale_R[..., None]).to(dtype)
