"""Packing: documents of any length into rows of T tokens, so that chunked attention needs no mask and little is
padding.

Llama 4's local layers attend within chunks of C tokens, counted *in the document* (llama4-facts.md §2.1). If every
packed document longer than C starts on a multiple of C, and no shorter one straddles a multiple of C, then chunks by
position in the document are chunks by position in the row: attention folds [B, T] into [B * T/C, C] and only needs to
keep documents apart inside a chunk. So two kinds of boxes are filled, one after the other:

    strip   ceil(L / C) consecutive chunks begun by one document; short documents fill what is left of its last chunk
    row     T / C chunks, filled with strips

Both by *best fit decreasing*: longest first, each into the fullest box that still holds it (at most 11/9 of the
optimal number of boxes plus one; Johnson et al. 1974). That sorts by length, so it is done within windows of about a
million tokens and what comes out is shuffled within a window: strips within rows, short documents within a chunk, rows
among themselves. A document longer than T is cut in pieces of T, never inside a picture's tokens; each piece is then a
document of its own. Each document alone is the oracle: packed or not, its logits are the same.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import numpy as np

from puna.data.order import derive, permutation
from puna.errors import PunaError

WINDOW = 1 << 20  # tokens sorted at once
KEEP_OPEN = 256  # boxes that stay open from one window to the next


class EncodedLike(Protocol):
    """What is packed (puna.processor.Encoded): tokens int32 [N], loss bool [N], pictures in the order of their
    tokens."""

    tokens: np.ndarray
    loss: np.ndarray
    pictures: list


@dataclass(frozen=True)
class PackedRows:
    """Rows of T tokens. tokens, doc_ids int32 [R, T] (doc_ids count from 0 in each row, -1 is padding); loss bool [R,
    T]: may this token be a target; pictures: one list per row, in the order of their tokens; documents: how many went
    in (before cutting); dropped: how many were left out for being longer than a row."""

    tokens: np.ndarray
    doc_ids: np.ndarray
    loss: np.ndarray
    pictures: list[list[Any]]
    documents: int
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        """T."""
        return self.tokens.shape[1]

    @property
    def token_count(self) -> int:
        """Tokens that aren't padding."""
        return sum(int(np.count_nonzero(row >= 0)) for row in self.doc_ids)

    @property
    def loss_count(self) -> int:
        """Tokens that may be targets."""
        return int(self.loss.sum())

    @property
    def padding_share(self) -> float:
        """Padding over all tokens, 0 for no rows."""
        return 1 - self.token_count / self.tokens.size if self.tokens.size else 0.0


@dataclass
class Piece:
    """A document, or a part of one that was longer than a row."""

    tokens: np.ndarray
    loss: np.ndarray
    pictures: list[Any]
    rank: int = 0  # a random number, the order of short documents in a chunk


@dataclass
class Strip:
    """`chunks` consecutive chunks with `free` tokens left at the end of the last."""

    chunks: int
    free: int
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Boxes:
    """Open boxes in order of free space, for best fit: `fit(need)` gives the fullest that holds it, and takes it
    out."""

    items: list[tuple[int, int, Any]] = field(default_factory=list)
    count: int = 0

    def put(self, free: int, box: Any) -> None:
        """Leave `box` open with `free` space; the number makes ties go to the older box."""
        insort(self.items, (free, self.count, box), key=lambda item: item[:2])
        self.count += 1

    def fit(self, need: int) -> Any | None:
        """The box with the least space >= need, taken out; None if there is none."""
        at = bisect_left(self.items, need, key=lambda item: item[0])
        return self.items.pop(at)[2] if at < len(self.items) else None

    def close(self, keep: int, full: int) -> list[Any]:
        """Take out all but the `keep` emptiest boxes, and those with less than `full` space."""
        cut = max(len(self.items) - keep, bisect_left(self.items, full, key=lambda item: item[0]), 0)
        closed, self.items = self.items[:cut], self.items[cut:]
        return [item[2] for item in closed]


