"""The hybrid key/value cache: what iRoPE saves when a model is served.

Llama 4 has two kinds of attention layer (llama4-facts.md §1.6), and they remember differently:

* *Local* layers (RoPE) see only their own chunk of C tokens: position p sees floor(p/C)·C … p. Chunked is **not** a
  sliding window: at a border the past is gone at once. So a sequence needs C slots, slot = p mod C, of which 0 … p
  mod C hold keys that may be seen. No ring arithmetic, nothing to trim: the buffer starts again from slot 0 at each
  border.

        C = 4          p = 0 1 2 3 | 4 5 6 ...              the buffer of one local layer
        after p = 3:   [k0 k1 k2 k3]                        seen by p = 3: all four
        after p = 4:   [k4 k1 k2 k3]                        seen by p = 4: slot 0 alone; k1 k2 k3 are dead
        after p = 6:   [k4 k5 k6 k3]                        seen by p = 6: slots 0..2

* *Global* layers (NoPE, every fourth) see everything. They are stored in *pages* of P tokens (a chunk or a part of
  one), which lie anywhere; the sequence lists its pages (pages.py, scheduler.py):

        P = 2          pages of this sequence: 5 0 7 1      key of p is in page pages[p // P], slot p mod P

Bytes a sequence of n tokens holds, with K key/value heads of d numbers of b bytes:

        hybrid = 2·K·d·b · (local layers · min(n, C) + global layers · n)          all layers = 2·K·d·b · layers · n

With 3 local layers to 1 global, the hybrid cache tends to a quarter of the other one (serving-and-evaluation.md B.1).

Storage of a layer is [units, K, slots, d] for keys and as much for values. A unit is a sequence's *row* with C slots in
a local layer, a page with P slots in a global one. A forward pass works on a `View`: some sequences and the tokens fed
to each now. What it reads is not copied where that counts:

* One token for each sequence (decoding). Local: the rows are neighbours (the scheduler sees to it) and one kernel reads
  them in place. Global: pages that are neighbours are one batch of pages, each with the queries of those who read it;
  the parts are joined by their weights (model/attend.py). A page which n answers share is read once for all.
* A slice of a prompt. The new tokens see each other causally and everything before them without a mask; the two parts
  are joined. Pages are brought together for this, some thousand keys at a time, which costs little beside the slice.

Nothing is valid before the scheduler counts it (`fed`): a forward pass that failed can be repeated.

A slice of T tokens must not straddle a chunk border. Shorter sequences are padded on the right, where causal attention
never looks; only real tokens are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.errors import PunaError
from puna.model.attend import join, join_rows, part
from puna.model.config import ModelConfig

MAX_PAGE = 256  # tokens
MAX_GROWTH = 2**16  # tokens; a sequence of a million should not double the storage for its next one
MIN_SLOTS = 64
PIECE = 8192  # keys of pages that are brought together at once


def local_layers(config: ModelConfig) -> tuple[bool, ...]:
    """For each layer: is it local (RoPE, chunked)? The others are global (NoPE)."""
    return tuple(not config.is_nope(layer) for layer in range(config.n_layers))


def bytes_per_sequence(config: ModelConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values one sequence of `length` tokens needs in the hybrid cache (formula above)."""
    local = sum(local_layers(config))
    slots = local * min(length, config.chunk) + (config.n_layers - local) * length
    return 2 * config.n_kv_heads * config.head_dim * dtype.itemsize * slots


