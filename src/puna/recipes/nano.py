"""The laptop herd: a whole life on two cores in about ten minutes, or an hour, on the data that ships with the package.

The order of things is the recipe (docs/LOG.md has the numbers): first look, then read, count and talk.

    vision     (the hour) the tower alone, names and edges, several times as many pictures a second as in the model
    pretrain   pictures and their names, a little of everything else; small steps. The head learns at once, everything
               else is warmed up over half the stage, so that pictures are still told apart when they begin to pay
    midtrain   longer text and code, sums, hidden codes; the body at four times the rate (the hour's: also pointing)
    sft        conversations, and enough of all before that nothing is forgotten
"""

from __future__ import annotations

import math
from dataclasses import replace

from puna.data import DataConfig, Phase
from puna.model import preset
from puna.nursery import LANGUAGES
from puna.stages import RunConfig, StageConfig, TokenizerConfig
from puna.train import TrainConfig

OTHERS = [lang for lang in LANGUAGES if lang != "en"]
# Text in other languages: more of those whose own unigram is hard to beat (long words; scripts of many bytes a letter).
NEED = {lang: 0.8 for lang in OTHERS} | {"ar": 1.0, "es": 1.0, "id": 1.3, "hi": 1.4, "vi": 1.6, "de": 2.0, "th": 2.0}
LOOK = dict(lr=4e-4, lr_embedding=1.0, lr_head=5.0, lr_vision=2.5, lr_adapter=0.5, lr_router=0.3, warmup_head=20)
GROW = dict(lr=1.5e-3, lr_embedding=1.0, lr_head=1.3, lr_vision=0.67, lr_adapter=0.2, lr_router=0.7)
# The hour's eyes: a whole scene on one tile, 16 tokens of 32 pixels. Trained apart, the tower stays as it is until the
# model has learnt to read it, and goes on slowly then: at pre-training's rates it forgot half of what it knew.
SIGHT = dict(image_size=128, layers=3)
# While it learns to find things, in pictures and in what was said, attention goes ahead, by Muon: it tells two things
# apart after as many lines as AdamW needs to begin (docs/LOG.md). The experts follow slowly.
FIND = dict(optimizer="muon_attention", lr=5e-3, lr_ffn=0.02, lr_embedding=0.2, lr_head=1.0, lr_vector=0.2,
            lr_router=0.06, warmup_head=20)  # fmt: skip
SETTLE = dict(optimizer="muon_attention", lr=4e-3, lr_ffn=0.375, lr_embedding=0.375, lr_head=0.5, lr_vector=0.375,
              lr_router=0.25)  # fmt: skip
# A row for each of two cores: they meet once a step, not at every product (train/workers.py).
PAIR = dict(rows=2, accumulate=2, workers=2)
STILL = dict(lr_vision=0.0, lr_sight=0.0, lr_adapter=0.0)
SLOW = dict(lr_vision=0.04, lr_sight=0.04, lr_adapter=0.04)

HEAP_MB = 1536  # of a step of 2,048 tokens


def _english(share: float) -> dict[str, float]:
    """Weights of the languages: `share` of English, the rest evenly."""
    return {"en": share} | {lang: (1 - share) / len(OTHERS) for lang in OTHERS}


def _mix(others: float, **shares: float) -> dict[str, float]:
    """Shares of rows; `others`: of text in the languages that are not English, together. sft_x stands for sft/x."""
    named = {name.replace("_", "/"): share for name, share in shares.items()}
    return named | {f"text/{lang}": others * need / sum(NEED.values()) for lang, need in NEED.items()}


def _stage(
    seq_len: int, seed: int, weights: dict[str, float], options: dict, then: tuple[Phase, ...] = (), **train
) -> StageConfig:
    named = set(weights).union(*(phase.weights for phase in then))
    chosen = {name: values for name, values in options.items() if name in named}
    return StageConfig(DataConfig(seq_len, weights, seed, chosen, then), TrainConfig(heap_mb=HEAP_MB, **train))


OPTIONS = {
    "captions": {"items": 40000, "languages": _english(0.92)},
    "sft/addition": {"items": 16000},
    "sft/naming": {"items": 12000, "languages": _english(0.7)},
    "sft/grounding": {"items": 2000},
    "sft/facts": {"items": 1500},
    "sft/conversations": {"items": 1000},
    "sft/needle": {"items": 500},
}


# The tables: minutes -> (vision, pretrain, midtrain, sft), made for SPEED tokens of pre-training a second.
SPEED = 4700.0


def _twelve() -> tuple[StageConfig | None, ...]:
    pretrain = _stage(
        512, 0, _mix(0.04, captions=0.90, text_en=0.03, code=0.02, sft_addition=0.01), OPTIONS,
        steps=680, rows=2, warmup=300, decay=0.15, floor=0.2, checkpoint_every=200, eval_every=310, **LOOK,
    )  # fmt: skip
    midtrain = _stage(
        1024, 1, _mix(0.18, long_en=0.29, long_code=0.18, sft_addition=0.16, captions=0.15, sft_needle=0.04),
        OPTIONS | {"captions": {"items": 4000, "languages": _english(0.92)}, "sft/addition": {"items": 3000}},
        steps=100, rows=2, warmup=15, decay=0.2, floor=0.5, checkpoint_every=100, eval_every=100, **GROW,
    )  # fmt: skip
    sft = _stage(
        512, 2,
        _mix(0.165, sft_naming=0.165, sft_addition=0.285, text_en=0.135, code=0.08, captions=0.10, sft_grounding=0.03,
             sft_facts=0.02, sft_conversations=0.02),
        OPTIONS, steps=540, rows=4, warmup=15, decay=0.5, floor=0.02, checkpoint_every=180, eval_every=270, **GROW,
    )  # fmt: skip
    return None, pretrain, midtrain, sft


