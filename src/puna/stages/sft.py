"""Light supervised fine-tuning: conversations, with the loss on what the assistant says (and its end token) only.

The chat template encodes trusted structure and untrusted content apart, so what the model learns to obey is structure
alone (llama4-facts.md §4.2)."""

from __future__ import annotations

from pathlib import Path

from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor
from puna.stages.common import run_stage
from puna.stages.config import StageRun


def sft(run: StageRun, folder: Path, processor: Processor, init: str | Path | None = None, **options) -> Llama4:
    """Trains `folder`/sft from `init`, or from the same run's mid- or pre-training; options as in `run_stage`."""
    for previous in ("midtrain", "pretrain"):
        if init is None and (folder / previous).is_dir():
            init = folder / previous
    if init is None:
        raise PunaError(f"sft starts from a model: {folder} has no midtrain or pretrain; run one or give --init MODEL")
    return run_stage(run, folder, processor, init, **options)
