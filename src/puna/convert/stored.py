"""Tensors in files as byte ranges: where each lies is read from the file's header, its rows are read and written where
they are, and a file of any size is laid out before the first number of it is known.

    safetensors   8 bytes: length n of the header; n bytes of JSON {name: {dtype, shape, data_offsets}}; the data
    .pth          torch.save's: an uncompressed zip of a pickle and one record a storage; Meta's `consolidated.NN.pth`

A conversion then needs memory for one slice of a tensor, whatever the tensor and the shard measure: the libraries'
readers map whole files (what has been read stays in the process's resident memory) and their writers want whole shards.
The safetensors format is so small that reading and writing it here is a page, checks included. Of a .pth, torch itself
reads and writes all but the data (weights_only: no code is run), and says where the data go. Sums of the zip's records
are left empty, as torch.serialization.skip_data leaves them; torch doesn't look at them.
Sources: the format's description (huggingface/safetensors), torch.serialization; llama4-facts.md §5.1.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from puna.errors import PunaError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in a file: `rows` of its first dimension can be read and written on their own."""

    path: Path
    offset: int  # bytes from the file's start
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_size(self) -> int:
        return self.size // self.shape[0] if self.shape and self.shape[0] else self.size

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop (None: the last), [stop - start, ...]; of a tensor without dimensions, the tensor."""
        if not self.shape:
            return self._read([(0, self.size)]).view(self.dtype).view(())
        stop = self.shape[0] if stop is None else stop
        data = self._read([(start * self.row_size, (stop - start) * self.row_size)])
        return data.view(self.dtype).view(stop - start, *self.shape[1:])

    def _read(self, spans: list[tuple[int, int]]) -> Tensor:
        """The bytes of some (first, how many), behind each other."""
        data = torch.empty(sum(size for _, size in spans), dtype=torch.uint8)
        place, done = memoryview(data.numpy()), 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                for begin, size in spans:
                    file.seek(self.offset + begin)
                    end = done + size
                    while done < end:
                        got = file.readinto(place[done:end])
                        if not got:
                            raise PunaError(f"{self.path} is corrupt or truncated: copy it again")
                        done += got
        except OSError as error:
            raise PunaError(f"{self.path} can't be read ({error.strerror or error})") from error
        return data

    def write(self, start: int, rows: Tensor) -> None:
        """Overwrites rows from `start` on. Errors: OSError (a full disk)."""
        self._write([(start * self.row_size, rows.nbytes)], rows)

    def write_block(self, where: tuple[slice, ...], values: Tensor) -> None:
        """Overwrites a block (a slice of every dimension), and no byte beside it. Errors: OSError."""
        self._write(self._spans(where), values)

    def read_block(self, where: tuple[slice, ...]) -> Tensor:
        """A block of the tensor. Errors: PunaError."""
        shape = [part.stop - part.start for part in where]
        return self._read(list(self._spans(where))).view(self.dtype).view(shape)

    def _spans(self, where: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of the runs of a block that lie together, in the order of its numbers."""
        if not all(part.start < part.stop for part in where):
            return
        cut = [d for d, part in enumerate(where) if (part.start, part.stop) != (0, self.shape[d])]
        last = cut[-1] if cut else 0  # behind it all dimensions are whole, so its range is one run
        strides = [math.prod(self.shape[d + 1 :]) * self.dtype.itemsize for d in range(len(where))]
        size = (where[last].stop - where[last].start) * strides[last] if where else self.size
        for index in product(*(range(part.start, part.stop) for part in where[:last])):
            first = (*index, where[last].start) if where else ()
            yield sum(i * stride for i, stride in zip(first, strides, strict=False)), size

    def _write(self, spans: Iterable[tuple[int, int]], values: Tensor) -> None:
        data = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
        handle = os.open(self.path, os.O_WRONLY)
        try:
            start = 0
            for begin, size in spans:
                done = 0
                while done < size:
                    piece = data[start + done : start + min(size, done + 2**30)]
                    done += os.pwrite(handle, piece, self.offset + begin + done)
                start += size
        finally:
            os.close(handle)


