"""Batches: step -> tensors, a pure function, with the next steps prepared in the background.

Step s at B rows reads global rows [sB, (s+1)B) of the mixture (mixture.py), so `batches(s)` never depends on what was
asked before: resuming a run is calling it with the next step. For a row of tokens x and document ids d the target at
place t is

    y[t] = x[t+1]     valid where d[t] = d[t+1] >= 0 and the document marks t+1 as something to learn (loss[t+1]).

Nothing predicts the first token of a document, padding, or a picture's own tokens. Pictures stay recipes until here;
they are drawn and cut in tiles when their batch is built, by one worker thread that stays `prefetch` steps ahead. The
thread only decides *when* a batch is built, never what is in it.

A picture that was augmented from a seed (another background, scale, turn, light: puna.tasks.pictures) gets another
seed each time its row is read, from (seed, global row index, place in the row): a second epoch shows the same things
looking otherwise, and a resumed run sees the same pixels. A picture whose answer depends on its pixels (a scene with
boxes) always stays as it is.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from puna.data.mixture import Mixture
from puna.data.order import derive
from puna.data.packing import PackedRows
from puna.processor import join
from puna.tasks.pictures import EmojiPicture


@dataclass(frozen=True)
class Batch:
    """One step's data.

    tokens_BT, targets_BT: int64 (targets are 0 where not valid). valid_BT: bool. doc_ids_BT: int64, -1 is padding.
    tiles: float32 [N, 3, S, S] in reading order over the batch, or None. tiles_B: how many of them belong to each row.
    row_sources: each row's source. row_index: each row's global index, as read from the mixture. extra: what a loss
    needs besides, tensors [B, T, ...] by name.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    valid_BT: torch.Tensor
    doc_ids_BT: torch.Tensor
    tiles: torch.Tensor | None
    tiles_B: tuple[int, ...]
    row_sources: tuple[str, ...]
    row_index: tuple[int, ...]
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, int]:
        """Rows per source."""
        return {name: self.row_sources.count(name) for name in dict.fromkeys(self.row_sources)}

    @property
    def source_tokens(self) -> dict[str, int]:
        """Tokens per source, padding not counted."""
        count_B = (self.doc_ids_BT >= 0).sum(1).tolist()
        result = dict.fromkeys(self.row_sources, 0)
        for name, count in zip(self.row_sources, count_B, strict=True):
            result[name] += count
        return result

    def split(self, parts: int) -> list["Batch"]:
        """The batch in `parts` runs of rows of equal length, for accumulation. ValueError where the rows don't
        divide."""
        rows = len(self.row_sources)
        if parts < 1 or rows % parts:
            raise ValueError(f"{rows} rows can't be split in {parts} equal parts")
        size, result, first_tile = rows // parts, [], 0
        for at in range(0, rows, size):
            some = slice(at, at + size)
            count = sum(self.tiles_B[some])
            tiles = self.tiles[first_tile : first_tile + count] if count else None
            first_tile += count
            tensors = (self.tokens_BT[some], self.targets_BT[some], self.valid_BT[some], self.doc_ids_BT[some])
            about = (self.tiles_B[some], self.row_sources[some], self.row_index[some])
            result.append(Batch(*tensors, tiles, *about, {name: t[some] for name, t in self.extra.items()}))
        return result

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        names = ("tokens_BT", "targets_BT", "valid_BT", "doc_ids_BT", "tiles")
        tensors = {name: getattr(self, name) for name in names}
        extra = {name: t.to(device) for name, t in self.extra.items()}
        return replace(self, extra=extra, **{name: t if t is None else t.to(device) for name, t in tensors.items()})


