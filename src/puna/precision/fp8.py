"""FP8 with one scale a row: a row of a weight [out, in] is divided by max |w| / 448, so that its largest number is
e4m3's largest (448), and rounded; value = number * scale.  Three bits of mantissa: at most 1/16 off, relative to a
number that is not far below its row's largest.  A row of zeros keeps the smallest scale.  Source: llama4-facts.md §5.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST = 1e-12  # of a row's largest number


def quantize_rows(w_RI: Tensor) -> tuple[Tensor, Tensor]:
    """[..., rows, in] of any floating type -> (e4m3 of that shape, float32 scales [..., rows])."""
    wide = w_RI.float()
    scale = wide.abs().amax(dim=-1).clamp(min=SMALLEST) / LARGEST
    return (wide / scale[..., None]).clamp(-LARGEST, LARGEST).to(E4M3), scale


def dequantize_rows(q_RI: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `quantize_rows`, [..., rows, in]."""
    return (q_RI.float() * scale_R[..., None]).to(dtype)
