"""The vision tower apart, before the model sees: Llama 4's was trained so too (llama4-facts.md §3.1).

A tower is a tenth of a small model. Alone it sees several times as many pictures in the same time as inside the model,
and learns from a loss of its own at every patch token (`train.terms.Names`): which name's embedding is nearest to what
this token shows, and where are the edges of that thing? The names are the English ones of the nursery's pictures and
of the things in composed scenes (`tasks/looking.py`). Embeddings and everything else stay at their initial values,
which are those pre-training begins with, so that it then finds pictures that already read like words; there the tower
learns on with all the rest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from puna.data import Batch, Batches
from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor
from puna.stages.common import run_stage
from puna.stages.config import StageRun
from puna.tasks.looking import shown
from puna.tasks.pictures import by_id
from puna.train.terms import Names


class LookBatches(Batches):
    """Batches in which only patch tokens count, each with its class among `classes` as target.

    extra: edges [B, T, 4], NaN where unknown.
    """

    def build(self, step: int) -> Batch:
        batch = super().build(step)
        patch_BT = batch.tokens_BT == self.processor.tokenizer.patch
        targets_BT, edges_BT4 = torch.full_like(batch.tokens_BT, -1), torch.full((*patch_BT.shape, 4), math.nan)
        names, class_of = classes(self.processor)
        for i, index in enumerate(batch.row_index):
            name, row = self.mixture.locate(index)
            image, pictures = self.processor.image, self.sources[name].pictures[row]
            found = [each for picture in pictures for each in shown(picture, image)]
            place = patch_BT[i].nonzero().squeeze(-1).tolist()
            for at, (concept, edges) in zip(place, found, strict=True):
                if concept is not None:
                    targets_BT[i, at] = class_of[concept] if concept else len(names) - 1
                if edges is not None:
                    edges_BT4[i, at] = torch.tensor(edges)
        return replace(
            batch, targets_BT=targets_BT.clamp(min=0), valid_BT=targets_BT >= 0, extra={"edges": edges_BT4},
            doc_ids_BT=torch.where(patch_BT, batch.doc_ids_BT, -1),
        )  # fmt: skip


@lru_cache(maxsize=4)
def classes(processor: Processor) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    """(tokens of each class, class of each concept). Concepts of one name are one class; the last class is nothing."""
    tokens = {concept.id: tuple(processor.tokenizer.encode(concept.names["en"])) for concept in by_id().values()}
    place = {name: i for i, name in enumerate(dict.fromkeys(tokens.values()))}
    return [*place, (processor.tokenizer.patch,)], {concept: place[name] for concept, name in tokens.items()}


def vision(run: StageRun, folder: Path, processor: Processor, init: str | Path | None = None, **options) -> Llama4:
    """Trains `folder`/vision; options as in `run_stage`. PunaError for a model without a tower, or without pictures."""
    if run.model.vision is None:
        raise PunaError("the stage `vision` trains the vision tower, but model.vision is none: leave it out")
    if run.lora.rank:
        raise PunaError("the stage `vision` trains the whole tower: leave lora.rank at 0")
    options["validation"] = None  # nothing here reads text
    names, _ = classes(processor)
    return run_stage(run, folder, processor, init, read=LookBatches, term=lambda model: Names(model, names),
                     only="vision.", **options)  # fmt: skip
