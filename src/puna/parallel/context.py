"""Chunk-aware context parallelism, and sequence parallelism beside it: which of a row's tokens a process has.

Three of four Llama 4 layers attend inside chunks. So a row is cut *between* chunks, and these layers need nothing from
any other process: the batch is folded by chunks anyway. Only the NoPE layers look further: they gather the keys and
values of the whole row (n_kv_heads of them, not the queries), 2 x K x d numbers a token and a layer in four.

A causal query at the row's end sees more than one at its start. So process r of n takes the r-th of 2n equal runs of
chunks and the r-th from the end: the same work for all ("head-tail", as for ring attention). A row of only n chunks is
cut in n.

    2 processes, 8 chunks     0 1 | 2 3   4 5 | 6 7      process 0: 0 1 6 7, process 1: 2 3 4 5

Tensor parallelism cuts what a process has once more, in tp equal runs, wherever no heads or columns are cut: norms,
router, experts, loss (arXiv 2205.05198); attention and feed-forwards gather it (`apply.py`).

Pictures: the processes of a row share its tiles evenly, encode them and gather the features. A tower whose parameters
are sharded must run on all processes or none, so where some have tiles the others encode an empty one for nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import PunaError
from puna.model import Llama4
from puna.model.attention import Layout as Positions
from puna.model.span import Span
from puna.parallel.collectives import all_gather
from puna.parallel.mesh import Mesh


@lru_cache(maxsize=64)
def chunks_of(n_chunks: int, index: int, of: int) -> tuple[int, ...]:
    """The chunks that the index-th of `of` processes has of a row's, in order. ValueError where they don't divide."""
    if n_chunks % of:
        raise ValueError(f"{n_chunks} chunks can't be shared by {of} processes")
    if n_chunks % (2 * of):
        size = n_chunks // of
        return tuple(range(index * size, (index + 1) * size))
    size = n_chunks // (2 * of)
    head, tail = index * size, (2 * of - 1 - index) * size
    return (*range(head, head + size), *range(tail, tail + size))


class RowShare:
    """This process's share of every row (`model.Share`)."""

    def __init__(self, mesh: Mesh, chunk: int, patch_token: int | None):
        self.mesh, self.chunk, self.patch = mesh, chunk, patch_token

    def context(self, T: int) -> Tensor:
        """Places of the tokens that this context-parallel process has, int64 [T / cp]; attention works on them."""
        return self._context(T, self.mesh.at["cp"])

    def _context(self, T: int, index: int) -> Tensor:
        of, C = self.mesh.layout.cp, self.chunk
        if of == 1:
            return torch.arange(T, device=self.mesh.device)
        if T % C:
            raise PunaError(f"parallel.cp: rows of {T} tokens are no whole number of chunks of {C}")
        chunks = torch.tensor(chunks_of(T // C, index, of), device=self.mesh.device)
        return (chunks[:, None] * C + torch.arange(C, device=self.mesh.device)).flatten()

    def own(self, T: int) -> Tensor:
        """Places of the tokens that are this process's alone, int64 [T / cp / tp]."""
        return self.context(T).chunk(self.mesh.layout.tp)[self.mesh.at["tp"]]

    def cut(self, tokens_BT: Tensor, features: Tensor | None, layout: Positions):
        """Tokens and features of `own` places, and the layout for the attention over `context` places."""
        own = self.own(tokens_BT.shape[1])
        if features is not None:
            patches_BT = tokens_BT == self.patch
            number_BT = patches_BT.flatten().cumsum(0).view_as(tokens_BT) - 1  # a patch token's feature
            if int(patches_BT.sum()) != len(features):
                raise ValueError(f"{int(patches_BT.sum())} <|patch|> tokens, but {len(features)} image features")
            features = features.index_select(0, number_BT[:, own][patches_BT[:, own]])
        return tokens_BT[:, own], features, self._cut_layout(layout, *tokens_BT.shape)

    def _cut_layout(self, layout: Positions, B: int, T: int) -> Positions:
        if self.mesh.layout.cp == 1:
            return layout
        place, C, row = self.context(T), self.chunk, torch.arange(T, device=self.mesh.device)
        if layout.fold is None and T > C:
            raise PunaError("parallel.cp: documents must lie on the grid of chunks, as puna's packing lays them")
        mine = Positions(layout.rotation[:, place], None if layout.temperature is None else
                         layout.temperature[:, place], layout.fold)  # fmt: skip
        if (local := layout.local_span) is not None:
            chunks = torch.tensor(chunks_of(T // C, self.mesh.at["cp"], self.mesh.layout.cp), device=place.device)
            first = local.first_BT.unflatten(0, (-1, T // C))[:, chunks].flatten(0, 1)
            mine.local_span = Span(first, local.last_T, C)
        everything = layout.global_span or Span(torch.zeros(B, T, dtype=torch.int64, device=row.device), row, T)
        mine.global_span = everything.cut(place)
        mine.keys = self.keys
        return mine

    def keys(self, k_BTKd: Tensor) -> Tensor:
        """Keys (or values) of the whole row in its order, [B, T, K, d]."""
        of = self.mesh.layout.cp
        gathered = all_gather(k_BTKd, 1, self.mesh.cp)
        T = gathered.shape[1]
        came = torch.cat([self._context(T, r) for r in range(of)])
        return gathered.index_select(1, torch.argsort(came))

    def of_batch(self, x_BT: Tensor) -> Tensor:
        """`own` places of something [B, T, ...]."""
        return x_BT.index_select(1, self.own(x_BT.shape[1]))

    def features(self, model: Llama4, tiles: Tensor | None) -> Tensor | None:
        """[n, D] of the rows' n tiles, each encoded by one process of the row; None where no process has any."""
        found = 0 if tiles is None else len(tiles)
        most = torch.tensor(found, device=self.mesh.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.mesh.stage)
        if not int(most):
            return None
        if model.vision is None:
            raise PunaError("this model has no vision tower (config.vision is None), but pictures were given")
        config, of = model.config.vision, self.mesh.layout.cp * self.mesh.layout.tp
        share = max(1, -(-found // of))
        padded = torch.zeros(of * share, 3, config.image_size, config.image_size, device=self.mesh.device)
        if found:
            padded[:found] = tiles
        mine = padded[self.mesh.at["row"] * share : (self.mesh.at["row"] + 1) * share]
        encoded = model.vision(mine.to(model.dtype))
        return all_gather(encoded, 0, self.mesh.row)[:found].flatten(0, 1)
