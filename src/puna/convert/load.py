"""`puna.load`: one function for every kind of model folder, told apart by what lies in it.

run.json + model.safetensors   a checkpoint
step-00000120/ ...             a stage: its newest checkpoint that is not damaged
pretrain/ midtrain/ sft/       a run: its last finished stage
config.json                    a Hugging Face folder
params.json, *.pth             Meta's own format: an error that says what to do
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from puna.convert.huggingface import load_hf
from puna.convert.puna import MODEL_FILE, RUN_FILE, STEP, CorruptCheckpoint, load_checkpoint, read_run
from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor

STAGES = ("sft", "midtrain", "pretrain")  # the furthest in a model's life first


def load(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama4, Processor | None]:
    """Loads a model: a run folder, a stage folder, a checkpoint folder or a Hugging Face folder.

    dtype: of the parameters; None keeps the stored type.  device: None is torch's default device.
    Returns (model in evaluation mode, processor); the processor is None where the folder holds no tokenizer.
    Errors: PunaError in one line with what to do.  A damaged newest checkpoint of a stage is skipped with a warning;
    one that was named is an error that names the tensor.
    """
    folder = Path(path).expanduser()
    model, processor = _dispatch(folder, dtype, device)
    return model.eval(), processor


def _dispatch(
    folder: Path, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[Llama4, Processor | None]:
    if not folder.exists():
        raise PunaError(f"there is no model at {folder}: check the path")
    if not folder.is_dir():
        raise PunaError(f"{folder} is a file: give the folder it lies in")
    if (folder / RUN_FILE).is_file() and ((folder / MODEL_FILE).is_file() or STEP.search(folder.name)):
        return load_checkpoint(folder, dtype, device)
    if checkpoints(folder):
        return _load_stage(folder, dtype, device)
    stages = [stage for stage in STAGES if checkpoints(folder / stage)]
    if stages:
        return _load_run(folder, stages, dtype, device)
    if (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth")):
        raise PunaError(
            f"{folder} is in Meta's own format, which puna doesn't read yet: use the model's Hugging Face release"
        )
    if (folder / "config.json").is_file():
        return load_hf(folder, dtype, device)
    if (folder / MODEL_FILE).is_file():
        raise PunaError(
            f"{folder} holds {MODEL_FILE} but neither {RUN_FILE} (puna) nor config.json (Hugging Face): restore it"
        )
    raise PunaError(f"{folder} holds no model: expected run.json, step-* folders, stage folders or config.json")


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


def _load_stage(
    stage: Path, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[Llama4, Processor | None]:
    damage = None
    for folder in checkpoints(stage):
        try:
            return load_checkpoint(folder, dtype, device)
        except CorruptCheckpoint as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=4)
            damage = damage or error
    raise PunaError(f"all checkpoints of {stage} are damaged; the newest: {damage}")


def _load_run(
    folder: Path, stages: list[str], dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[Llama4, Processor | None]:
    for stage in stages:
        if _finished(folder / stage):
            return _load_stage(folder / stage, dtype, device)
    raise PunaError(f"no stage of {folder} is finished yet: let it run on, or load {folder / stages[0]} as it is")


def _finished(stage: Path) -> bool:
    """Whether the newest checkpoint with a readable run.json says so."""
    for folder in checkpoints(stage):
        try:
            return read_run(folder).get("finished") is True
        except CorruptCheckpoint as error:
            warnings.warn(str(error), stacklevel=5)
    return False
