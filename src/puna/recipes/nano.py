"""The laptop herd: a whole life on two cores in about ten minutes, on the data that ships with the package."""

from __future__ import annotations

from puna.data import DataConfig
from puna.eval import EvalConfig
from puna.model import preset
from puna.nursery import LANGUAGES
from puna.stages import RunConfig, StageConfig, TokenizerConfig
from puna.train import TrainConfig

TEXT = {f"text/{lang}": 0.022 for lang in LANGUAGES} | {"text/en": 0.14, "code": 0.10}
NAMING = {"en": 0.5} | {lang: 0.5 / 11 for lang in LANGUAGES if lang != "en"}


def _life(name: str) -> RunConfig:
    # Shares of rows. Pictures come first in compute: an eye is harder to raise than a tongue.
    pretrain = StageConfig(
        DataConfig(
            512, TEXT | {"captions": 0.40, "sft/addition": 0.08},
            options={"captions": {"items": 12000}, "sft/addition": {"items": 8000}},
        ),
        TrainConfig(steps=380, rows=8, lr=4e-3, lr_vision=0.5, warmup=30, decay=0.1, floor=0.3, checkpoint_every=150,
                    eval_every=190),
    )  # fmt: skip
    midtrain = StageConfig(
        DataConfig(
            1024, {"long/en": 0.3, "long/code": 0.15, "captions": 0.3, "sft/needle": 0.15, "sft/addition": 0.1},
            options={"captions": {"items": 8000}, "sft/addition": {"items": 6000}, "sft/needle": {"items": 400}},
            seed=1,
        ),
        TrainConfig(steps=60, rows=4, lr=2.5e-3, lr_vision=0.5, warmup=10, decay=0.2, floor=0.3, checkpoint_every=100,
                    eval_every=60),
    )  # fmt: skip
    sft = StageConfig(
        DataConfig(
            512,
            {"sft/naming": 0.50, "sft/addition": 0.20, "sft/grounding": 0.10, "sft/facts": 0.04, "text/en": 0.06,
             "code": 0.04, "sft/conversations": 0.03, "captions": 0.03},
            options={"sft/naming": {"items": 24000, "languages": NAMING}, "sft/addition": {"items": 16000},
                     "sft/grounding": {"items": 3000}, "sft/facts": {"items": 2000},
                     "sft/conversations": {"items": 1000}, "captions": {"items": 2000}},
            seed=2,
        ),
        TrainConfig(steps=300, rows=8, lr=2.5e-3, lr_vision=0.5, warmup=15, decay=0.5, floor=0.02,
                    checkpoint_every=150, eval_every=150),
    )  # fmt: skip
    return RunConfig(name, preset(name), TokenizerConfig(), pretrain, midtrain, sft, EvalConfig())


def nano_scout() -> RunConfig:
    """Scout's shape, 16 experts in every layer."""
    return _life("nano_scout")


def nano_maverick() -> RunConfig:
    """Maverick's shape, 128 experts in every second layer."""
    return _life("nano_maverick")
