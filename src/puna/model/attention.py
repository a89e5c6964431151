"""Grouped-query attention in Llama 4's two kinds, and the plan (`Layout`) that all layers of one batch share.

*Local* layers (three of four) rotate queries and keys, normalise them (Scout: weightless RMS per head, *after* the
rotation) and attend inside their own chunk: query p sees keys floor(p / C) * C .. p. It is no sliding window.
*Global* NoPE layers see the whole document, with the query's temperature. (llama4-facts.md §1.6)

**No mask for chunks.** A [B, T] batch with T a multiple of C is a [B * T/C, C] batch of plainly causal sequences: the
fold costs nothing and runs on any device. Packed rows keep this exact when a document longer than C starts on a
multiple of C and a shorter one never straddles one; short documents that share a chunk need one block-diagonal mask,
built once a batch. Rows that break the rule are still computed correctly, with an explicit mask of the whole row.

**Cache.** Decoding passes a `Cache`; the model hands over each layer's new keys and values, and gets back all that
its queries may see. The model does not know how they are stored (`engine/cache.py` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from puna.model import ops, rope
from puna.model.config import ModelConfig


class Cache(Protocol):
    """What the model needs of a key-value cache; positions count from the document's start."""

    def positions_BT(self, T: int) -> Tensor:
        """int64 [B, T]: positions of the T tokens that are fed now."""

    def extend(self, layer: int, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores this layer's new keys and values; returns (k_BKSd, v_BKSd, mask_BTS), True where a query may look.

        A mask of None means S == T and plain causal attention.
        """


@dataclass
class Layout:
    """Positions, rotations and masks of one batch, shared by all layers.

    `local_mask` is [B * n, 1, C, C] over folded chunks, or [B, 1, T, T] when `fold` is None; None: plain causal.
    `keys` brings the keys and values that global layers see where a row's tokens are spread over several processes.
    """

    rotation: Tensor  # complex [B, T, 1, d/2]
    temperature: Tensor | None  # fp32 [B, T, 1, 1]
    fold: int | None = None  # chunk length the rows are folded by
    local_mask: Tensor | None = None
    global_mask: Tensor | None = None  # [B, 1, T, S]
    keys: Callable[[Tensor], Tensor] | None = None  # [B, T, K, d] -> [B, S, K, d]


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean visibility [N, T, S] as an additive mask [N, 1, T, S]; once a batch instead of once a layer."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))[:, None]


def document_starts(doc_ids_BT: Tensor) -> Tensor:
    """For every token, the row index where its document begins: int64 [B, T]."""
    index = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device).expand_as(doc_ids_BT)
    begins = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    begins[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return torch.where(begins, index, 0).cummax(dim=1).values


def make_layout(config: ModelConfig, tokens_BT: Tensor, doc_ids_BT: Tensor | None, cache, freqs, dtype) -> Layout:
    """Everything about positions and visibility that does not depend on the layer."""
    B, T = tokens_BT.shape
    device, C = tokens_BT.device, config.chunk
    if cache is not None:
        positions = cache.positions_BT(T)
        return Layout(rope.rotation(positions, freqs), _temperature(positions, config))
    index = torch.arange(T, device=device).expand(B, T)
    if doc_ids_BT is None:
        fold = C if T > C else None
        return Layout(rope.rotation(index[:1], freqs), _temperature(index[:1], config), fold)
    start = document_starts(doc_ids_BT)
    positions = index - start
    layout = Layout(rope.rotation(positions, freqs), _temperature(positions, config))
    if (start > 0).any():
        same = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
        layout.global_mask = _additive(same & (index[:, :, None] >= index[:, None, :]), dtype)
    if T > C and bool(((start % C == 0) | (start // C == index // C)).all()):
        layout.fold = C
        padded = F.pad(doc_ids_BT, (0, -T % C), value=-2).reshape(-1, C)
        if (padded != padded[:, :1]).any():
            order = torch.arange(C, device=device)
            same = padded[:, :, None] == padded[:, None, :]
            layout.local_mask = _additive(same & (order[:, None] >= order), dtype)
    elif T <= C:
        layout.local_mask = layout.global_mask
    else:  # documents off the grid: exact, but with a mask over the whole row
        chunk = positions // C
        same = (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]) & (chunk[:, :, None] == chunk[:, None, :])
        layout.local_mask = _additive(same & (index[:, :, None] >= index[:, None, :]), dtype)
    return layout


def _temperature(positions_BT: Tensor, config: ModelConfig) -> Tensor | None:
    return rope.temperature(positions_BT, config)[..., None, None] if config.temperature_tuning else None


class Attention(nn.Module):
    """One attention layer; `nope` layers are global, the others local."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.nope = config, layer, config.is_nope(layer)
        heads = config.n_heads + 2 * config.n_kv_heads
        self.wqkv = nn.Linear(config.d_model, heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        c = self.config
        B, T, _ = x_BTD.shape
        qkv = ops.linear(x_BTD, self.wqkv.weight).view(B, T, -1, c.head_dim)
        qk, v = qkv.split([c.n_heads + c.n_kv_heads, c.n_kv_heads], dim=2)
        if self.nope:
            q, k = qk.split([c.n_heads, c.n_kv_heads], dim=2)
            if layout.temperature is not None:
                q = (q * layout.temperature).to(x_BTD.dtype)
        else:
            qk = rope.rotate(qk, layout.rotation)
            if c.qk_norm:
                qk = ops.rms_norm(qk, None, c.norm_eps)
            q, k = qk.to(x_BTD.dtype).split([c.n_heads, c.n_kv_heads], dim=2)
        if cache is not None:
            out_BTHd = self._cached(q, k, v, cache)
        elif self.nope:
            if layout.keys is not None:
                k, v = layout.keys(k), layout.keys(v)
            out_BTHd = attend(q, k, v, layout.global_mask)
        else:
            out_BTHd = self._local(q, k, v, layout)
        return ops.linear(out_BTHd.reshape(B, T, -1), self.wo.weight)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if layout.fold is None:
            return attend(q, k, v, layout.local_mask)
        B, T = q.shape[:2]
        pad = -T % layout.fold  # at the end, so causal attention never sees it
        if pad:
            q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
        q, k, v = (t.reshape(-1, layout.fold, *t.shape[2:]) for t in (q, k, v))
        return attend(q, k, v, layout.local_mask).reshape(B, T + pad, *q.shape[2:])[:, :T]

    def _cached(self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, cache: Cache) -> Tensor:
        k, v, mask_BTS = cache.extend(self.layer, k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2))
        q = q_BTHd.transpose(1, 2)
        B, H, T, d = q.shape
        if mask_BTS is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True).transpose(1, 2)
        if T == 1:  # the query heads of one key head become its "time" axis: keys are read once
            q = q.reshape(B, k.shape[1], -1, d)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS[:, None])
            return out.reshape(B, 1, H, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS[:, None], enable_gqa=True)
        return out.transpose(1, 2)


