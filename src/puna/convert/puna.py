"""puna's own checkpoint: `model.safetensors` under the model's own names, `run.json`, tokenizer.json and
processor.json.

    run.json  {"format": 1, "config": {"model": {...}, ...}, "step": 1200, "finished": true, "hashes": {name: sha256},
               "files": {name: sha256}, "sha256": of this text}

A quantised model has "quantized": {"scheme", "targets"} there, and NAME.q beside NAME.scale for a weight. What LoRA
trained is `adapter.safetensors` alone, and config.base says beside which model it stands (convert/adapters.py).

Every tensor's bytes have a SHA-256 in run.json, verified while reading, and so have the other files and run.json
itself: a bit that flipped on a disk is found on loading, with the tensor's or file's name, not three days later in a
loss curve.  safetensors and JSON only: no pickle, so a checkpoint can't run code.

A *stage* folder holds `step-XXXXXXXX` folders; the trainer (`train/checkpoint.py`) writes optimizer and random state
beside the model.  A folder with its final name is complete: it was written under another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from puna.convert.folder import write_folder
from puna.convert.layout import FileStore, ModelStore, Piece, check, whole
from puna.convert.stored import WEIGHTS, plan_safetensors
from puna.convert.tensors import fill, folder_table, parameter_shapes, read_json
from puna.errors import PunaError
from puna.fields import build, to_dict
from puna.model import Llama4, lora
from puna.model.config import ModelConfig
from puna.precision.quantized import SCHEMES, Quantization
from puna.processor import Processor

FORMAT = 1
MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter.safetensors"
RUN_FILE = "run.json"
UNSEALED = "0" * 64
STEP = re.compile(r"step-(\d+)$")


class CorruptCheckpoint(PunaError):
    """The files of this checkpoint are damaged; an older one may not be."""


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file; of safetensors of its header alone, since each tensor behind it has its own."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            start = file.read(8)
            size = min(int.from_bytes(start, "little"), path.stat().st_size)
            return hashlib.sha256(start + file.read(size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_run(folder: Path, record: dict) -> None:
    """Writes run.json, last of a checkpoint's files: with the hash of each of the others, and of its own text (in which
    the 64 digits stand as zeros). So a byte that flips in any file is found."""
    files = {p.name: file_hash(p) for p in sorted(folder.iterdir()) if p.name != RUN_FILE and p.name[0] != "."}
    text = json.dumps(record | {"files": files, "sha256": UNSEALED}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / RUN_FILE).write_text(text.replace(UNSEALED, digest), encoding="utf-8")


def verify_files(folder: Path, run: dict, names: Iterable[str]) -> None:
    """Compares files with their hashes in run.json. Errors: CorruptCheckpoint naming the file. A checkpoint of before
    there were such hashes has none, and passes."""
    for name in names:
        expected = run.get("files", {}).get(name)
        try:
            if expected is not None and file_hash(folder / name) != expected:
                raise CorruptCheckpoint(f"{folder / name} does not match its hash: take another checkpoint")
        except OSError as error:
            raise CorruptCheckpoint(f"{folder / name} can't be read ({error.strerror or error})") from None


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes: contiguous, little-endian, in its own dtype."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def held(model: Llama4) -> tuple[str, dict[str, Tensor]]:
    """What a checkpoint holds of a model, and in which file: all parameters, or the adapters alone where it has some,
    for then all else is the base's."""
    adapters = lora.adapters(model)
    return (ADAPTER_FILE, adapters) if adapters else (MODEL_FILE, dict(model.named_parameters()))


def save(model: Llama4, processor: Processor | None, folder: str | os.PathLike, step: int = 0, **run: Any) -> Path:
    """Writes a whole, finished checkpoint (no optimizer state) atomically; `run` adds to or replaces run.json's fields.

    Errors: PunaError if the folder exists and is not empty, or if the disk refuses.
    """
    return write_folder(ModelStore(model), CheckpointFormat(processor, step, run), folder)


@dataclass(frozen=True)
class CheckpointFormat:
    """What `write_folder` needs to know of a checkpoint of ours."""

    hashed: ClassVar[bool] = True
    processor: Processor | None = field(repr=False)
    step: int = 0
    run: dict = field(default_factory=dict)
    quantization: Quantization | None = None  # the source's names are those of a quantised model

    def plan(self, config: ModelConfig, dtypes: dict[str, torch.dtype], folder: Path) -> FileStore:
        shapes = parameter_shapes(config, self.quantization)
        table = plan_safetensors(folder / MODEL_FILE, {name: (dtypes[name], shape) for name, shape in shapes.items()})
        return FileStore(config, _pieces(shapes), {(0, name): stored for name, stored in table.items()})

    def finish(self, config: ModelConfig, dtypes: dict[str, torch.dtype], hashes: dict[str, str], folder: Path) -> None:
        record = {"format": FORMAT, "config": {"model": config.to_dict()}, "step": self.step, "finished": True}
        if self.quantization is not None:
            record["quantized"] = to_dict(self.quantization)
        if self.processor is not None:
            self.processor.save(folder)
        write_run(folder, record | self.run | {"hashes": hashes})