def targets(tokens_BT: np.ndarray, doc_ids_BT: np.ndarray, loss_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next-token targets (0 where not valid) and valid, both [B, T], from int tokens and document ids and bool loss
    flags."""
    valid_BT = np.zeros(tokens_BT.shape, dtype=bool)
    same_BT = doc_ids_BT[:, 1:] == doc_ids_BT[:, :-1]
    valid_BT[:, :-1] = same_BT & (doc_ids_BT[:, 1:] >= 0) & loss_BT[:, 1:]
    targets_BT = np.zeros_like(tokens_BT)
    targets_BT[:, :-1] = tokens_BT[:, 1:]
    targets_BT[~valid_BT] = 0
    return targets_BT, valid_BT


class Batches:
    """`batches(step)` -> Batch.

    sources: name -> PackedRows, all of one T. mixture: says which rows a step reads. processor: has `.tiles(pictures)`
    (None is fine where there are no pictures). batch_rows: B. prefetch: how many steps to prepare ahead (0: no
    thread). steps: nothing is prepared from this step on. vary: give augmented pictures a new look each time they are
    read. part: (index, of): only the index-th of so many equal runs of a step's rows, where processes share them.
    PunaError: fewer rows than a batch.
    """

    def __init__(
        self,
        sources: Mapping[str, PackedRows],
        mixture: Mixture,
        processor: Any,
        batch_rows: int,
        *,
        prefetch: int = 2,
        steps: int | None = None,
        vary: bool = True,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ):
        if batch_rows < 1 or prefetch < 0:
            raise ValueError(f"batch_rows is at least 1 and prefetch at least 0, not {batch_rows} and {prefetch}")
        if batch_rows % part[1]:
            raise ValueError(f"{batch_rows} rows can't be shared by {part[1]} processes")
        for name in mixture.names:
            if name not in sources or len(sources[name]) != mixture.sizes[name]:
                raise ValueError(f"the mixture was made for other data: source {name!r} is missing or has other rows")
        lengths = {name: sources[name].seq_len for name in mixture.names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"sources are packed to different lengths: {lengths}")
        mixture.check_batch(batch_rows)
        self.sources, self.mixture, self.processor, self.batch_rows = sources, mixture, processor, batch_rows
        self.prefetch, self.steps, self.vary, self.seed, self.part = prefetch, steps, vary, seed, part
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future] = {}
        self._lock = threading.Lock()

    def __call__(self, step: int) -> Batch:
        """The batch of `step` (>= 0), from the background thread if it was expected."""
        with self._lock:
            ready = self._ahead.pop(step, None)
            wanted = range(step + 1, step + 1 + self.prefetch)
            for other in [s for s in self._ahead if s not in wanted]:
                self._ahead.pop(other).cancel()
            if self.prefetch and self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
            for s in wanted:
                if s not in self._ahead and (self.steps is None or s < self.steps):
                    self._ahead[s] = self._pool.submit(self.build, s)
        return self.build(step) if ready is None else ready.result()

    def build(self, step: int) -> Batch:
        """The batch of `step`, built now in this thread."""
        index, of = self.part
        size = self.batch_rows // of
        rows = range(step * self.batch_rows + index * size, step * self.batch_rows + (index + 1) * size)
        places = [self.mixture.locate(i) for i in rows]
        stacked = [
            np.stack([getattr(self.sources[name], what)[row] for name, row in places])
            for what in ("tokens", "doc_ids", "loss")
        ]
        targets_BT, valid_BT = targets(*stacked)
        tiles = [self._tiles(i, name, row) for i, (name, row) in zip(rows, places, strict=True)]
        some = [t for t in tiles if t is not None]
        return Batch(
            tokens_BT=torch.from_numpy(stacked[0].astype(np.int64)),
            targets_BT=torch.from_numpy(targets_BT.astype(np.int64)),
            valid_BT=torch.from_numpy(valid_BT),
            doc_ids_BT=torch.from_numpy(stacked[1].astype(np.int64)),
            tiles=join(some) if some else None,
            tiles_B=tuple(0 if t is None else len(t) for t in tiles),
            row_sources=tuple(name for name, _ in places),
            row_index=tuple(rows),
        )

    def _tiles(self, index: int, name: str, row: int) -> torch.Tensor | None:
        """Tiles of one row's pictures, float32 [n, 3, S, S]; None without pictures."""
        pictures = self.sources[name].pictures[row]
        if self.vary:
            pictures = [varied(picture, derive("look", self.seed, index, i)) for i, picture in enumerate(pictures)]
        return self.processor.tiles(pictures) if pictures else None

    def show(self, steps: int) -> str:
        """The mixture's tree for so many steps, tokens included."""
        tokens = {name: self.sources[name].token_count for name in self.mixture.names}
        return self.mixture.show(steps * self.batch_rows, tokens)

    def close(self) -> None:
        """Stop the background thread; the next call starts a new one."""
        with self._lock:
            pool, self._pool = self._pool, None
            for future in self._ahead.values():
                future.cancel()
            self._ahead = {}
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def varied(picture: Any, seed: int) -> Any:
    """The same picture with another look, if it is an augmented one; else the picture itself."""
    if isinstance(picture, EmojiPicture) and picture.seed is not None:
        return replace(picture, seed=seed)
    return picture
