"""Which process does what: one frozen Layout, and what of each parameter a process holds.

The world is a grid; the fastest index last, so that the most talkative neighbours are on one machine:

    rank = (((pp * DP_REPLICATE + dp_replicate) * DP_SHARD + dp_shard) * CP + cp) * TP + tp

* **pp**  a run of the blocks, or several (`pipeline.py`);
* **dp_replicate x dp_shard**  rows of the batch: FSDP shards parameters over dp_shard, HSDP copies that dp_replicate
  times;
* **cp**  whole chunks of every row (`context.py`);
* **tp**  heads of attention and columns of feed-forwards; outside of these, a part of the row's tokens (sequence
  parallel);
* **ep**  experts. It adds no processes: to the experts, each of the dp_shard x cp x tp processes that share a copy of
  the parameters is one more source of tokens, so ep divides that product and runs of ep neighbours hold one set.

Each number of a parameter lies on exactly one process of a copy. Everything that is not cut by tp or ep sees disjoint
tokens on all dp_shard x cp x tp of them, so FSDP's sum over these is its whole gradient, and no other is needed.

    what                                 cut by        sharded and summed by FSDP over
    embedding, norms, router, head,      -             dp_shard x cp x tp
    vision tower
    attention, dense FFN, shared expert  tp            dp_shard x cp
    experts                              ep            dp_shard x cp x tp / ep

A `Part` says what of the whole parameter a tensor is: in every dimension, runs of indices. Runs, not one range: wqkv
is three matrices and w13 two, and a tensor-parallel process has a piece of each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from puna.errors import PunaError
from puna.model.config import ModelConfig

Runs = tuple[tuple[int, int], ...]  # [start, stop) in order


@dataclass(frozen=True)
class Layout:
    """How many processes share each kind of work; dp_shard 0: all that are left."""

    dp_replicate: int = 1
    dp_shard: int = 0
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    pp_chunks: int = 1  # runs of blocks that each of pp processes has; more than 1 is the interleaved schedule

    def __post_init__(self):
        for name in ("dp_replicate", "cp", "tp", "pp", "ep", "pp_chunks"):
            if getattr(self, name) < 1:
                raise PunaError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if self.dp_shard < 0:
            raise PunaError(f"parallel.dp_shard must not be negative (0: what is left), got {self.dp_shard}")

    def resolve(self, world: int) -> Layout:
        """The same with dp_shard known, for so many processes. PunaError where they don't fit."""
        rest = self.dp_replicate * self.cp * self.tp * self.pp
        shard = self.dp_shard or max(1, world // rest)
        if rest * shard != world:
            raise PunaError(
                f"parallel: dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard or shard} x cp {self.cp} x tp "
                f"{self.tp} x pp {self.pp} is {rest * shard}, but there are {world} processes"
            )
        found = replace(self, dp_shard=shard)
        if found.copy % self.ep:
            raise PunaError(
                f"parallel.ep {self.ep} must divide dp_shard x cp x tp = {shard} x {self.cp} x {self.tp}: experts are "
                "spread over the processes that share one copy of the parameters"
            )
        return found

    @property
    def world(self) -> int:
        return self.pp * self.dp_replicate * self.copy

    @property
    def copy(self) -> int:
        """Processes that share one copy of a stage's parameters."""
        return self.dp_shard * self.cp * self.tp

    @property
    def rows(self) -> int:
        """Parts that a step's rows are cut in."""
        return self.dp_replicate * self.dp_shard

    def check(self, config: ModelConfig, seq_len: int, rows: int, accumulate: int) -> None:
        """PunaError naming the setting that does not divide."""
        need = [
            ("tp", "n_heads", config.n_heads), ("tp", "n_kv_heads", config.n_kv_heads),
            ("tp", "expert_width", config.expert_width), ("tp", "dense_width", config.dense_width),
        ]  # fmt: skip
        if any(config.is_moe(i) for i in range(config.n_layers)):
            need.append(("ep", "n_experts", config.n_experts))
        elif self.ep > 1:
            raise PunaError("parallel.ep: the model has no experts")
        for name, what, size in need:
            if size % getattr(self, name):
                raise PunaError(f"parallel.{name} {getattr(self, name)} must divide model.{what} {size}")
        if self.pp * self.pp_chunks > config.n_layers:
            raise PunaError(
                f"parallel.pp {self.pp} x pp_chunks {self.pp_chunks} exceeds model.n_layers {config.n_layers}"
            )
        if self.pp_chunks > 1 and (self.pp == 1 or accumulate % self.pp):
            raise PunaError(
                f"parallel.pp_chunks {self.pp_chunks}: parallel.pp must be more than 1 (it is {self.pp}) and divide "
                f"train.accumulate {accumulate}"
            )
        if self.pp > 1 and config.tie_embeddings:
            raise PunaError("parallel.pp: the model ties its head to its embedding, which would be on two processes")
        if self.cp > 1 and seq_len % (self.cp * config.chunk):
            raise PunaError(
                f"parallel.cp {self.cp}: rows are cut between chunks, so data.seq_len {seq_len} must be a multiple of "
                f"cp x model.chunk = {self.cp * config.chunk} (of twice that, for even work in global layers)"
            )
        if seq_len % (self.cp * self.tp):
            raise PunaError(f"data.seq_len {seq_len} must be a multiple of cp x tp = {self.cp * self.tp}")
        if rows % (self.rows * accumulate):
            raise PunaError(
                f"train.rows {rows} must be a multiple of dp_replicate x dp_shard x train.accumulate = "
                f"{self.rows} x {accumulate}"
            )


@dataclass(frozen=True)
class Part:
    """What of a parameter of `shape` a tensor holds: `runs` of each dimension, one after the other."""

    shape: tuple[int, ...]
    runs: tuple[Runs, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        return cls(tuple(shape), tuple(((0, n),) for n in shape))

    @property
    def local(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(sum(b - a for a, b in runs) for runs in self.runs)

    def share(self, dim: int, index: int, of: int, sections: tuple[int, ...] | None = None) -> Part:
        """The index-th of `of` equal parts of each of a whole dimension's `sections` (their sizes; None: it is one)."""
        runs, start = [], 0
        for size in sections or (self.shape[dim],):
            step = size // of
            runs.append((start + index * step, start + (index + 1) * step))
            start += size
        return self._with(dim, tuple(runs))

    def window(self, dim: int, start: int, stop: int) -> Part:
        """Indices start..stop of the tensor's own dimension, as FSDP shards it further."""
        runs, at = [], 0
        for a, b in self.runs[dim]:
            lo, hi = max(a, a + start - at), min(b, a + stop - at)
            if lo < hi:
                runs.append((lo, hi))
            at += b - a
        return self._with(dim, tuple(runs))

    def _with(self, dim: int, runs: Runs) -> Part:
        return Part(self.shape, (*self.runs[:dim], runs, *self.runs[dim + 1 :]))

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(where in the whole, where in the tensor) of each block of numbers that lie together."""
        located = []
        for runs in self.runs:
            at, found = 0, []
            for a, b in runs:
                found.append((slice(a, b), slice(at, at + b - a)))
                at += b - a
            located.append(found)
        for chosen in product(*located):
            yield tuple(g for g, _ in chosen), tuple(own for _, own in chosen)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of the whole parameter, a copy."""
        part = whole.new_empty(self.local)
        for where, own in self.blocks():
            part[own] = whole[where]
        return part


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def shard_bounds(size: int, index: int, of: int) -> tuple[int, int]:
    """The range that FSDP (torch.chunk) gives the index-th of `of` processes."""
    step = math.ceil(size / of)
    return min(size, index * step), min(size, (index + 1) * step)


def tensor_parallel(name: str, part: Part, config: ModelConfig, index: int, of: int) -> Part:
    """What the index-th of `of` tensor-parallel processes has of a parameter: columns of the first matrix of a pair,
    rows of the second (arXiv 1909.08053); everything for what is not cut. Routed experts are not: ep spreads them."""
    if ".attention.wqkv." in name and not name.startswith("vision."):
        heads, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return part.share(0, index, of, (heads, kv, kv))
    if ".attention.wo." in name and not name.startswith("vision."):
        return part.share(1, index, of)
    if ".shared." in name or ".feed_forward." in name:
        if ".w13." in name:
            return part.share(0, index, of, (part.shape[0] // 2,) * 2)
        return part.share(1, index, of)
    return part


def is_tensor_parallel(name: str) -> bool:
    """Whether tensor parallelism cuts this parameter."""
    text = not name.startswith("vision.")
    return (text and ".attention.w" in name) or ".shared." in name or ".feed_forward." in name


def is_expert(name: str) -> bool:
    return ".experts." in name
