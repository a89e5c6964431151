"""Reading weights tensor by tensor: one folder of safetensors files in, one model filled in place, nothing held twice.

A 109B model in bfloat16 is 203 GiB; a loader that first builds a dictionary of all tensors, then the model, needs twice
that.  Here the model is laid out without data (the *meta* device), its parameters are allocated once where they will
stay, and every stored tensor is copied into its place in slices of at most `SLICE_BYTES`.  safetensors files are
mapped, not read, and can't run code (no pickle).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig

SLICE_BYTES = 256 * 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFolder:
    """The safetensors of a folder as one name -> tensor table: `model.safetensors`, or shards with
    `model.safetensors.index.json`.

    Use as a context manager.  Errors: PunaError naming the file or tensor for anything absent, truncated or not
    safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open_files: dict[str, object] = {}
        self._stack = contextlib.ExitStack()
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.file_of = self._read_index(index)
        elif (folder / "model.safetensors").is_file():
            self.file_of = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        else:
            raise PunaError(
                f"{folder} holds no model.safetensors and no model.safetensors.index.json: is the download complete?"
            )

    @staticmethod
    def _read_index(index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise PunaError(f"{index} has no weight_map: fetch the file again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise PunaError(
                    f"{index}: tensor {name} points outside the folder ({file!r}): do not use this checkpoint"
                )
        return weight_map

    def _file(self, file: str):
        if file not in self._open_files:
            try:
                handle = safe_open(self.folder / file, framework="pt", device="cpu")
            except FileNotFoundError:
                raise PunaError(f"{self.folder / file} is missing: the index names it; copy all shards") from None
            except (SafetensorError, OSError) as error:
                raise PunaError(f"{self.folder / file} is corrupt or truncated ({error}): copy it again") from None
            self._open_files[file] = self._stack.enter_context(handle)
        return self._open_files[file]

    def _slice(self, name: str):
        try:
            return self._file(self.file_of[name]).get_slice(name)
        except (SafetensorError, KeyError) as error:
            raise PunaError(
                f"tensor {name} can't be read from {self.folder / self.file_of[name]} ({error}): copy it again"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape, without reading data."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored number type; PunaError if it is none of float64, float32, float16, bfloat16 (quantised weights)."""
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise PunaError(
                f"tensor {name} is stored as {code}: quantised checkpoints can't be loaded; take the bfloat16 release"
            )
        return DTYPES[code]

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        try:
            return self._file(self.file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise PunaError(f"tensor {name} can't be read ({error}): copy {self.file_of[name]} again") from None

    def copy_into(self, name: str, target: Tensor) -> None:
        """Copies the stored tensor into `target` (same shape), converting type and device slice by slice."""
        stored = self._slice(name)
        rows = max(1, SLICE_BYTES // max(1, target[:1].numel() * 4))
        for start in range(0, target.shape[0], rows):
            target[start : start + rows].copy_(stored[start : start + rows])

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.clear()
        self._stack.close()


def read_json(path: Path) -> dict:
    """A JSON object from a file; PunaError when absent, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError(f"{path} can't be read as JSON ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise PunaError(f"{path} holds no JSON object: restore the file")
    return value


def names(items: Iterable[str], limit: int = 3) -> str:
    """'a, b, c and 7 more' for messages of one line."""
    items = sorted(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device | str | None) -> Llama4:
    """A model whose parameters have their final type and place but no values yet: fill every one of them."""
    with torch.device("meta"):
        model = Llama4(config)
    return model.to(dtype).to_empty(device=torch.device(device) if device is not None else torch.get_default_device())
