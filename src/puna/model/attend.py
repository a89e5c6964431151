"""Which kernel computes softmax(q k^T / sqrt(d) + mask) v: the one seam of attention.

torch's fused kernel everywhere, but for short rows on a CPU. There its backward runs far below the products' rate, and
two batched products around a softmax, block by block, take half to two thirds of its time (docs/LOG.md). Queries go in
blocks of BLOCK positions; causal ones see no key behind their block's end, so nearly half of the square is never
computed. The probabilities P are kept for the backward, B * H * T * (T + BLOCK) / 2 numbers:

    dV = P^T dO        dP = dO V^T        dS = P * (dP - sum over keys of dP * P)        dQ = dS K        dK = dS^T Q

The query heads of one key head are rows of one product: [B, T, K * R, d] is worked on as [B * K, T * R, d].

On a GPU the kernel that takes a mask takes no grouped heads: keys are repeated, or torch would write out all scores.

**In parts.** Keys of a cache lie in several places, and a mask over a long past costs more than the attention. So
`part` attends to some of the keys and says what they weigh; parts of one query make the whole:

    l_i = log sum_k exp(s_k) over part i's keys        o = sum_i w_i o_i        w = softmax(l)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS_UP_TO = 512  # keys; longer rows would keep too many probabilities
BLOCK = 64  # queries


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Attention with grouped heads and 1/sqrt(d): [B, T, H, d]. With `causal` no query sees a later key.

    mask: additive, [B, 1, T, S] for S keys. With `causal` S is T, and the mask, which hides more, has to hide the later
    keys too.
    """
    if q_BTHd.device.type == "cpu" and q_BTHd.shape[1] <= BLOCKS_UP_TO:
        return _Blocks.apply(q_BTHd, k_BTKd, v_BTKd, mask, causal)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTKd, v_BTKd))
    return fused(q, k, v, mask, causal and mask is None).transpose(1, 2)


def fused(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """torch's kernel, [B, H, T, d]; mask: additive or boolean, [B, 1, T, S]."""
    if mask is not None and q_BHTd.is_cuda:
        repeat = q_BHTd.shape[1] // k_BKSd.shape[1]
        k_BKSd, v_BKSd = (t.repeat_interleave(repeat, dim=1) for t in (k_BKSd, v_BKSd))
    grouped = k_BKSd.shape[1] < q_BHTd.shape[1]
    return F.scaled_dot_product_attention(q_BHTd, k_BKSd, v_BKSd, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def part(
    q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, [B, H, T, d], and the logarithm of what they weigh, [B, H, T] in fp32.

    mask: additive, [B, 1, 1 or T, S]. causal: queries and keys are the same tokens.
    """
    if q_BHTd.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTd, k_BKSd, v_BKSd, 0.0, causal, attn_mask=mask
        )
    k_BHSd, v_BHSd = (t.repeat_interleave(q_BHTd.shape[1] // k_BKSd.shape[1], dim=1) for t in (k_BKSd, v_BKSd))
    scores = (q_BHTd @ k_BHSd.transpose(2, 3)).float() * q_BHTd.shape[-1] ** -0.5
    if causal:
        scores += torch.full(scores.shape[2:], float("-inf"), device=scores.device).triu_(1)
    if mask is not None:
        scores += mask
    return torch.softmax(scores, -1).to(v_BHSd.dtype) @ v_BHSd, scores.logsumexp(-1)


def join(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two parts of the same queries as one: (outputs [..., d], weights [...])."""
    share = torch.sigmoid(b[1] - a[1])[..., None]
    return torch.lerp(a[0].float(), b[0].float(), share), torch.logaddexp(a[1], b[1])


def join_rows(out_NKRd: Tensor, weight_NKR: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """N parts, part i of query row_N[i], as the outputs of all `rows` queries, fp32 [rows, K, R, d]."""
    where = row_N[:, None, None].expand_as(weight_NKR)
    most = weight_NKR.new_full((rows, *weight_NKR.shape[1:]), float("-inf"))
    most.scatter_reduce_(0, where, weight_NKR, "amax")
    share = torch.exp(weight_NKR - most[row_N])[..., None]
    total = share.new_zeros(*most.shape, 1).index_add_(0, row_N, share)
    return share.new_zeros(rows, *out_NKRd.shape[1:]).index_add_(0, row_N, share * out_NKRd) / total


@lru_cache(maxsize=8)
def _triangle(dtype: torch.dtype) -> Tensor:
    """Additive causal mask of one block, [BLOCK, 1, BLOCK]."""
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=dtype).triu_(1)[:, None]


def _rows(x_BTHd: Tensor, n_key_heads: int) -> Tensor:
    """[B, T, K * R, d] -> [B * K, T * R, d]."""
    return x_BTHd.unflatten(2, (n_key_heads, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _heads(x_NRd: Tensor, B: int, T: int) -> Tensor:
    """`_rows` undone."""
    return x_NRd.unflatten(0, (B, -1)).unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3)


class _Blocks(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        B, T, H, d = q_BTHd.shape
        K = k_BTKd.shape[2]
        R = H // K
        q, k, v = (_rows(t, K) for t in (q_BTHd * d**-0.5, k_BTKd, v_BTKd))
        out, kept = torch.empty_like(q), []
        stops = [(i, min(i + BLOCK, T)) for i in range(0, T, BLOCK)]
        ctx.blocks = [(i, j, j) for i, j in stops] if causal else [(0, T, k.shape[1])]
        for i, j, s in ctx.blocks:
            scores = torch.bmm(q[:, i * R : j * R], k[:, :s].transpose(1, 2))
            view_BKTRS = scores.view(B, K, j - i, R, s)
            if mask is not None:
                view_BKTRS += mask[:, :, i:j, None, :s]
            elif causal:
                view_BKTRS[..., i:] += _triangle(scores.dtype)[: j - i, :, : j - i]
            kept.append(torch.softmax(scores, dim=-1))
            torch.bmm(kept[-1], v[:, :s], out=out[:, i * R : j * R])
        ctx.save_for_backward(q, k, v, *kept)
        ctx.shape = (B, T, R, d)
        return _heads(out, B, T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTHd: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        B, T, R, d = ctx.shape
        grad = _rows(grad_BTHd, len(k) // B)
        wide = torch.promote_types(k.dtype, torch.float32)  # sums over blocks
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for (i, j, s), p in zip(ctx.blocks, kept, strict=True):
            rows = slice(i * R, j * R)
            dv[:, :s] += torch.bmm(p.transpose(1, 2), grad[:, rows])
            ds = torch._softmax_backward_data(torch.bmm(grad[:, rows], v[:, :s].transpose(1, 2)), p, -1, p.dtype)
            torch.bmm(ds, k[:, :s], out=dq[:, rows])
            dk[:, :s] += torch.bmm(ds.transpose(1, 2), q[:, rows])
        dk, dv = (_heads(t.to(k.dtype), B, k.shape[1]) for t in (dk, dv))
        return _heads((dq * d**-0.5).to(k.dtype), B, T), dk, dv, None, None