def cut(doc: EncodedLike, limit: int, image: tuple[int, int] | None) -> Iterator[Piece]:
    """Cut a document in consecutive pieces of `limit` tokens, or less where a picture would be cut.

    image: ids of <|image_start|> and <|image_end|>; a picture's tokens are those from one through the other.
    """
    tokens_N, n = np.asarray(doc.tokens), len(doc.tokens)
    starts, ends = np.empty(0, np.int64), np.empty(0, np.int64)
    if n <= limit:  # the usual case: nothing to cut, whatever the pictures
        yield Piece(tokens_N, np.asarray(doc.loss), list(doc.pictures))
        return
    if doc.pictures:
        if image is None:
            raise ValueError("to cut a document with pictures pack() needs image=(image_start, image_end) token ids")
        starts, ends = np.flatnonzero(tokens_N == image[0]), np.flatnonzero(tokens_N == image[1]) + 1
        if not len(starts) == len(ends) == len(doc.pictures):
            raise ValueError(
                f"{len(doc.pictures)} pictures but {len(starts)} starts and {len(ends)} ends among the tokens"
            )
    at = 0
    while at < n:
        stop = min(at + limit, n)
        inside = np.flatnonzero((starts < stop) & (ends > stop))
        if inside.size:
            stop = int(starts[inside[0]])
            if stop <= at:
                size = int(ends[inside[0]]) - stop
                raise PunaError(
                    f"a picture takes {size} tokens and a row holds {limit}; raise seq_len or use fewer tiles"
                )
        pictures = [doc.pictures[i] for i in np.flatnonzero((starts >= at) & (starts < stop))]
        yield Piece(tokens_N[at:stop], np.asarray(doc.loss)[at:stop], pictures)
        at = stop


def pack(
    docs: Iterable[EncodedLike],
    T: int,  # noqa: N803 (the row length's name everywhere)
    chunk: int,
    pad: int,
    *,
    image: tuple[int, int] | None = None,
    overlong: Callable[[EncodedLike], str] = lambda doc: "cut",
    filler: Iterable[EncodedLike] = (),
    window: int = WINDOW,
    seed: int = 0,
    scratch: Path | None = None,
) -> PackedRows:
    """Pack documents into rows of T tokens; the same arguments always give the same rows.

    chunk: the attention chunk; T is a multiple of it or shorter than it. pad: the token id in empty places. image: ids
    of <|image_start|> and <|image_end|>, needed where a document with pictures has to be cut. overlong: whether
    to "cut" a document longer than T or to "drop" it (a conversation: its answer makes no sense without the question).
    filler: more documents, of which only those are used that fit into space otherwise left empty. window: tokens sorted
    at once. scratch: a folder for the rows' arrays: they are then memory-mapped files without a name, and no more than
    a window and the open boxes is held in memory; None: the arrays are in memory.
    """
    if T < 1 or chunk < 1 or (chunk < T and T % chunk):
        raise PunaError(f"seq_len {T} must be a multiple of the attention chunk {chunk}, or shorter")
    chunk = min(chunk, T)
    packer, laid = _Packer(T, chunk, seed), _Laid(T, chunk, pad, scratch)
    packer.offer(doc for doc in filler if 0 < len(doc.tokens) <= chunk)
    documents = dropped = waiting = 0
    pool: list[Piece] = []
    for doc in docs:
        if len(doc.tokens) != len(doc.loss):
            raise ValueError(f"a document has {len(doc.tokens)} tokens but {len(doc.loss)} loss flags")
        if len(doc.tokens) > T and overlong(doc) == "drop":
            dropped += 1
            continue
        documents += bool(len(doc.tokens))
        for piece in cut(doc, T, image):
            if len(piece.tokens):
                pool.append(piece)
                waiting += len(piece.tokens)
        if waiting >= window:
            laid.add(packer.add(pool))
            pool, waiting = [], 0
    laid.add(packer.add(pool, last=True))
    return PackedRows(*laid.arrays(), laid.pictures, documents + packer.filled, dropped)


