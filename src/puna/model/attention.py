"""Grouped-query attention in Llama 4's two kinds, and the plan (`Layout`) that all layers of one batch share.

*Local* layers (three of four) rotate queries and keys, normalise them (Scout: weightless RMS per head, *after* the
rotation) and attend inside their own chunk: query p sees keys floor(p / C) * C .. p. It is no sliding window.
*Global* NoPE layers see the whole document, with the query's temperature. (llama4-facts.md §1.6)

**No mask for chunks.** A [B, T] batch with T a multiple of C is a [B * T/C, C] batch of plainly causal sequences: the
fold costs nothing and runs on any device. Packed rows keep this exact when a document longer than C starts on a
multiple of C and a shorter one never straddles one; short documents that share a chunk are told apart by a `Span`
(span.py). Rows that break the rule are still computed correctly, without the fold.

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
from puna.model.regions import region
from puna.model.span import Span


class Cache(Protocol):
    """What the model needs of a key-value cache; positions count from the document's start."""

    def positions_BT(self, T: int) -> Tensor:
        """int64 [B, T]: positions of the T tokens that are fed now."""

    def attend(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Stores this layer's new keys and values; returns the attention of its queries, [B, T, H, d]."""


@dataclass
class Layout:
    """Positions, rotations and what queries see in one batch, shared by all layers.

    `local_span` is over the keys of a chunk [B * n, C] where rows are folded, else over the row; None: plain causal.
    `keys` brings the keys and values that global layers see where a row's tokens are spread over several processes.
    """

    rotation: Tensor  # [B, T, 1, d/2, 2]
    temperature: Tensor | None  # fp32 [B, T, 1, 1]
    fold: int | None = None  # chunk length the rows are folded by
    local_span: Span | None = None
    global_span: Span | None = None
    keys: Callable[[Tensor], Tensor] | None = None  # [B, T, K, d] -> [B, S, K, d]


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
    last_T = index[0]
    if (start > 0).any():
        layout.global_span = Span(start, last_T, T)
    if T > C and bool(((start % C == 0) | (start // C == index // C)).all()):
        layout.fold = C
        first = F.pad(start, (0, -T % C)).reshape(-1, C) - torch.arange(0, T, C, device=device).repeat(B)[:, None]
        if (first > 0).any():  # documents that share a chunk; whoever began before it sees it from its start
            layout.local_span = Span(first.clamp(min=0), torch.arange(C, device=device), C)
    elif T <= C:
        layout.local_span = layout.global_span
    else:  # documents off the grid: exact, but without the fold
        layout.local_span = Span(index - positions % C, last_T, T)
    return layout


def _temperature(positions_BT: Tensor, config: ModelConfig) -> Tensor | None:
    return rope.temperature(positions_BT, config)[..., None, None] if config.temperature_tuning else None


@region
def rotated(qk_BTHd: Tensor, rotation: Tensor, norm_eps: float | None) -> Tensor:
    """Local layers' queries and keys: turned, then (with an epsilon) normalised, in their own dtype."""
    turned = rope.rotate(qk_BTHd, rotation)
    return (turned if norm_eps is None else ops.rms_norm(turned, None, norm_eps)).to(qk_BTHd.dtype)


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
            turned = rotated(qk, layout.rotation, c.norm_eps if c.qk_norm else None)
            q, k = turned.split([c.n_heads, c.n_kv_heads], dim=2)
        if cache is not None:
            out_BTHd = cache.attend(self.layer, q, k, v)
        elif self.nope:
            if layout.keys is not None:
                k, v = layout.keys(k), layout.keys(v)
            out_BTHd = attend(q, k, v, layout.global_span, causal=layout.keys is None)
        else:
            out_BTHd = self._local(q, k, v, layout)
        return ops.linear(out_BTHd.reshape(B, T, -1), self.wo.weight)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        if layout.fold is None:
            return attend(q, k, v, layout.local_span)
        B, T = q.shape[:2]
        pad = -T % layout.fold  # at the end, so causal attention never sees it
        if pad:
            q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
        q, k, v = (t.reshape(-1, layout.fold, *t.shape[2:]) for t in (q, k, v))
        return attend(q, k, v, layout.local_span).reshape(B, T + pad, *q.shape[2:])[:, :T]