def _sixty() -> tuple[StageConfig | None, ...]:
    # An hour also learns to look codes up in long texts and to point. Both are to find what a name stands beside, so
    # both come first and together, in many small steps at rates that let attention go ahead (FIND); mid-training as it
    # is here still forgets places. Look-ups come in lessons (tasks/recall.py): few codes, then many, then in texts.
    # Pointing needs edges first, which the tower learns apart; then which of two things a name means, in words, then
    # boxes of six. Numbers: docs/LOG.md.
    options = OPTIONS | {
        "captions": {"items": 40000, "languages": _english(0.85)},
        "scenes": {"items": 8000, "lessons": {"pair": 1.0, "wide": 1.0, "all": 2.0}, "words": 0.2},
        "sft/naming": {"items": 20000, "languages": _english(0.6)},
        "sft/addition": {"items": 40000},
        "sft/grounding": {"items": 6000, "turns": 6},
        "sft/recall": {"items": 4000, "most": 8},
        "sft/needle": {"items": 2000, "shortest": 0.3, "turns": 6, "every": 0.6},
    }
    # The tower sees a whole scene on one tile (SIGHT), and learns names and edges apart, most of the time in scenes.
    vision = _stage(
        256, 3, {"captions": 0.45, "scenes": 0.55},
        {"captions": {"items": 60000, "languages": {"en": 1.0}},
         "scenes": {"items": 160000, "lessons": {"all": 1.0}, "told": False}},
        steps=10000, warmup=100, decay=0.4, floor=0.02, checkpoint_every=2000, eval_every=2000,
        optimizer="muon", lr=8e-4, lr_vision=3.0, weight_decay=0.02, **PAIR,
    )  # fmt: skip
    pretrain = _stage(
        256, 0, {"scenes": 0.5, "sft/recall": 0.5},
        options | {"sft/recall": {"items": 8000, "most": 6},
                   "scenes": {"items": 16000, "lessons": {"alone": 3.0, "pair": 7.0, "wide": 10.0}, "words": 1.0}},
        then=(Phase(0.36, _mix(0.03, captions=0.46, scenes=0.20, sft_recall=0.18, text_en=0.08, code=0.03,
                               sft_addition=0.02)),),
        steps=3600, warmup=50, decay=0.1, floor=0.3, checkpoint_every=1200, eval_every=1800, **PAIR | FIND | STILL,
    )  # fmt: skip
    midtrain = _stage(
        1024, 1, {"sft/recall": 0.5, "scenes": 0.5},
        options | {"captions": {"items": 16000, "languages": _english(0.85)},
                   "scenes": {"items": 12000, "lessons": {"alone": 1.0, "pair": 2.0, "wide": 4.0, "all": 3.0},
                              "words": 0.3},
                   "sft/recall": {"items": 8000, "fewest": 2, "most": 8},
                   "sft/needle": {"items": 2200, "keys": [5, 10], "fewest": 2, "shortest": 0.3, "turns": 6,
                                  "every": 0.9}},
        then=(Phase(0.2, {"sft/recall": 0.18, "sft/needle": 0.45, "scenes": 0.22, "captions": 0.15}),
              Phase(0.5, {"sft/recall": 0.05, "sft/needle": 0.16, "long/en": 0.20, "long/code": 0.07,
                          "sft/addition": 0.06, "captions": 0.22, "scenes": 0.24})),
        steps=2900, rows=1, warmup=15, decay=0.1, floor=0.5, checkpoint_every=400, eval_every=1000,
        **FIND | STILL | dict(lr_ffn=0.06),
    )  # fmt: skip
    sft = _stage(
        1024, 2,
        _mix(0.06, sft_naming=0.17, sft_addition=0.11, text_en=0.13, code=0.05, captions=0.08, scenes=0.10,
             sft_grounding=0.20, sft_needle=0.06, sft_recall=0.01, sft_facts=0.02, sft_conversations=0.01),
        options,
        steps=2550, warmup=15, decay=0.4, floor=0.02, checkpoint_every=300, eval_every=1000, **PAIR | SETTLE | SLOW,
    )  # fmt: skip
    return vision, pretrain, midtrain, sft


TABLES = {12.0: _twelve, 60.0: _sixty}


def _life(name: str, minutes: float | None) -> RunConfig:
    # The table next to `minutes` in proportion: 27 is as far from 12 as from 60.
    table = min(TABLES, key=lambda t: abs(math.log(max(minutes or 12.0, 1e-3) / t)))
    vision, *rest = TABLES[table]()
    model = preset(name)
    if vision is not None:
        model = replace(model, vision=replace(model.vision, **SIGHT), ffn_init=0.1)
    return RunConfig(name, model, TokenizerConfig(), *rest, minutes=table, speed=SPEED, vision=vision)


def nano_scout(minutes: float | None = None) -> RunConfig:
    """Scout's shape, 16 experts in every layer."""
    return _life("nano_scout", minutes)


def nano_maverick(minutes: float | None = None) -> RunConfig:
    """Maverick's shape, 128 experts in every second layer."""
    return _life("nano_maverick", minutes)
