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

* *Global* layers (NoPE, every fourth) see everything: slot = p, and the storage grows.

        after p = 6:   [k0 k1 k2 k3 k4 k5 k6 .  ]           capacity 8, doubled when full

Bytes a sequence of n tokens holds, with K key/value heads of d numbers of b bytes:

        hybrid = 2·K·d·b · (local layers · min(n, C) + global layers · n)          all layers = 2·K·d·b · layers · n

With 3 local layers to 1 global, the hybrid cache tends to a quarter of the other one (serving-and-evaluation.md B.1).

Storage is one slab [rows, K, capacity, d] a layer for keys and one for values. A *row* is one sequence. A forward
pass works on a `View`: some rows and the T tokens fed to each now; the view is what the model's attention sees
(protocol `puna.model.attention.Cache`). Rows that are neighbours are read in place; others are gathered (a copy),
so the engine keeps the rows it decodes together. Rows share their capacity, the longest one's: the price of reading
a batch without a copy.

A slice of T tokens must not straddle a chunk border (the caller cuts prompts there; `room` says how much fits).
Shorter sequences are padded on the right: the padding's keys land in slots which are not valid yet, and the real
tokens later overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.errors import PunaError
from puna.model.config import ModelConfig

MIN_CAPACITY = 64
MAX_GROWTH = 2**16  # slots; a sequence of a million tokens should not double for its next one


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


class _Slab:
    """Keys and values of one layer, [rows, K, capacity, d] each; both axes grow by doubling, up to their limits."""

    def __init__(self, heads: int, width: int, limit: int, dtype: torch.dtype, device: torch.device):
        self.limit = limit
        self.key = torch.zeros(0, heads, 0, width, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)

    def reserve(self, rows: int, slots: int, max_rows: int) -> None:
        have_rows, heads, have_slots, width = self.key.shape
        slots = min(slots, self.limit)
        if rows <= have_rows and slots <= have_slots:
            return
        if rows > have_rows:
            have_rows = min(max(rows, 2 * have_rows), max_rows)
        if slots > have_slots:
            have_slots = min(max(slots, have_slots + min(have_slots, MAX_GROWTH), MIN_CAPACITY), self.limit)
        # Plain tensors, so that a cache made under inference_mode can be used outside it; zeros, since an attention
        # weight of 0 times an uninitialised NaN would be NaN.
        with torch.inference_mode(False):
            for name in ("key", "value"):
                old = getattr(self, name)
                new = old.new_zeros(have_rows, heads, have_slots, width)
                if old.numel():
                    new[: old.shape[0], :, : old.shape[2]] = old
                setattr(self, name, new)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


class HybridCache:
    """Keys and values of up to `rows` sequences of up to `max_context` tokens; `lengths[row]` of each are stored.

    The engine asks for a `view` of some rows, runs the model with it, and then calls `advance`. Until then nothing
    has happened: a forward pass that failed can be repeated, as its keys lie beyond the valid length.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_context: int | None = None,
    ):
        if rows < 1:
            raise PunaError(f"the cache needs at least one row, not {rows}")
        self.config, self.rows, self.dtype, self.device = config, rows, dtype, torch.device(device)
        self.max_context = max_context or config.max_context
        self.local = local_layers(config)
        self.lengths = [0] * rows
        self._allocate()

    def _allocate(self) -> None:
        c, everything = self.config, self.max_context
        limits = [min(c.chunk, everything) if local else everything for local in self.local]
        self.slabs = [_Slab(c.n_kv_heads, c.head_dim, limit, self.dtype, self.device) for limit in limits]

    # ---- rows

    def reserve(self, rows: int, length: int) -> None:
        """Makes room at once for rows 0 … rows-1 of `length` tokens (a long prompt then grows without doublings)."""
        for slab in self.slabs:
            slab.reserve(rows, length, self.rows)

    def room(self, row: int) -> int:
        """How many tokens the row can take in one slice: up to its next chunk border."""
        return self.config.chunk - self.lengths[row] % self.config.chunk

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """The forward pass is done: counts[i] of the tokens fed to rows[i] are real and now valid."""
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count

    def free(self, row: int, wipe: bool = False) -> None:
        """Empties the row. `wipe` also zeroes it: after a failure it may hold NaN, which even a mask lets through."""
        self.lengths[row] = 0
        if wipe:
            for slab in self.slabs:
                slab.key[row : row + 1].zero_()
                slab.value[row : row + 1].zero_()

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target` (whose content is lost); only valid slots are copied."""
        self._copy(source, target)
        self.lengths[target], self.lengths[source] = self.lengths[source], 0

    def swap(self, a: int, b: int) -> None:
        """Exchanges two rows."""
        self._copy(a, b, exchange=True)
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]

    def _copy(self, source: int, target: int, exchange: bool = False) -> None:
        if source == target:
            return
        length = max(self.lengths[source], self.lengths[target]) if exchange else self.lengths[source]
        if not length:  # a row that waits for its first slice, maybe beyond the storage there is
            return
        self.reserve(max(source, target) + 1, length)
        for slab in self.slabs:
            stop = min(length, slab.limit)  # a local buffer past its first border: all of it, dead slots included
            for store in (slab.key, slab.value):
                kept = store[target, :, :stop].clone() if exchange else None
                store[target, :, :stop] = store[source, :, :stop]
                if kept is not None:
                    store[source, :, :stop] = kept

    def release(self) -> None:
        """Gives all storage back (the engine does when it runs empty after a very long sequence)."""
        self.lengths = [0] * self.rows
        self._allocate()

    @property
    def nbytes(self) -> int:
        """Bytes of storage held now, unused capacity included."""
        return sum(slab.nbytes for slab in self.slabs)

    # ---- the forward pass

    def view(self, rows: Sequence[int], tokens: int) -> View:
        """The cache as a batch of these rows, each fed `tokens` more tokens (in the order of `rows`)."""
        return View(self, list(rows), tokens)


