"""What a training run is told: one frozen dataclass, saved with every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from puna.errors import PunaError
from puna.optim import OPTIMIZERS
from puna.optim.adamw import GROUPS
from puna.precision.fp8_training import RECIPES
from puna.train.balance import BALANCING


@dataclass(frozen=True)
class TrainConfig:
    """Optimization and bookkeeping of one stage. A step is `rows` rows of the stage's sequence length."""

    steps: int = 100
    rows: int = 8  # rows per optimizer step
    accumulate: int = 1  # micro-batches per step; rows must divide by it
    workers: int = 1  # micro-batches at a time, each in a thread with cores of its own (train/workers.py)
    optimizer: str = "adamw"  # adamw | muon (hidden matrices) | muon_attention (attention's alone); the rest by adamw
    lr: float = 3e-3  # peak learning rate of attention's matrices
    lr_ffn: float = 1.0  # multipliers on lr for the other groups, 0 freezes one: feed-forward matrices and experts
    lr_embedding: float = 1.0
    lr_head: float = 1.0
    lr_vector: float = 1.0  # norms and biases
    lr_router: float = 1.0
    lr_vision: float = 1.0  # the vision encoder's matrices
    lr_sight: float = 1.0  # its norms, biases and positions; with all three of vision 0 nothing is computed for them
    lr_adapter: float = 1.0  # the adapter and the projector behind it
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    warmup: int = 20  # steps
    warmup_head: int = 0  # steps of the head's own, shorter warm-up; 0: the same
    decay: float = 0.2  # last fraction of the steps
    floor: float = 0.05  # final learning rate / peak
    clip: float = 1.0  # global gradient norm
    balancing: str = "bias"  # bias | auxiliary | expert_choice (train/balance.py)
    balance: float | None = None  # its strength: update a step, weight of the loss, experts a token; 0: none
    max_skips: int = 5  # consecutive non-finite steps before the run stops
    recompute: int = 0  # every n-th block's activations are computed again in the backward, to save memory; 0: none
    compute_dtype: str = "auto"  # of activations: auto | bfloat16 | float32
    compile: str = "auto"  # regions of small operations (model/regions.py): auto (on a GPU) | on | off
    fp8: str = "off"  # large products in FP8: off | rowwise | tensorwise | mxfp8 (precision/fp8_training.py)
    threads: int = 0  # 0: all cores
    heap_mb: int = 0  # MiB of heap mapped before the first step (train/memory.py); about what a step needs
    slice: int = 1024  # positions per slice of the loss
    checkpoint_every: int = 200
    keep: int = 2  # newest checkpoints kept of an unfinished stage; of a finished one, the last
    keep_every: int = 0  # and every n-th checkpoint for good, finished or not; 0: none
    checkpoint_async: bool | None = None  # written beside training; None: where several processes train
    eval_every: int = 100

    def __post_init__(self):
        for name in ("steps", "rows", "accumulate", "workers", "slice", "checkpoint_every", "keep", "eval_every",
                     "max_skips"):  # fmt: skip
            if getattr(self, name) < 1:
                raise PunaError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.rows % self.accumulate:
            raise PunaError(f"train.rows {self.rows} must divide by train.accumulate {self.accumulate}")
        if self.accumulate % self.workers:
            raise PunaError(f"train.accumulate {self.accumulate} must divide by train.workers {self.workers}")
        if self.workers > 1 and (self.balancing != "bias" or self.fp8 != "off" or self.compile == "on"):
            raise PunaError("train.workers: threads side by side know train.balancing bias, train.fp8 off and no "
                            "train.compile: set train.workers 1")  # fmt: skip
        for name in ("lr", "clip", "eps"):
            if not getattr(self, name) > 0:
                raise PunaError(f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "warmup_head", "threads", "heap_mb", "keep_every", "recompute"):
            if getattr(self, name) < 0:
                raise PunaError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for group, multiplier in self.multipliers.items():
            if not multiplier >= 0:
                raise PunaError(f"train.lr_{group} must not be negative (0 freezes the group), got {multiplier}")
        for name in ("decay", "floor", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise PunaError(f"train.{name} must lie in 0..1, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise PunaError(f"train.optimizer must be {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.balancing not in BALANCING:
            raise PunaError(f"train.balancing must be {', '.join(BALANCING)}, not {self.balancing!r}")
        if self.balance is not None and not 0 <= self.balance < math.inf:
            raise PunaError(f"train.balance must be 0 (none) or more, not {self.balance}")
        if self.compute_dtype not in ("auto", "bfloat16", "float32"):
            raise PunaError(f"train.compute_dtype must be auto, bfloat16 or float32, got {self.compute_dtype!r}")
        if self.compile not in ("auto", "on", "off"):
            raise PunaError(f"train.compile must be auto, on or off, got {self.compile!r}")
        if self.fp8 not in ("off", *RECIPES):
            raise PunaError(f"train.fp8 must be off, {', '.join(RECIPES)}, got {self.fp8!r}")

    @property
    def multipliers(self) -> dict[str, float]:
        """Learning-rate multipliers by parameter group (`optim.adamw.group_of`); that of attention's matrices is 1."""
        return {group: getattr(self, f"lr_{group}") for group in GROUPS if group != "matrix"}
