"""What a vision tower sees, before any language model reads it: names by the nearest embedding, and boxes.

    python benchmarks/tower.py runs/NAME/vision [MORE MODELS] --out tower.json     (half a minute each)

The stage `vision` (stages/vision.py) has each patch token point at the embedding of what it shows and tell its edges.
Read back as it was trained, that is the most a language model behind it can be expected to know:

    naming/test       share of the naming test's pictures (a style never trained on) whose mean feature is nearest, of
                      all names, to its own; a name of several tokens is their mean
    naming/train      the same of augmented pictures in training styles
    scenes/KIND/cells share of the tokens that show a thing whose nearest name, of those in scenes, is that thing's
    scenes/KIND/found one thing is asked for: does the token nearest to its name show it?
    scenes/KIND/iou50 has the box that this token tells an IoU >= 0.5 with the thing's?
    scenes/KIND/edges the same box where the token is known that shows the thing best: what the edges alone allow

KIND: test (unseen backgrounds, what `grounding/iou50` asks), or a lesson of tasks/grounding.py. Items are the same for
all models, of indices that no run trains on. Not a test: no goals but the test's own.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

import puna
from puna.eval.record import commit, device, plain, versions
from puna.processor.grounding import iou
from puna.stages.vision import classes
from puna.tasks import Captions, Grounding, Naming, Scenes
from puna.tasks.grounding import LESSONS
from puna.tasks.looking import shown, tile_places
from puna.tasks.pictures import EmojiPicture, scene_concepts
from puna.train.terms import Names

SEED = 20_000_000  # items of indices that no run trains on


class Tower:
    """One model's tower and the names around it."""

    def __init__(self, folder: str):
        self.model, self.processor = puna.load(folder, dtype=torch.float32)
        names, self.class_of = classes(self.processor)
        self.term = Names(self.model, names)
        self.names_CD = self.term.classes_CD[:-1]
        self.in_scenes = [self.class_of[concept] for concept in scene_concepts()]

    @torch.no_grad()
    def features(self, picture) -> torch.Tensor:
        """[tokens, D], of length 1."""
        return F.normalize(self.model.image_features(self.processor.tiles([picture])).flatten(0, 1), dim=-1)

    def naming(self, pictures) -> list[float]:
        """Whether each picture's nearest name is its own."""
        nearest = (int((self.names_CD @ self.features(picture).mean(0)).argmax()) for picture in pictures)
        return [float(at == self.class_of[picture.concept]) for at, picture in zip(nearest, pictures, strict=True)]

    def scenes(self, scenes, asked) -> dict[str, list[float]]:
        """cells, found, iou50 and edges of scenes, of each of which one thing is asked for: its index in `objects`."""
        result: dict[str, list[float]] = {"cells": [], "found": [], "iou50": [], "edges": []}
        for scene, index in zip(scenes, asked, strict=True):
            spot, cells_T = scene.objects[index], shown(scene, self.processor.image)
            unit_TD = self.features(scene)
            nearest_T = (unit_TD @ self.names_CD[self.in_scenes].T).argmax(-1).tolist()
            named = zip(nearest_T, cells_T, strict=True)
            result["cells"] += [float(self.in_scenes[at] == self.class_of[b.concept]) for at, b in named if b.concept]
            boxes = self._boxes(scene, unit_TD)
            true = (spot.left, spot.top, spot.right, spot.bottom)
            best = int((unit_TD @ self.names_CD[self.class_of[spot.concept]]).argmax())
            result["found"].append(float(cells_T[best].concept == spot.concept))
            result["iou50"].append(float(iou(boxes[best], true) >= 0.5))
            on_it = [iou(box, true) for box, cell in zip(boxes, cells_T, strict=True) if cell.concept == spot.concept]
            result["edges"].append(float(max(on_it, default=0.0) >= 0.5))
        return result

    def _boxes(self, scene, unit_TD: torch.Tensor) -> list[tuple[float, ...]]:
        """What each token tells of its thing's edges, in pixels of the scene."""
        places = tile_places(scene, self.processor.image)
        each = len(unit_TD) // len(places)
        return [
            tuple(start + edge * share for start, share in zip((left, top, left, top), shares, strict=True))
            for (top, left, edge), part in zip(places, self.term.edges(unit_TD).split(each), strict=True)
            for shares in part.tolist()
        ]


def measure(folder: str, items: int) -> list[dict]:
    """All rows of one model."""
    tower, rows = Tower(folder), []

    def add(name: str, values: list[float], chance: float | None = None) -> None:
        mean = sum(values) / len(values)
        error = (mean * (1 - mean) / len(values)) ** 0.5
        rows.append({"name": name, "value": mean, "n": len(values), "stderr": error, "chance": chance,
                     "goal": None, "met": None})  # fmt: skip

    tests = islice(Naming("en").items("test", 0), items)
    chance = 1 / len(tower.names_CD)
    add("naming/test", tower.naming([item.messages[0]["content"][0]["image"] for item in tests]), chance)
    documents = (Captions({"en": 1.0}).document(index) for index in range(SEED, SEED + items))
    seen = [next(part for part in document if isinstance(part, EmojiPicture)) for document in documents]
    add("naming/train", tower.naming(seen), chance)
    questions = list(Grounding(tests=items).items("test", 0))
    kinds = {"test": [item.messages[0]["content"][0]["image"] for item in questions]}
    asked = {"test": [
        [spot.concept for spot in scene.objects].index(item.meta["concept"])
        for scene, item in zip(kinds["test"], questions, strict=True)
    ]}  # fmt: skip
    for lesson in LESSONS:
        source = Scenes({lesson: 1.0})
        kinds[lesson] = [source.document(index)[0] for index in range(SEED, SEED + items)]
        asked[lesson] = [index % len(scene.objects) for index, scene in enumerate(kinds[lesson])]
    for kind, scenes in kinds.items():
        for part, values in tower.scenes(scenes, asked[kind]).items():
            add(f"scenes/{kind}/{part}", values, 1 / len(tower.in_scenes) if part == "cells" else None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders that puna.load reads: a stage of a run, a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--items", type=int, default=200, help="pictures and scenes of a row")
    parser.add_argument("--quick", action="store_true", help="40 of them")
    args = parser.parse_args()
    begin, items, results = time.perf_counter(), 40 if args.quick else args.items, {}
    for folder in args.models:
        results[folder] = measure(folder, items)
        print(folder)
        groups: dict[str, list[str]] = {}
        for row in results[folder]:
            group, part = row["name"].rsplit("/", 1)
            groups.setdefault(group, []).append(f"{part} {100 * row['value']:.0f} %")
        for group, parts in groups.items():
            print(f"  {group:16} {'  '.join(parts)}", flush=True)
    result = {
        "commit": commit(), "versions": versions(), "device": device(), "config": {"items": items},
        "seconds": round(time.perf_counter() - begin, 1), "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
