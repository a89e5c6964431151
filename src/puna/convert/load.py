"""`puna.load`: one function for every kind of model folder, told apart by what lies in it.

run.json + model.safetensors   a checkpoint
step-00000120/ ...             a stage: its newest checkpoint that is not damaged
[vision/] pretrain/ midtrain/ sft/   a run: its last finished stage
config.json                    a Hugging Face folder
params.json, *.pth             a folder of Meta's

`open_model` finds and checks the parameters without reading them: what `load` fills a model from and what
`puna convert` moves into other files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from puna.convert.huggingface import open_hf
from puna.convert.layout import FileStore
from puna.convert.meta import is_meta, open_meta
from puna.convert.puna import MODEL_FILE, RUN_FILE, STEP, CorruptCheckpoint, load_checkpoint, open_checkpoint, read_run
from puna.convert.tensors import fill
from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor

Found = TypeVar("Found")
STAGES = ("sft", "midtrain", "pretrain", "vision")  # the furthest in a model's life first


def load(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama4, Processor | None]:
    """Loads a model: a run folder, a stage folder, a checkpoint folder, a Hugging Face folder or a folder of Meta's.

    dtype: of the parameters; None keeps the stored type.  device: None is torch's default device.
    Returns (model in evaluation mode, processor); the processor is None where the folder holds no tokenizer.
    Errors: PunaError in one line with what to do.  A damaged newest checkpoint of a stage is skipped with a warning;
    one that was named is an error that names the tensor.
    """
    folder = find(path)
    if checkpoints(folder):
        model, processor = _newest(folder, lambda place: load_checkpoint(place, dtype, device))
    elif _is_checkpoint(folder):
        model, processor = load_checkpoint(folder, dtype, device)
    else:
        store, processor = open_model(folder)
        model = fill(store, dtype, device)
    return model.eval(), processor


def open_model(path: str | os.PathLike) -> tuple[FileStore, Processor | None]:
    """The same folders as `load`, their parameters found and checked but not read: (store, processor)."""
    return with_model(path, lambda store, processor: (store, processor))


def with_model(path: str | os.PathLike, use: Callable[[FileStore, Processor | None], Found]) -> Found:
    """`use(store, processor)` of what `open_model` finds. Damage of a stage's newest checkpoint may show only while
    `use` reads it: then there is a warning, and `use` is called again with the checkpoint before."""
    folder = find(path)
    if checkpoints(folder):
        return _newest(folder, lambda place: use(*open_checkpoint(place)))
    if _is_checkpoint(folder):
        return use(*open_checkpoint(folder))
    return use(*(open_meta(folder) if is_meta(folder) else open_hf(folder)))


def find(path: str | os.PathLike) -> Path:
    """The checkpoint, stage, Hugging Face or Meta folder that `path` means. Errors: PunaError if there is no model."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise PunaError(f"there is no model at {folder}: check the path")
    if not folder.is_dir():
        raise PunaError(f"{folder} is a file: give the folder it lies in")
    if _is_checkpoint(folder) or checkpoints(folder):
        return folder
    stages = [stage for stage in STAGES if checkpoints(folder / stage)]
    if stages:
        for stage in stages:
            if _finished(folder / stage):
                return folder / stage
        raise PunaError(f"no stage of {folder} is finished yet: let it run on, or load {folder / stages[0]} as it is")
    if is_meta(folder) or (folder / "config.json").is_file():
        return folder
    if (folder / MODEL_FILE).is_file():
        raise PunaError(
            f"{folder} holds {MODEL_FILE} but neither {RUN_FILE} (puna) nor config.json (Hugging Face): restore it"
        )
    raise PunaError(
        f"{folder} holds no model: expected run.json, step-* folders, stage folders, config.json or params.json"
    )


def identity(store: FileStore) -> str:
    """Which files a store reads: paths, sizes and times of change, so that a conversion knows its source again."""
    files = sorted({stored.path.resolve() for stored in store.table.values()})
    return "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() and ((folder / MODEL_FILE).is_file() or bool(STEP.search(folder.name)))


def checkpoints(stage: Path) -> list[Path]:
    """The `step-*` folders of a stage, newest first; empty if it has none (or is none)."""
    if not stage.is_dir():
        return []
    found = [
        (int(match.group(1)), folder)
        for folder in stage.iterdir()
        if folder.is_dir() and (match := STEP.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def _newest(stage: Path, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of the newest checkpoint of a stage that is not damaged."""
    damage = None
    for folder in checkpoints(stage):
        try:
            return read(folder)
        except CorruptCheckpoint as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=4)
            damage = damage or error
    raise PunaError(f"all checkpoints of {stage} are damaged; the newest: {damage}")


def _finished(stage: Path) -> bool:
    """Whether the newest checkpoint with a readable run.json says so."""
    for folder in checkpoints(stage):
        try:
            return read_run(folder).get("finished") is True
        except CorruptCheckpoint as error:
            warnings.warn(str(error), stacklevel=5)
    return False