def bytes_all_layers(config: ModelConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes the same sequence would need if every layer kept every token, as engines without a hybrid cache do."""
    return 2 * config.n_kv_heads * config.head_dim * dtype.itemsize * config.n_layers * length


def page_size(config: ModelConfig) -> int:
    """Tokens of a page: the largest part of a chunk, in whole numbers, up to MAX_PAGE."""
    return next(n for n in range(min(MAX_PAGE, config.chunk), 0, -1) if config.chunk % n == 0)


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a page in all global layers."""
    layers = config.n_layers - sum(local_layers(config))
    return 2 * config.n_kv_heads * config.head_dim * dtype.itemsize * layers * page_size(config)


@dataclass
class Place:
    """Where a sequence's keys and values lie, and how many tokens of it are stored (whatever has these will do)."""

    row: int
    pages: list[int]
    fed: int = 0


class _Slab:
    """Keys and values of one layer, [units, K, slots, d] each; grows by doubling, up to its limits."""

    def __init__(self, heads: int, width: int, units: int, slots: int, dtype: torch.dtype, device: torch.device):
        self.units, self.slots = units, slots
        self.key = torch.zeros(0, heads, 0, width, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)

    def reserve(self, units: int, slots: int) -> None:
        have, heads, have_slots, width = self.key.shape
        slots = min(slots, self.slots)
        if units <= have and slots <= have_slots:
            return
        if units > have:
            have = min(max(units, have + min(have, max(1, MAX_GROWTH // slots))), self.units)
        if slots > have_slots:
            have_slots = min(max(slots, 2 * have_slots, MIN_SLOTS), self.slots)
        self._resize(have, heads, have_slots, width)

    def shrink(self, units: int) -> None:
        """Gives back all behind the first units."""
        if units < len(self.key):
            self._resize(units, *self.key.shape[1:])

    def _resize(self, *shape: int) -> None:
        # Plain tensors, so that a cache made under inference_mode can be used outside it; zeros, since an attention
        # weight of 0 times an uninitialised NaN would be NaN.
        with torch.inference_mode(False):
            for name in ("key", "value"):
                old = getattr(self, name)
                new = old.new_zeros(shape)
                units, slots = min(len(old), len(new)), old.shape[2]
                new[:units, :, :slots] = old[:units]
                setattr(self, name, new)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


class HybridCache:
    """Keys and values of up to `rows` sequences, in local layers, and of up to `pages` pages, in global ones.

    It knows nothing of sequences: who has which row and pages is told with every view.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        pages: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if rows < 1 or pages < 1:
            raise PunaError(f"the cache needs at least one row and one page, not {rows} and {pages}")
        self.config, self.page, self.dtype, self.device = config, page_size(config), dtype, torch.device(device)
        self.piece = max(1, PIECE // self.page) * self.page
        self.local = local_layers(config)
        shapes = [(rows, config.chunk) if local else (pages, self.page) for local in self.local]
        heads, width = config.n_kv_heads, config.head_dim
        self.slabs = [_Slab(heads, width, *shape, dtype, self.device) for shape in shapes]

    def reserve(self, rows: int, slots: int, pages: int) -> None:
        """Makes room for rows 0 … rows-1 with so many slots, and for pages 0 … pages-1."""
        for slab, local in zip(self.slabs, self.local, strict=True):
            slab.reserve(*((rows, slots) if local else (pages, self.page)))

    def shrink(self, rows: int, pages: int) -> None:
        """Gives storage back: of rows and pages behind the first ones."""
        for slab, local in zip(self.slabs, self.local, strict=True):
            slab.shrink(rows if local else pages)

    @property
    def nbytes(self) -> int:
        """Bytes of storage held now, unused capacity included."""
        return sum(slab.nbytes for slab in self.slabs)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Row `source` becomes row `target`, whose content is lost; only the first slots count."""
        self._copy(source, target, tokens, False)

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchanges two rows."""
        self._copy(a, b, tokens, True)

    def _copy(self, source: int, target: int, tokens: int, exchange: bool) -> None:
        if not tokens:  # a row without a token in this chunk, maybe beyond the storage there is
            return
        self.reserve(max(source, target) + 1, tokens, 0)
        for store in self._stores(True):
            kept = store[target, :, :tokens].clone() if exchange else None
            store[target, :, :tokens] = store[source, :, :tokens]
            if kept is not None:
                store[source, :, :tokens] = kept

    def wipe(self, row: int, pages: Sequence[int]) -> None:
        """Zeroes them: after a failure they may hold NaN, which even a mask lets through."""
        for local, units in ((True, [row]), (False, pages)):
            for store in self._stores(local):
                store[[unit for unit in units if unit < len(store)]] = 0

    def _stores(self, local: bool) -> list[Tensor]:
        slabs = [slab for slab, kind in zip(self.slabs, self.local, strict=True) if kind == local]
        return [store for slab in slabs for store in (slab.key, slab.value)]

    def view(self, places: Sequence[Place], tokens: Sequence[int], rows: int = 0) -> View:
        """These sequences as a batch, the i-th fed tokens[i] more tokens. Rows of the batch behind them, up to `rows`
        in all, stand for nobody."""
        return View(self, places, tokens, rows)


class View:
    """One forward pass's sight of the cache (implements `puna.model.attention.Cache`)."""

    def __init__(self, cache: HybridCache, places: Sequence[Place], tokens: Sequence[int], rows: int = 0):
        if not places or len(places) != len(tokens) or min(tokens) < 1:
            raise ValueError("a view needs at least one sequence, and at least one token for each")
        chunk, page = cache.config.chunk, cache.page
        self.cache, self.places, self.width, self.batch = cache, places, max(tokens), max(rows, len(places))
        self.starts = [place.fed for place in places]
        self.first = [start % chunk for start in self.starts]  # slot of the first new token in local layers
        for place, n, first in zip(places, tokens, self.first, strict=True):
            if first + n > chunk:
                raise ValueError(f"{n} tokens from {place.fed} on straddle a border of chunks of {chunk}")
            if place.fed + n > len(place.pages) * page:
                raise ValueError(f"{place.fed + n} tokens do not fit in {len(place.pages)} pages of {page}")
        last = max(max(place.pages) for place in places)
        slots = max(first + n for first, n in zip(self.first, tokens, strict=True))
        cache.reserve(max(place.row for place in places) + 1, slots, last + 1)
        # Of each new token: which of the batch it is, and its unit and slot in layers of both kinds.
        new = [(i, t, s + t) for i, (s, n) in enumerate(zip(self.starts, tokens, strict=True)) for t in range(n)]
        self._new = self._index([i for i, _, _ in new]), self._index([t for _, t, _ in new])
        self._local = self._index([places[i].row for i, _, _ in new]), self._index([p % chunk for _, _, p in new])
        pages = self._index([places[i].pages[p // page] for i, _, p in new])
        self._global = pages, self._index([p % page for _, _, p in new])

    def _index(self, numbers: Sequence) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.cache.device)

    def positions_BT(self, tokens: int) -> Tensor:
        """Positions in the document of the tokens fed now: int64 [B, T]."""
        if tokens != self.width:
            raise ValueError(f"this view was made for {self.width} tokens a row, not {tokens}")
        starts = self.starts + [0] * (self.batch - len(self.starts))
        return self._index(starts)[:, None] + torch.arange(tokens, device=self.cache.device)

    def attend(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Stores the layer's new keys and values; returns what the queries see of them and of all before."""
        slab, local = self.cache.slabs[layer], self.cache.local[layer]
        unit_N, slot_N = self._local if local else self._global
        slab.key[unit_N, :, slot_N] = k_BTKd[self._new].to(slab.key.dtype)
        slab.value[unit_N, :, slot_N] = v_BTKd[self._new].to(slab.value.dtype)
        if self.width > 1:
            return self._slice(slab, local, q_BTHd, k_BTKd, v_BTKd)
        q_BKRd = q_BTHd.reshape(len(q_BTHd), k_BTKd.shape[2], -1, q_BTHd.shape[-1])  # queries of one key as one's
        out_BKRd = self._rows(slab, q_BKRd) if local else self._pages(slab, q_BKRd)
        return out_BKRd.to(q_BTHd.dtype).reshape(q_BTHd.shape)

    # ---- one token each

    def _rows(self, slab: _Slab, q_BKRd: Tensor) -> Tensor:
        """Local layers: slots 0 … first of each row, and no more."""
        rows = [place.row for place in self.places]
        neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
        which = slice(rows[0], rows[0] + len(rows)) if neighbours else rows
        key, value = (x[which, :, : max(self.first) + 1] for x in (slab.key, slab.value))
        return F.scaled_dot_product_attention(q_BKRd, key, value, attn_mask=self._rows_mask)

    @cached_property
    def _rows_mask(self) -> Tensor | None:
        """[B, 1, 1, S], or None where all rows stand at the same slot."""
        return self._hide(self.first, max(self.first) + 1)

    def _hide(self, last: Sequence[int], slots: int) -> Tensor | None:
        """Additive mask [n, 1, 1, slots] of the slots behind the last ones; None if there are none."""
        if min(last) + 1 >= slots:
            return None
        hidden_nS = torch.arange(slots, device=self.cache.device) > self._index(last)[:, None]
        mask_nS = torch.zeros(hidden_nS.shape, dtype=self.cache.dtype, device=self.cache.device)
        return mask_nS.masked_fill_(hidden_nS, float("-inf"))[:, None, None]

    def _pages(self, slab: _Slab, q_BKRd: Tensor) -> Tensor:
        """Global layers: run by run, then joined."""
        parts, weights = [], []
        for pages, row_nW, mask in self._runs:
            q_nKWd = q_BKRd[row_nW].transpose(1, 2).flatten(2, 3)  # all that read a page, as one's queries
            out, weight = part(q_nKWd, slab.key[pages], slab.value[pages], mask)
            readers = row_nW.shape[1]
            parts.append(out.unflatten(2, (readers, -1)).transpose(1, 2).flatten(0, 1))
            weights.append(weight.unflatten(2, (readers, -1)).transpose(1, 2).flatten(0, 1))
        row_N = torch.cat([row_nW.flatten() for _, row_nW, _ in self._runs])
        if len(row_N) == len(q_BKRd):  # a page each
            return torch.empty_like(q_BKRd).index_copy_(0, row_N, torch.cat(parts))
        return join_rows(torch.cat(parts), torch.cat(weights), row_N, len(q_BKRd))

    @cached_property
    def _runs(self) -> list[tuple[slice, Tensor, Tensor | None]]:
        """Neighbouring pages with as many readers each: (pages, their readers [n, W], additive mask [n, 1, 1, P])."""
        size, readers, last = self.cache.page, {}, {}
        for i, (place, start) in enumerate(zip(self.places, self.starts, strict=True)):
            for page in place.pages[: start // size + 1]:
                readers.setdefault(page, []).append(i)
            last[page] = start % size  # slot of the newest token; a page with several readers is full
        runs: list[list[int]] = []
        for page in sorted(readers):
            if runs and page == runs[-1][-1] + 1 and len(readers[page]) == len(readers[runs[-1][0]]):
                runs[-1].append(page)
            else:
                runs.append([page])
        return [
            (slice(run[0], run[-1] + 1), self._index([readers[page] for page in run]),
             self._hide([last.get(page, size - 1) for page in run], size))
            for run in runs
        ]  # fmt: skip

    # ---- a slice

    def _slice(self, slab: _Slab, local: bool, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """The new tokens among themselves, joined with each row's past."""
        q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTKd, v_BTKd))
        out_BHTd, weight_BHT = part(q, k, v, causal=True)
        past = self.first if local else self.starts
        if any(past):
            out_BHTd = out_BHTd.float()
            rows = (1, k.shape[1], -1, q.shape[-1])  # all heads of a key and all new tokens as one's queries
            for i in (i for i, n in enumerate(past) if n):
                whole = out_BHTd[i].reshape(rows), weight_BHT[i].reshape(rows[:3])
                for key, value in self._past(slab, local, self.places[i], past[i]):
                    whole = join(whole, part(q[i].reshape(rows), key, value))
                out_BHTd[i] = whole[0].view(out_BHTd[i].shape)
        return out_BHTd.to(q_BTHd.dtype).transpose(1, 2)

    def _past(self, slab: _Slab, local: bool, place: Place, n: int):
        """Keys and values of the n tokens before, piece by piece."""
        if local:
            yield slab.key[place.row, None, :, :n], slab.value[place.row, None, :, :n]
            return
        for start in range(0, n, self.cache.piece):
            yield self._gather(slab, place, start, min(n, start + self.cache.piece))

    def _gather(self, slab: _Slab, place: Place, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens start (where a page begins) … stop-1 in one piece: [1, K, S, d]."""
        pages = self._index(place.pages[start // self.cache.page : -(-stop // self.cache.page)])
        key, value = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, : stop - start] for x in (slab.key, slab.value))
        return key, value


class Apart(View):
    """One token each, and each attends alone to its keys in one piece, so that its bits depend on nothing else.

    Successive tokens of one sequence may stand in it as if they were several.
    """

    def _rows(self, slab: _Slab, q_BKRd: Tensor) -> Tensor:
        return self._alone(q_BKRd, self.first, lambda at, n: (slab.key[at.row, None], slab.value[at.row, None]))

    def _pages(self, slab: _Slab, q_BKRd: Tensor) -> Tensor:
        return self._alone(q_BKRd, self.starts, lambda at, n: self._gather(slab, at, 0, n))

    def _alone(self, q_BKRd: Tensor, last: Sequence[int], read) -> Tensor:
        out_BKRd = torch.zeros_like(q_BKRd)
        for _, members in groupby(range(len(self.places)), lambda i: self.places[i].row):
            own = list(members)
            key, value = read(self.places[own[0]], last[own[-1]] + 1)
            for i in own:
                stop = last[i] + 1
                out_BKRd[i] = part(q_BKRd[i, None], key[:, :, :stop], value[:, :, :stop])[0]
        return out_BKRd
