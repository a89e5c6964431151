"""puna's own checkpoint: `model.safetensors` under the model's own names, `run.json`, tokenizer.json and
processor.json.

    run.json  {"format": 1, "config": {"model": {...}, ...}, "step": 1200, "finished": true, "hashes": {name: sha256}}

Every tensor's bytes have a SHA-256 in run.json, verified while reading: a bit that flipped on a disk is found on
loading, with the tensor's name, not three days later in a loss curve.  safetensors and JSON only: no pickle, so a
checkpoint can't run code.

A *stage* folder holds `step-XXXXXXXX` folders; the trainer (`train/checkpoint.py`) writes optimizer and random state
beside the model and uses `write_model` for this part.  A folder with its final name is complete: it was written under
another name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from puna.convert.tensors import TensorFolder, allocate, names, read_json
from puna.errors import PunaError
from puna.fields import build
from puna.model import Llama4
from puna.model.config import ModelConfig
from puna.processor import Processor
from puna.processor.files import sync_folder

FORMAT = 1
MODEL_FILE = "model.safetensors"
RUN_FILE = "run.json"
STEP = re.compile(r"step-(\d+)$")


class CorruptCheckpoint(PunaError):
    """The files of this checkpoint are damaged; an older one may not be."""


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 (hex) of a tensor's bytes: contiguous, little-endian, in its own dtype."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def write_model(model: Llama4, folder: str | os.PathLike) -> dict[str, str]:
    """Writes `model.safetensors` into an existing folder and flushes it to the disk; returns the hash of every tensor,
    for run.json."""
    path = Path(folder) / MODEL_FILE
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, path, metadata={"format": "pt"})
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())
    return {name: tensor_hash(tensor) for name, tensor in tensors.items()}


def save(model: Llama4, processor: Processor | None, folder: str | os.PathLike, step: int = 0, **run: Any) -> Path:
    """Writes a whole, finished checkpoint (no optimizer state) atomically; `run` adds to or replaces run.json's fields.

    Errors: PunaError if the folder exists and is not empty, or if the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PunaError(f"{folder} exists already: remove it or choose another name")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            record = {
                "format": FORMAT,
                "config": {"model": model.config.to_dict()},
                "step": step,
                "finished": True,
            } | run
            record["hashes"] = write_model(model, work)
            if processor is not None:
                processor.save(work)
            with open(work / RUN_FILE, "w", encoding="utf-8") as handle:
                handle.write(json.dumps(record, indent=2) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
            work.chmod(0o755)  # mkdtemp makes private folders
            work.replace(folder)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:  # the latter is how save_file reports a full disk
        raise PunaError(
            f"can't write {folder}: {getattr(error, 'strerror', None) or error}; check the disk's space and rights"
        ) from error
    return folder


def read_run(folder: Path) -> dict:
    """run.json, checked for the fields that loading needs."""
    try:
        run = read_json(folder / RUN_FILE)
    except PunaError as error:
        raise CorruptCheckpoint(str(error)) from None
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
    run = read_run(folder)
    try:
        config = build(ModelConfig, run["config"]["model"])
    except PunaError as error:
        raise CorruptCheckpoint(f"{folder / RUN_FILE}: config.model is damaged ({error})") from None
    try:
        model = _read_model(folder, config, run["hashes"], dtype, device)
    except CorruptCheckpoint:
        raise
    except PunaError as error:
        raise CorruptCheckpoint(str(error)) from None
    has_processor = (folder / "tokenizer.json").is_file() and (folder / "processor.json").is_file()
    return model, Processor.load(folder) if has_processor else None


def _read_model(folder: Path, config: ModelConfig, hashes: dict, dtype: torch.dtype | None, device: Any) -> Llama4:
    with TensorFolder(folder) as files:
        model = allocate(config, dtype or files.dtype(min(files.file_of, default="model")), device)
        places = dict(model.named_parameters())
        for what, wrong in (
            ("lacks", places.keys() - files.file_of),
            ("should not hold", files.file_of.keys() - places),
        ):
            if wrong:
                raise CorruptCheckpoint(f"{folder} {what} tensor {names(wrong)}: take another checkpoint")
        with torch.no_grad():
            for name, parameter in places.items():
                tensor = files.read(name)
                if tensor.shape != parameter.shape:
                    raise CorruptCheckpoint(
                        f"{folder}: tensor {name} has shape {list(tensor.shape)}, not {list(parameter.shape)}"
                    )
                if hashes.get(name) != tensor_hash(tensor):
                    raise CorruptCheckpoint(
                        f"{folder}: tensor {name} does not match its hash: the file is damaged; take another checkpoint"
                    )
                parameter.copy_(tensor)
    return model