class _Packer:
    """Pieces in, rows (lists of strips) out, window by window."""

    def __init__(self, T: int, chunk: int, seed: int):  # noqa: N803
        self.chunk, self.per_row, self.seed = chunk, T // chunk, seed
        self.open_strips, self.open_rows = Boxes(), Boxes()
        self.filler: list[Piece] = []  # longest first
        self.windows = self.filled = 0

    def offer(self, docs: Iterable[EncodedLike]) -> None:
        """Short documents that may fill holes but open no chunk of their own."""
        pieces = [Piece(np.asarray(doc.tokens), np.asarray(doc.loss), list(doc.pictures)) for doc in docs]
        self.filler = sorted(pieces, key=lambda piece: -len(piece.tokens))

    def _fill(self) -> None:
        """Put what fits of the filler into the open strips, longest first; the rest stays for the next window."""
        left = []
        for rank, piece in enumerate(self.filler):
            strip = self.open_strips.fit(len(piece.tokens))
            if strip is None:
                left.append(piece)
                continue
            piece.rank = rank
            strip.pieces.append(piece)
            strip.free -= len(piece.tokens)
            self.open_strips.put(strip.free, strip)
            self.filled += 1
        self.filler = left

    def add(self, pool: list[Piece], last: bool = False) -> list[list[Strip]]:
        """Packs one window and returns the rows that are full; `last` closes everything that is still open."""
        self.windows += 1
        for piece, rank in zip(
            pool, permutation(derive("pack", self.seed, self.windows), max(len(pool), 1)).tolist(), strict=False
        ):
            piece.rank = rank
        for i in sorted(range(len(pool)), key=lambda i: (-len(pool[i].tokens), i)):
            need = len(pool[i].tokens)
            strip = self.open_strips.fit(need)  # a long document finds none: no strip has a whole chunk left
            if strip is None:
                chunks = -(-need // self.chunk)
                strip = Strip(chunks, chunks * self.chunk)
            strip.pieces.append(pool[i])
            strip.free -= need
            self.open_strips.put(strip.free, strip)
        self._fill()
        strips = self._shuffle(self.open_strips.close(0 if last else KEEP_OPEN, self.chunk // 64 + 1), "strips")
        for strip in strips:
            # A long document stays first, on its multiple of the chunk; the short ones behind it in any order.
            head = 1 if strip.chunks > 1 else 0
            strip.pieces = strip.pieces[:head] + sorted(strip.pieces[head:], key=lambda piece: piece.rank)
        for strip in sorted(strips, key=lambda strip: -strip.chunks):  # stable: shuffled among equals
            row = self.open_rows.fit(strip.chunks)
            row = [] if row is None else row
            row.append(strip)
            self.open_rows.put(self.per_row - sum(s.chunks for s in row), row)
        rows = self._shuffle(self.open_rows.close(0 if last else KEEP_OPEN, 1), "rows")
        return [self._shuffle(row, "row", len(row)) for row in rows]

    def _shuffle(self, items: list, *salt: object) -> list:
        """The items in a seeded order of their own for this window."""
        if len(items) < 2:
            return items
        return [items[i] for i in permutation(derive("pack", self.seed, self.windows, *salt), len(items))]


class _Laid:
    """Rows of strips, written one behind the other as three arrays: in memory, or in files under `scratch`."""

    def __init__(self, T: int, chunk: int, pad: int, scratch: Path | None):  # noqa: N803
        self.T, self.chunk, self.pad, self.scratch = T, chunk, pad, scratch
        self.pictures: list[list[Any]] = []
        self.files: list[Any] = []

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            raise PunaError(f"can't pack data in {self.scratch}: {why}; free space or choose another folder") from error

    def add(self, rows: list[list[Strip]]) -> None:
        """Writes rows; with the first of them comes the folder."""
        if rows and not self.files:
            with self._on_disk():
                if self.scratch is not None:
                    self.scratch.mkdir(parents=True, exist_ok=True)
                on_disk = self.scratch is not None
                self.files = [TemporaryFile(dir=self.scratch) if on_disk else BytesIO() for _ in range(3)]  # noqa: SIM115
        for row in rows:
            tokens_T, ids_T = np.full(self.T, self.pad, np.int32), np.full(self.T, -1, np.int32)
            loss_T, pictures = np.zeros(self.T, bool), []
            at = document = 0
            for strip in row:
                begin = at
                for piece in strip.pieces:
                    end = begin + len(piece.tokens)
                    tokens_T[begin:end], ids_T[begin:end], loss_T[begin:end] = piece.tokens, document, piece.loss
                    pictures += piece.pictures
                    begin, document = end, document + 1
                at += strip.chunks * self.chunk
            self.pictures.append(pictures)
            with self._on_disk():
                for file, array in zip(self.files, (tokens_T, ids_T, loss_T), strict=True):
                    file.write(array)

    def arrays(self) -> Iterator[np.ndarray]:
        """tokens, doc_ids int32 [R, T], loss bool [R, T]."""
        shape = len(self.pictures), self.T
        for i, dtype in enumerate((np.int32, np.int32, np.bool_)):
            if not self.files:
                yield np.empty(shape, dtype)
            elif self.scratch is None:
                yield np.frombuffer(self.files[i].getbuffer(), dtype).reshape(shape)
            else:
                with self._on_disk():
                    self.files[i].flush()
                    yield np.memmap(self.files[i], dtype, "r", shape=shape)
