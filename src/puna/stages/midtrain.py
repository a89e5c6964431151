"""Mid-training: the same loss on longer documents, so that the context grows before the model learns to chat.

Nothing in the architecture changes with the length: local layers keep their chunk, NoPE layers have no positions to
extrapolate, and the attention temperature follows the position (llama4-facts.md §6.2)."""

from __future__ import annotations

from pathlib import Path

from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor
from puna.stages.common import run_stage
from puna.stages.config import StageRun


def midtrain(run: StageRun, folder: Path, processor: Processor, init: str | Path | None = None, **options) -> Llama4:
    """Trains `folder`/midtrain from `init`, or from the same run's pre-training; options as in `run_stage`."""
    source = init or folder / "pretrain"
    if init is None and not source.is_dir():
        raise PunaError(f"midtrain starts from a model: run pretrain first ({source} is missing) or give --init MODEL")
    return run_stage(run, folder, processor, source, **options)