def _pieces(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Piece]]:
    return {name: [whole((0, name), shape)] for name, shape in shapes.items()}


def read_run(folder: Path) -> dict:
    """run.json, checked for the fields that loading needs."""
    try:
        run = read_json(folder / RUN_FILE)
    except PunaError as error:
        raise CorruptCheckpoint(str(error)) from None
    digest = run.get("sha256")
    if digest is not None or "files" in run:
        text = (folder / RUN_FILE).read_text(encoding="utf-8").replace(str(digest), UNSEALED)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise CorruptCheckpoint(f"{folder / RUN_FILE} does not match its own hash: it is damaged or was edited")
    if run.get("format") != FORMAT:
        raise PunaError(
            f"{folder / RUN_FILE} has format {run.get('format')!r}, this puna reads {FORMAT}: use a newer puna"
        )
    kinds = {"config": dict, "hashes": dict, "step": int, "finished": bool}
    wrong = [name for name, kind in kinds.items() if not isinstance(run.get(name), kind)]
    if not wrong and not isinstance(run["config"].get("model"), dict):
        wrong = ["config.model"]
    if wrong:
        raise CorruptCheckpoint(
            f"{folder / RUN_FILE} lacks {' and '.join(wrong)}: restore the file or take another checkpoint"
        )
    return run


def load_checkpoint(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama4, Processor | None]:
    """Reads one checkpoint folder and verifies every tensor's hash.  dtype None: as stored.

    Errors: CorruptCheckpoint (a PunaError) naming the tensor or file that is missing, misshapen or damaged.
    """
    store, processor = open_checkpoint(folder)
    try:
        return fill(store, dtype, device, store.quantization), processor
    except CorruptCheckpoint:
        raise
    except PunaError as error:
        raise CorruptCheckpoint(str(error)) from None


def open_checkpoint(folder: Path) -> tuple[CheckpointStore, Processor | None]:
    """A checkpoint's parameters, checked for names and shapes but not yet read. Errors: as `load_checkpoint`."""
    run = read_run(folder)
    try:
        config = build(ModelConfig, run["config"]["model"])
        quantized = run.get("quantized")
        quantization = build(Quantization, quantized, "quantized.") if quantized else None
        shapes = parameter_shapes(config, quantization)
    except PunaError as error:
        raise CorruptCheckpoint(f"{folder / RUN_FILE}: config.model is damaged ({error})") from None
    try:
        store = CheckpointStore(folder, config, _pieces(shapes), folder_table(folder), run["hashes"], quantization)
        integers = {SCHEMES[quantization.scheme].DTYPE} if quantization else set()
        check(store, str(folder), lambda name: False, {*WEIGHTS, *integers})
        for name in shapes:
            if (store.dtype(name) in integers) != (bool(integers) and name.endswith(".q")):
                raise PunaError(f"tensor {name} is stored as {store.dtype(name)} in {folder}: the file is damaged")
    except PunaError as error:
        raise CorruptCheckpoint(str(error)) from None
    verify_files(folder, run, (MODEL_FILE, "tokenizer.json", "processor.json"))  # behind what names a tensor
    has_processor = (folder / "tokenizer.json").is_file() and (folder / "processor.json").is_file()
    return store, Processor.load(folder) if has_processor else None


class CheckpointStore(FileStore):
    """Verifies a tensor's hash while its rows are read, from the first to the last; single slices are not verified."""

    def __init__(self, folder: Path, config: ModelConfig, pieces: dict, table: dict, hashes: dict[str, str],
                 quantization: Quantization | None):  # fmt: skip
        super().__init__(config, pieces, table)
        self.folder, self.hashes, self.quantization = folder, hashes, quantization
        self.digests: dict[str, tuple[int, Any]] = {}  # the next row, SHA-256 of those before

    def read(self, name: str, start: int, stop: int) -> Tensor:
        try:
            rows = super().read(name, start, stop)
        except PunaError as error:
            raise CorruptCheckpoint(str(error)) from None
        at, digest = (0, hashlib.sha256()) if start == 0 else self.digests.pop(name, (start, None))
        if digest is not None and at == start:
            digest.update(rows.contiguous().flatten().view(torch.uint8).numpy().data)
            if stop < self.pieces[name][0].shape[0]:
                self.digests[name] = (stop, digest)
            elif digest.hexdigest() != self.hashes.get(name):
                raise CorruptCheckpoint(
                    f"{self.folder}: tensor {name} does not match its hash: the file is damaged; take another "
                    "checkpoint"
                )
        return rows