EXPLICIT_UP_TO = 512  # keys; see `attend`


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """Attention with grouped heads and 1/sqrt(d): masked, or causal, or over everything; [B, T, H, d].

    mask: additive, [B, 1, T, S] for S keys; it says everything, `causal` counts only without one (S == T).
    torch's fused kernel everywhere, but for bfloat16 over short rows on a CPU: there its backward runs far below the
    matrix units' speed, and two batched products around a softmax are 2-4 x faster (docs/LOG.md). On a GPU the kernel
    that takes a mask takes no grouped heads: keys are repeated, or torch would write out all scores instead.
    """
    T = q_BTHd.shape[1]
    if q_BTHd.dtype == torch.bfloat16 and q_BTHd.device.type == "cpu" and T <= EXPLICIT_UP_TO:
        return _explicit(q_BTHd, k_BTKd, v_BTKd, _causal(T, q_BTHd.dtype) if mask is None and causal else mask)
    q, k, v = (t.transpose(1, 2) for t in (q_BTHd, k_BTKd, v_BTKd))
    causal = causal and mask is None
    if mask is not None and q.is_cuda:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    grouped = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


@lru_cache(maxsize=8)
def _causal(T: int, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [1, 1, T, T] on the CPU."""
    return torch.full((T, T), float("-inf"), dtype=dtype).triu_(1)[None, None]


def _explicit(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v; the query heads of a key head share one product."""
    B, T, H, d = q_BTHd.shape
    K = k_BTKd.shape[2]
    q = (q_BTHd * d**-0.5).view(B, T, K, H // K, d).permute(0, 2, 3, 1, 4).reshape(B, K, -1, d)
    k, v = k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2)
    scores = torch.matmul(q, k.transpose(-1, -2))
    S = k.shape[2]
    if mask is not None:
        scores = scores.view(B, K, H // K, T, S) + mask[:, :, None]
    weights = torch.softmax(scores, dim=-1).view(B, K, -1, S)
    return torch.matmul(weights, v).view(B, K, H // K, T, d).permute(0, 3, 1, 2, 4).reshape(B, T, H, d)
