"""What a run is: one frozen RunConfig, a recipe's only product; a StageRun is its view for one stage.

RunConfig   name, model, tokenizer, [vision,] pretrain, midtrain, sft, eval   `puna raise`
StageRun    the same with one stage's data and train on top               `puna pretrain`, `--train.steps 100`
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from puna.data import DataConfig
from puna.errors import PunaError
from puna.eval import EvalConfig
from puna.model import ModelConfig
from puna.model.lora import LoRAConfig
from puna.parallel.layout import Layout
from puna.train import TrainConfig

STAGES = ("vision", "pretrain", "midtrain", "sft")


@dataclass(frozen=True)
class TokenizerConfig:
    """How a run's tokenizer is trained: BPE on equal shares of each language and of code."""

    vocab_size: int = 8192
    special: str = "compact"
    digits: str = "single"
    chars: int = 300_000  # characters of each language
    code_chars: int = 500_000


@dataclass(frozen=True)
class StageConfig:
    """One stage: what it reads and how it is optimised."""

    data: DataConfig
    train: TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """A whole life."""

    name: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    pretrain: StageConfig
    midtrain: StageConfig
    sft: StageConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    minutes: float = 12.0  # what the recipe's steps are made for ...
    speed: float = 5000.0  # ... at so many pre-training tokens per second
    vision: StageConfig | None = None  # the tower apart, first of all; None: it learns with the rest

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages this run has, in order."""
        return tuple(name for name in STAGES if getattr(self, name) is not None)

    def stage(self, name: str) -> StageRun:
        """The view of one stage."""
        if name not in STAGES:
            raise PunaError(f"unknown stage {name!r}: choose from {', '.join(STAGES)}")
        part: StageConfig | None = getattr(self, name)
        if part is None:
            raise PunaError(f"{self.name} has no stage {name!r}: it has {', '.join(self.stages)}")
        after = "vision" if name == "pretrain" and self.vision is not None else None
        return StageRun(name, self.name, self.model, self.tokenizer, part.data, part.train, self.seed, after)


@dataclass(frozen=True)
class StageRun:
    """One stage of a run."""

    stage: str
    name: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    train: TrainConfig
    seed: int = 0
    after: str | None = None  # a stage of this recipe that pre-training starts from
    lora: LoRAConfig = field(default_factory=LoRAConfig)  # rank 0: the whole model is trained
    parallel: Layout = field(default_factory=Layout)  # of the processes that torchrun starts; may change on resuming

    def with_model(self, model: ModelConfig) -> StageRun:
        return dataclasses.replace(self, model=model)
