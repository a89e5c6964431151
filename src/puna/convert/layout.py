"""Where the numbers of a model lie in somebody's files, and the one way to move them.

A *layout* says of every parameter of ours which stored tensors hold it: its pieces. A piece is a stored tensor, seen in
a shape whose first dimension runs with the parameter's rows, and the block of the parameter that it is. So q, k and v
are three pieces of one matrix, Meta's eight shards of an expert matrix are eight pieces side by side, and to load, to
export and to convert are the same loop over rows, whatever stands on either side:

    for each parameter, for some rows of it:  target.write(name, start, source.read(name, start, stop))

A `Store` is such a side: a model in memory (`ModelStore`) or files (`FileStore`). Rows are experts where a parameter
has experts, so a slice of a 20 GB expert matrix is a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from puna.convert.stored import CODES, Stored
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig
from puna.model.weights import Weight, plain

SLICE_BYTES = 64 * 2**20

Key = tuple[int, str]  # (file, name): files are numbered; a name may be in several (Meta's shards)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One stored tensor's part in a parameter."""

    key: Key
    shape: Shape  # of the whole stored tensor, as its file should say
    view: Shape  # the same numbers with the parameter's rows first: Meta's [E * D, F] is [E, D, F]
    begin: int  # the first row of the view that belongs to this parameter
    block: tuple[slice, ...]  # of the parameter
    transposed: bool = False  # the stored matrix is the block's transpose (routers)
    copy: bool = False  # holds what another piece holds already: written, and on reading compared


class Store(Protocol):
    """Parameters by our names, row by row."""

    config: ModelConfig

    def shapes(self) -> dict[str, Shape]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, start: int, stop: int) -> Tensor: ...

    def write(self, name: str, start: int, rows: Tensor) -> None: ...


class ModelStore:
    """A model in memory. It is read by its plain weights, integers brought back and adapters added, and written by what
    it is made of."""

    def __init__(self, model: Llama4):
        self.config = model.config
        self.weights, self.parts = plain(model), model.state_dict()

    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.parts[name].dtype if name in self.parts else self.weights[name].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        weight = self.weights[name]
        return (weight.rows(start, stop) if isinstance(weight, Weight) else weight.detach()[start:stop]).cpu()

    def write(self, name: str, start: int, rows: Tensor) -> None:
        self.parts[name][start : start + len(rows)].copy_(rows)


