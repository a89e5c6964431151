"""Grouped-query attention in Llama 4's two kinds, and the plan (`Layout`) that all layers of one batch share.

*Local* layers (three of four) rotate queries and keys, normalise them (Scout: weightless RMS per head, *after* the
rotation) and attend inside their own chunk: query p sees keys floor(p / C) * C .. p. It is no sliding window.
*Global* NoPE layers see the whole document, with the query's temperature. (llama4-facts.md §1.6)

**No mask for chunks.** A [B, T] batch with T a multiple of C is a [B * T/C, C] batch of plainly causal sequences: the
fold costs nothing and runs on any device. Packed rows keep this exact when a document longer than C starts on a
multiple of C and a shorter one never straddles one; short documents that share a chunk need one block-diagonal mask,
built once a batch. Rows that break the rule are still computed correctly, with an explicit mask of the whole row.

**Cache.** Decoding passes a `Cache`; the model hands over each layer's queries and new keys and values, and gets back
what the queries see of these and of all before. It does not know how they are stored (`engine/cache.py` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from puna.model import ops, rope
from puna.model.attend import attend
from puna.model.config import ModelConfig


class Cache(Protocol):
    """What the model needs of a key-value cache; positions count from the document's start."""

    def positions_BT(self, T: int) -> Tensor:
        """int64 [B, T]: positions of the T tokens that are fed now."""

    def attend(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Stores this layer's new keys and values; returns the attention of its queries, [B, T, H, d]."""


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
            out_BTHd = cache.attend(self.layer, q, k, v)
        elif self.nope:
            if layout.keys is not None:
                k, v = layout.keys(k), layout.keys(v)
            out_BTHd = attend(q, k, v, layout.global_mask, causal=layout.keys is None)
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