class _Window:
    """Where this step's keys go in layers of one kind, which stored ones are read, and which each query may see.

    `first[i]` is the slot of row i's first new token; keys of slots 0 … stop-1 are read.
    """

    def __init__(self, first: list[int], tokens: int, device: torch.device):
        self.stop = max(first) + tokens
        self.first = first[0] if min(first) == max(first) else None  # None: rows stand at different slots
        self.causal = self.stop == tokens  # nothing stored before: plain causal attention among the new tokens
        if self.causal:
            self.slots_BT = self.mask_BTS = None
            return
        slots_BT = torch.tensor([[self.first]] if self.first is not None else [[f] for f in first], device=device)
        slots_BT = slots_BT + torch.arange(tokens, device=device)
        self.mask_BTS = torch.arange(self.stop, device=device) <= slots_BT[:, :, None]
        self.mask_BTS = self.mask_BTS.expand(len(first), tokens, self.stop)
        self.slots_BT = slots_BT if self.first is None else None


class View:
    """One forward pass's sight of the cache (implements `puna.model.attention.Cache`)."""

    def __init__(self, cache: HybridCache, rows: list[int], tokens: int):
        if not rows or tokens < 1:
            raise ValueError("a view needs at least one row and one token")
        chunk, starts = cache.config.chunk, [cache.lengths[row] for row in rows]
        for row, start in zip(rows, starts, strict=True):
            if start + tokens > cache.max_context:
                raise PunaError(
                    f"{start + tokens} tokens do not fit in the context of {cache.max_context}; shorten the prompt"
                )
            if start % chunk + tokens > chunk:
                raise ValueError(
                    f"row {row}: a slice of {tokens} tokens from {start} straddles a border of chunks of {chunk}"
                )
        cache.reserve(max(rows) + 1, max(starts) + tokens)
        self.cache, self.starts, self.tokens = cache, starts, tokens
        neighbours = rows == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if neighbours else torch.tensor(rows, device=cache.device)
        self._rows_B1 = torch.tensor(rows, device=cache.device)[:, None]
        self._global = _Window(starts, tokens, cache.device)
        local = [start % chunk for start in starts]
        self._local = self._global if local == starts else _Window(local, tokens, cache.device)

    def positions_BT(self, tokens: int) -> Tensor:
        """Positions in the document of the tokens fed now: int64 [B, T]."""
        if tokens != self.tokens:
            raise ValueError(f"this view was made for {self.tokens} tokens a row, not {tokens}")
        device = self.cache.device
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(tokens, device=device)

    def extend(self, layer: int, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores the layer's new keys and values; returns all [B,K,S,d] and who sees what [B,T,S] (None: causal)."""
        slab = self.cache.slabs[layer]
        window = self._local if self.cache.local[layer] else self._global
        if window.first is not None:
            slab.key[self.rows, :, window.first : window.stop] = k_BKTd.to(slab.key.dtype)
            slab.value[self.rows, :, window.first : window.stop] = v_BKTd.to(slab.value.dtype)
        else:
            slab.key[self._rows_B1, :, window.slots_BT] = k_BKTd.transpose(1, 2).to(slab.key.dtype)
            slab.value[self._rows_B1, :, window.slots_BT] = v_BKTd.transpose(1, 2).to(slab.value.dtype)
        if window.causal:
            return k_BKTd, v_BKTd, None
        return slab.key[self.rows, :, : window.stop], slab.value[self.rows, :, : window.stop], window.mask_BTS