class FileStore:
    """Parameters in files. `table`: what the files hold; `pieces`: what the layout expects of each parameter."""

    def __init__(self, config: ModelConfig, pieces: dict[str, list[Piece]], table: dict[Key, Stored]):
        self.config, self.pieces, self.table = config, pieces, table

    def shapes(self) -> dict[str, Shape]:
        """Of the parameters."""
        return {name: parameter_shape(pieces) for name, pieces in self.pieces.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.table[self.pieces[name][0].key].dtype

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a parameter. Errors: PunaError where copies of one tensor differ, and for NaN and
        infinity, which no model can compute with."""
        rows = self.gather(name, start, stop)
        if not finite(rows):
            piece = self.pieces[name][0]
            raise PunaError(
                f"tensor {piece.key[1]} in {self.table[piece.key].path} holds NaN or infinity: it is damaged or was "
                "saved so; take another checkpoint"
            )
        return rows

    def gather(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a parameter, out of its pieces."""
        if len(self.pieces[name]) == 1:
            return self.read_piece(name, self.pieces[name][0], start, stop)
        shape = parameter_shape(self.pieces[name])
        out = torch.empty((stop - start, *shape[1:]), dtype=self.dtype(name))
        for piece in self.pieces[name]:
            for block, first, last in _part(piece, start, stop):
                rows = self.read_piece(name, piece, first, last)
                target = out[(slice(block.start - start, block.stop - start), *piece.block[1:])]
                if not piece.copy:
                    target.copy_(rows)
                elif not torch.equal(target, rows):
                    raise PunaError(f"tensor {piece.key[1]} is not the same in all files: one of them is damaged")
        return out

    def write(self, name: str, start: int, rows: Tensor) -> None:
        for piece in self.pieces[name]:
            for block, first, _ in _part(piece, start, start + len(rows)):
                values = rows[(slice(block.start - start, block.stop - start), *piece.block[1:])]
                self.write_piece(name, piece, first, values)

    def read_piece(self, name: str, piece: Piece, first: int, last: int) -> Tensor:
        """Rows first..last of a piece's view."""
        stored = _seen(self.table[piece.key], piece)
        return stored.read().T[first:last] if piece.transposed else stored.read(first, last)

    def write_piece(self, name: str, piece: Piece, first: int, rows: Tensor) -> None:
        stored = _seen(self.table[piece.key], piece)
        if piece.transposed:  # rows are columns there: a small matrix, written whole
            whole = stored.read()
            whole.T[first : first + len(rows)] = rows
            first, rows = 0, whole
        stored.write(first, rows)


def finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. A sum is one pass at the memory's speed and shows any of them; only where
    it is not finite itself, which sums of float16 can be, the numbers are looked at one by one (20 times slower)."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _seen(stored: Stored, piece: Piece) -> Stored:
    return Stored(stored.path, stored.offset, stored.dtype, piece.view)


def _part(piece: Piece, start: int, stop: int) -> Iterator[tuple[slice, int, int]]:
    """The rows of a parameter that a piece has of start..stop, and where they are in the piece's view: none or one."""
    rows = piece.block[0]
    a, b = max(start, rows.start), min(stop, rows.stop)
    if a < b:
        yield slice(a, b), piece.begin + a - rows.start, piece.begin + b - rows.start


def parameter_shape(pieces: list[Piece]) -> Shape:
    return tuple(max(piece.block[d].stop for piece in pieces) for d in range(len(pieces[0].block)))


def whole(key: Key, shape: Shape, **more) -> Piece:
    """A stored tensor that is a whole parameter."""
    return Piece(key, shape, shape, 0, tuple(slice(0, n) for n in shape), **more)


def check(store: FileStore, holder: str, ignored: Callable[[str], bool], kinds: Iterable[torch.dtype]) -> None:
    """Names, number types and shapes, before any number is read. Errors: PunaError naming the tensor."""
    expected = {piece.key: piece for pieces in store.pieces.values() for piece in pieces}
    if missing := sorted(expected.keys() - store.table.keys()):
        raise PunaError(
            f"{holder} lacks tensor {_names(missing)}: an incomplete download, or another model's configuration"
        )
    if extra := sorted(key for key in store.table.keys() - expected.keys() if not ignored(key[1])):
        raise PunaError(
            f"{holder} holds tensor {_names(extra)}, which the configuration's model has not: one of the two is wrong"
        )
    for key, piece in expected.items():
        stored = store.table[key]
        if stored.dtype not in kinds:
            raise PunaError(
                f"tensor {key[1]} is stored as {CODES.get(stored.dtype, stored.dtype)} in {stored.path}: "
                "quantised checkpoints can't be loaded; take the bfloat16 release"
            )
        if stored.shape != piece.shape:
            raise PunaError(
                f"tensor {key[1]} has shape {list(stored.shape)} in {stored.path}, "
                f"the configuration asks for {list(piece.shape)}"
            )
    for name, pieces in store.pieces.items():
        if len(found := {store.table[piece.key].dtype for piece in pieces}) > 1:
            raise PunaError(f"the parts of {name} are of different types ({', '.join(sorted(map(str, found)))})")


def _names(keys: list[Key], limit: int = 3) -> str:
    """'a, b, c and 7 more'; the file's number is said where names are in several."""
    several = len({file for file, _ in keys}) > 1
    shown = [f"{name} (file {file})" if several else name for file, name in keys[:limit]]
    return ", ".join(shown) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def move(source: Store, target: Store, name: str, shape: Shape, seen: Callable[[Tensor], None] | None = None) -> None:
    """One parameter from one side to the other, in slices; the next is read while this one is written and seen.

    seen: called with every slice as the target gets it, in order (hashes).
    """
    wide = max(source.dtype(name).itemsize, target.dtype(name).itemsize)
    row = wide * max(1, torch.Size(shape[1:]).numel())
    step = max(1, SLICE_BYTES // row)
    bounds = [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    with torch.no_grad():
        if len(bounds) == 1:  # most tensors: no threads, whose heaps would keep memory of their own
            rows = source.read(name, *bounds[0]).to(target.dtype(name))
            target.write(name, 0, rows)
            if seen is not None:
                seen(rows)
            return
        with ThreadPoolExecutor(2) as threads:
            ahead = threads.submit(source.read, name, *bounds[0])
            for i, (start, _) in enumerate(bounds):
                rows = ahead.result().to(target.dtype(name))
                if i + 1 < len(bounds):
                    ahead = threads.submit(source.read, name, *bounds[i + 1])
                writing = threads.submit(target.write, name, start, rows)
                if seen is not None:
                    seen(rows)
                writing.result()
