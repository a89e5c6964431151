"""The few operations everything else is made of, and the seams where precision and devices plug in.

`linear` and `expert_mm` are the seam of precision: a weight that is no tensor does its own product (weights.py: int8,
int4, with an adapter; precision/fp8_training.py: a parameter that multiplies in FP8 while it is trained).

**Mixed precision without autocast.** Parameters are fp32 master weights; activations carry the compute dtype. A
linear layer casts its weight to the activations' dtype, and autograd's cast back gives the weight an fp32 gradient.

**expert_mm.** Tokens arrive sorted by expert, so expert e owns one contiguous slice of rows:

    y[s_e] = x[s_e] @ w[e]        dx[s_e] = dy[s_e] @ w[e]^T        dw[e] = x[s_e]^T @ dy[s_e]

On CUDA this is one grouped matmul. On the CPU a plain `mm` per non-empty expert into preallocated slices is 3-5x
faster than torch's grouped kernel, and a backward of its own is needed: autograd through `w[e]` would materialise a
full zero tensor of w's size for each expert (training.md §0). Master weights are cast expert by expert, forward and
again backward: that is as fast as all at once, and no second copy of them waits for the backward.

oneDNN, which does these products in bfloat16, compiles a kernel for every number of rows and keeps the newest 1,024 of
them; experts' loads are new numbers in every step. So a training step's products take a multiple of ROUND rows: the
expert's own, and some of the next one's, whose results the next expert overwrites.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.regions import region
from puna.model.weights import Weight


def linear(x: Tensor, weight: Tensor | Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., D_in] @ weight[D_out, D_in]^T (+ bias) in x's dtype."""
    if not isinstance(weight, Tensor):
        return weight.linear(x, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@region
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, returned in x's dtype."""
    x32 = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x32 = x32 * weight.to(x32.dtype)
    return x32.to(x.dtype)


@region
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate and up the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


ROUND, FEW = 16, 128  # rows; with fewer tokens than FEW (decoding) each product is as small as it can be


def _rows(x_TD: Tensor, n: int) -> int:
    """The number of rows that an expert with n tokens of x_TD multiplies."""
    rounds = x_TD.dtype == torch.bfloat16 and len(x_TD) >= FEW
    return -(-n // ROUND) * ROUND if rounds else n


def _padded(x_nD: Tensor, rows: int) -> Tensor:
    """x_nD with zeros below it, [rows, D]."""
    return F.pad(x_nD, (0, 0, 0, rows - len(x_nD))) if rows > len(x_nD) else x_nD


def _mm_slice(x_TD: Tensor, w_DF: Tensor, out_TF: Tensor, start: int, n: int) -> None:
    """out[start : start + n] = x[start : start + n] @ w; rows further down may hold anything afterwards."""
    rows = _rows(x_TD, n)
    if start + rows <= len(x_TD):
        torch.mm(x_TD[start : start + rows], w_DF, out=out_TF[start : start + rows])
    else:
        own = slice(start, start + n)
        out_TF[own] = torch.mm(_padded(x_TD[own], rows), w_DF)[:n]


def _products(x_TD: Tensor, w_EDF: Tensor, counts: list[int]) -> Tensor:
    y_TF = x_TD.new_empty(x_TD.shape[0], w_EDF.shape[2])
    start = 0
    for e, n in enumerate(counts):
        if n:
            _mm_slice(x_TD, w_EDF[e].to(x_TD.dtype), y_TF, start, n)
            start += n
    return y_TF


class _ExpertMM(torch.autograd.Function):
    """Plain `mm` per non-empty expert; see the module's docstring."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_EDF: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_TD, w_EDF)
        ctx.counts = counts
        return _products(x_TD, w_EDF, counts)

    @staticmethod
    def backward(ctx, dy_TF: Tensor):
        x_TD, w_EDF = ctx.saved_tensors
        dy_TF = dy_TF.contiguous()
        dx_TD = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        dw_EDF = torch.empty_like(w_EDF) if ctx.needs_input_grad[1] else None
        same = w_EDF.dtype == x_TD.dtype
        start = 0
        for e, n in enumerate(ctx.counts):
            s, rows = slice(start, start + n), _rows(x_TD, n)
            if n and dx_TD is not None:
                _mm_slice(dy_TF, w_EDF[e].to(dy_TF.dtype).t(), dx_TD, start, n)
            if dw_EDF is not None:
                if not n:
                    dw_EDF[e].zero_()
                elif same:
                    torch.mm(_padded(x_TD[s], rows).t(), _padded(dy_TF[s], rows), out=dw_EDF[e])
                else:
                    dw_EDF[e] = torch.mm(_padded(x_TD[s], rows).t(), _padded(dy_TF[s], rows))
            start += n
        return dx_TD, dw_EDF, None


def expert_mm(x_TD: Tensor, w_EDF: Tensor | Weight, counts_E: Tensor) -> Tensor:
    """Rows of x_TD, sorted by expert with counts_E [E] rows each, times their expert's w_EDF[e]: [T, F].

    Errors: counts that do not sum to T (CPU path) raise ValueError; on CUDA they are the caller's contract.
    """
    if _SAME_SHAPES.get():
        return _whole_batches(x_TD, w_EDF, counts_E)
    if not isinstance(w_EDF, Tensor):
        return w_EDF.expert_mm(x_TD, counts_E)
    if x_TD.is_cuda:
        return F.grouped_mm(x_TD, w_EDF.to(x_TD.dtype), offs=counts_E.cumsum(0).to(torch.int32))
    counts = counts_E.tolist()
    if sum(counts) != x_TD.shape[0]:
        raise ValueError(f"expert counts sum to {sum(counts)}, but there are {x_TD.shape[0]} rows")
    if not torch.is_grad_enabled():  # decoding: autograd's way round a few small products costs as much as they do
        return _products(x_TD, w_EDF, counts)
    return _ExpertMM.apply(x_TD, w_EDF, counts)


_SAME_SHAPES: ContextVar[bool] = ContextVar("same_shapes", default=False)


@contextmanager
def same_shapes():
    """Within it every expert's product has as many rows as the batch has tokens, whoever goes there: a token's bits
    then don't depend on the others' routes (engine/forward.py)."""
    token = _SAME_SHAPES.set(True)
    try:
        yield
    finally:
        _SAME_SHAPES.reset(token)


def _whole_batches(x_TD: Tensor, w_EDF: Tensor | Weight, counts_E: Tensor) -> Tensor:
    """`expert_mm`, expert by expert, with rows of zeros behind each one's own."""
    parts, token = [], _SAME_SHAPES.set(False)
    try:
        for e, own_nD in enumerate(x_TD.split(counts_E.tolist())):
            if len(own_nD):
                all_E = torch.zeros_like(counts_E)
                all_E[e] = len(x_TD)
                parts.append(expert_mm(_padded(own_nD, len(x_TD)), w_EDF, all_E)[: len(own_nD)])
    finally:
        _SAME_SHAPES.reset(token)
    return torch.cat(parts)


class _Permute(torch.autograd.Function):
    """x[order] for a permutation: the backward is a gather by the inverse, not a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        order, inverse = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows of x in the given order; `inverse` undoes `order`."""
    return _Permute.apply(x, order, inverse)


class _WithLoss(torch.autograd.Function):
    """x as it is; its backward begins that of a scalar loss as well."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.one = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.one


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x, to whose backward pass the gradient of `loss` (a scalar, in the step's final units) is added: a loss from the
    middle of the model that need not be carried to its end."""
    return _WithLoss.apply(x, loss)
