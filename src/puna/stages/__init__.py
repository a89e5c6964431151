"""The stages of a model's life: data, loss, schedule and what to load; the loop is `puna.train`'s."""

from puna.stages.config import STAGES, RunConfig, StageConfig, StageRun, TokenizerConfig
from puna.stages.midtrain import midtrain
from puna.stages.pretrain import pretrain
from puna.stages.sft import sft
from puna.stages.tokenizer import make_processor
from puna.stages.vision import vision

RUN = {"vision": vision, "pretrain": pretrain, "midtrain": midtrain, "sft": sft}

__all__ = ["RUN", "STAGES", "RunConfig", "StageConfig", "StageRun", "TokenizerConfig", "make_processor"]
