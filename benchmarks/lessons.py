"""How far a model is in its lessons: what a look-up and a place cost it, in nats, before it can answer at all.

    python benchmarks/lessons.py runs/NAME/midtrain [MORE MODELS] --out lessons.json     (1-2 minutes each)

A graded answer is 0 % for most of the time in which a skill is learnt: five digits in a row, four edges of a box. What
moves first is the cross-entropy of the one token that depends on the skill, given the true text before it:

    recall/K/first, /rest   first digit of a code among K in one chunk; mean of the other four     ln 10 = 2.30 blind
    needle/L/first, /rest   the same in L tokens of held-out text, 5 to 8 codes                     2.30
    recall/K/all, needle/L/all   share of codes whose five digits are all the most likely          0
    caption/name            first token of the name behind a picture                                ln(names) ~ 5
    scenes/LESSON/name      first token of a thing's name in a scene; not known which, and not taught   ln(names) ~ 5
    scenes/LESSON/row, /column   the words of its place, the name given                             ln 3 = 1.10
    scenes/LESSON/x1 ...    first digits of its box, the name and the edges before it given         ~ 2.2

With fixed items for all models, so that two checkpoints of one run, or two runs, compare. Not a test: no goals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import puna
from puna.data.sources import make_task
from puna.eval.record import commit, device, plain, versions
from puna.tasks import Captions, Scenes
from puna.tasks.grounding import LESSONS, in_words, written
from puna.tasks.pictures import by_id

SEED = 20_000_000  # items of indices that no run trains on


class Probe:
    """One model and the cross-entropy of single tokens of encoded texts."""

    def __init__(self, folder: str):
        self.model, self.processor = puna.load(folder, dtype=torch.float32)
        self.model.eval()

    @torch.no_grad()
    def costs(self, encoded) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(tokens as text, nats of each, whether it was the most likely), the first left out."""
        tokens_T = torch.tensor(encoded.tokens)[None].long()
        tiles = self.processor.tiles(encoded.pictures) if encoded.pictures else None
        logits_TV = self.model(tokens_T, tiles).float()[0, :-1]
        nats = F.cross_entropy(logits_TV, tokens_T[0, 1:], reduction="none")
        texts = [self.processor.tokenizer.decode([int(token)]) for token in tokens_T[0, 1:]]
        return texts, nats.numpy(), (logits_TV.argmax(-1) == tokens_T[0, 1:]).numpy()

    def codes(self, name: str, length: int, items: int, **config) -> dict[str, list[float]]:
        """Digits of the answers' codes."""
        task = make_task(name, self.processor, length, config)
        split = "test" if name == "needle" else "train"
        first, rest, whole = [], [], []
        for index in range(items):
            encoded = self.processor.encode_chat(task.item(index if split == "test" else SEED + index, split).messages)
            texts, nats, right = self.costs(encoded)
            digits = [i for i, text in enumerate(texts) if encoded.loss[i + 1] and text.isdigit()]
            for at in range(0, len(digits), 5):
                code = digits[at : at + 5]
                first.append(float(nats[code[0]]))
                rest += [float(nats[i]) for i in code[1:]]
                whole.append(float(right[code].all()))
        return {"first": first, "rest": rest, "all": whole}

    def names(self, items: int) -> list[float]:
        """First token of a caption's name."""
        captions, costs = Captions({"en": 1.0}), []
        for index in range(SEED, SEED + items):
            encoded = self.processor.encode_document(captions.document(index))
            costs.append(float(self.costs(encoded)[1][int(np.argmax(encoded.loss)) - 1]))
        return costs

    def scenes(self, lesson: str, items: int) -> dict[str, list[float]]:
        """Names, places in words and boxes of the first thing of a scene."""
        result: dict[str, list[float]] = {key: [] for key in ("name", "row", "column", "x1", "y1", "x2", "y2")}
        source = Scenes({lesson: 1.0})
        for index in range(SEED, SEED + items):
            scene = source.document(index)[0]
            spot = scene.objects[index % len(scene.objects)]
            name = by_id()[spot.concept].names["en"]
            for line in (in_words, written):
                head, text = line(spot, scene.side)
                _, nats, _ = self.costs(self.processor.encode_document([scene, head + text]))
                nats = nats[:-1]  # without end_of_text
                if line is in_words:
                    result["name"].append(float(nats[self._count(scene, "")]))
                    result["row"].append(float(nats[self._count(scene, name)]))
                    result["column"].append(float(nats[self._count(scene, f"{name} {text.split()[0]}")]))
                    continue
                edges = spot.box(scene.side)
                for i, edge in enumerate(("x1", "y1", "x2", "y2")):
                    shown = head + "".join(f"{value}," for value in edges[:i])
                    result[edge].append(float(nats[self._count(scene, shown)]))
        return result

    def _count(self, scene, text: str) -> int:
        """How many predicted tokens a scene and the beginning of its text take."""
        return len(self.processor.encode_document([scene, text] if text else [scene]).tokens) - 2


def measure(folder: str, items: int) -> list[dict]:
    """All rows of one model."""
    probe, rows = Probe(folder), []

    def add(name: str, values: list[float]) -> None:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        rows.append({"name": name, "value": statistics.fmean(values), "n": len(values), "stderr": error})

    for most in (1, 2, 8):
        for part, values in probe.codes("recall", 1024, max(2, 2 * items // most), fewest=most, most=most).items():
            add(f"recall/{most}/{part}", values)
    for length in (400, 900, 1900):
        for part, values in probe.codes("needle", length, items, tests=items).items():
            add(f"needle/{length}/{part}", values)
    add("caption/name", probe.names(2 * items))
    for lesson in LESSONS:
        for part, values in probe.scenes(lesson, items).items():
            add(f"scenes/{lesson}/{part}", values)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders that puna.load reads: a stage of a run, an export")
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--items", type=int, default=32, help="items of a row, at least 2")
    args = parser.parse_args()
    begin, results = time.perf_counter(), {}
    for folder in args.models:
        results[folder] = measure(folder, max(2, args.items))
        print(folder)
        groups: dict[str, list[str]] = {}
        for row in results[folder]:
            group, part = row["name"].rsplit("/", 1)
            groups.setdefault(group, []).append(f"{part} {row['value']:.2f}")
        for group, parts in groups.items():
            print(f"  {group:16} {'  '.join(parts)}", flush=True)
    result = {
        "commit": commit(), "versions": versions(), "device": device(), "config": {"items": args.items},
        "seconds": round(time.perf_counter() - begin, 1), "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