# ---------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Errors: PunaError naming the file, and the tensor whose header entry is untrue."""
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or not 2 <= length <= min(HEADER_LIMIT, total - 8):
                raise PunaError(f"{path} is corrupt or truncated (no header of {length:,} bytes): copy it again")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise PunaError(f"{path} is missing: copy all shards") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError(f"{path} is corrupt or truncated ({error}): copy it again") from None
    if not isinstance(header, dict):
        raise PunaError(f"{path} is corrupt: its header is no JSON object; copy it again")
    header.pop("__metadata__", None)
    begin = 8 + length
    table = {name: _entry(path, name, entry, begin, total) for name, entry in header.items()}
    end, last = begin, None
    for name, stored in sorted(table.items(), key=lambda item: (item[1].offset, item[1].size)):
        if stored.offset != end:
            raise PunaError(f"{path}: tensor {name} does not begin where {last or 'the header'} ends: copy it again")
        end, last = stored.offset + stored.size, name
    if end != total:
        raise PunaError(f"{path} holds {total - end:,} bytes of no tensor: copy it again")
    return table


def _entry(path: Path, name: str, entry: object, begin: int, total: int) -> Stored:
    try:
        code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        good = all(type(n) is int and n >= 0 for n in (*shape, first, last)) and isinstance(code, str)
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise PunaError(f"{path}: tensor {name} lacks dtype, shape or data_offsets in the header: copy it again")
    if code not in DTYPES:
        raise PunaError(f"{path}: tensor {name} is stored as {code}, a type that is unknown here: take another release")
    stored = Stored(path, begin + first, DTYPES[code], shape)
    if last - first != stored.size:
        raise PunaError(f"{path}: tensor {name} is said to be {list(shape)} {code} but has {last - first:,} bytes")
    if begin + last > total:
        raise PunaError(f"{path} is corrupt or truncated: tensor {name} ends after the file; copy it again")
    return stored


def plan_safetensors(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
    """Makes a file of the right size for these tensors, all zero; returns where to write them. A file that was laid out
    for the same tensors before is left as it is (a conversion that goes on). Errors: OSError."""
    if path.exists():
        return read_safetensors(path)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        reserve(file.fileno(), 8 + len(text) + end)
    return read_safetensors(path)


def reserve(handle: int, size: int) -> None:
    """Grows an open file to `size` bytes and takes the room on the disk now, so that a full one is known at once."""
    if size:
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno != 95:  # EOPNOTSUPP: a file system that can't; the writes will tell
                raise
            os.truncate(handle, size)


# ----------------------------------------------------------------------------------------------------------------- .pth


def read_pth(path: Path) -> dict[str, Stored]:
    """The tensors of a torch.save file by name; what is no tensor (Transformer-Engine's leftovers) is passed over.

    Errors: PunaError naming the file, and the tensor that is not one contiguous piece or reaches over the file's end.
    """
    try:
        total = path.stat().st_size
        with torch.serialization.safe_globals([io.BytesIO, codecs.encode]):  # what the leftovers are made of
            values = torch.load(path, map_location="meta", weights_only=True, mmap=False)
    except FileNotFoundError:
        raise PunaError(f"{path} is missing: copy all shards") from None
    except pickle.UnpicklingError as error:
        raise PunaError(f"{path} holds more than tensors and is not read: {str(error).splitlines()[0]}") from None
    except Exception as error:  # a damaged zip: RuntimeError, EOFError, ValueError, ...
        raise PunaError(f"{path} is corrupt or truncated ({str(error).splitlines()[0]}): copy it again") from None
    if not isinstance(values, dict):
        raise PunaError(f"{path} holds no table of tensors: copy it again")
    table = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        place = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if place is None or not value.is_contiguous():
            raise PunaError(f"{path}: tensor {name} is not stored in one piece: save it again with torch.save")
        stored = Stored(path, place + value.storage_offset() * value.dtype.itemsize, value.dtype, tuple(value.shape))
        if stored.offset + stored.size > total:
            raise PunaError(f"{path} is corrupt or truncated: tensor {name} ends after the file; copy it again")
        table[name] = stored
    return table


def plan_pth(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Stored]:
    """As `plan_safetensors`, for torch.load. The tensors stand in memory nobody touches, so they take none."""
    if path.exists():
        return read_pth(path)
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}, path)
    with open(path, "rb+") as file:
        reserve(file.fileno(), os.fstat(file.fileno()).st_size)
    return read_pth(path)
