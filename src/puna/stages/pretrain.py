"""Pre-training: interleaved text, code and pictures from the first step (early fusion), next-token prediction on all
of it; pictures are read, never predicted. It starts from new weights, from the same run's vision tower where it was
trained apart (`vision.py`), or from the model that `init` names."""

from __future__ import annotations

from pathlib import Path

from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor
from puna.stages.common import run_stage
from puna.stages.config import StageRun


def pretrain(run: StageRun, folder: Path, processor: Processor, init: str | Path | None = None, **options) -> Llama4:
    """Trains `folder`/pretrain; options as in `run_stage`."""
    if init is None and run.after:
        init = folder / run.after
        if not init.is_dir():
            raise PunaError(f"pretrain starts from the {run.after} stage: run `puna {run.after}`, or --init MODEL")
    return run_stage(run, folder, processor, init, **options)
