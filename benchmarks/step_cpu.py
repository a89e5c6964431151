"""What each cure of docs/LOG.md's leaks is worth: seconds of a training step of a recipe with it, and without.

    python benchmarks/step_cpu.py --out step_cpu.json            (about 20 minutes on two cores)
    python benchmarks/step_cpu.py --quick --out step_cpu.json    (about 8)

Each measurement is a process of its own that trains a stage of the recipe as `puna pretrain` does (its own data, the
one loop, the thread that prepares batches) and takes the median step after a third of them. The peer is the same
commit with one cure left out. The two are run in turn, three times; a row's ratio is the median of the pairs' ratios
(peer / ours: above 1, the cure pays).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CURES = ("heap", "rounding", "join", "cross_entropy", "attention")
WORTH = 1.0  # a cure that does not pay is to be taken out again


def leave_out(cure: str) -> None:
    """Undoes one cure in this process."""
    import torch
    import torch.nn.functional as F

    from puna.data import batches
    from puna.model import attend, ops
    from puna.train import memory, terms

    if cure == "heap":
        memory.grow_heap = lambda size: False
    elif cure == "rounding":
        ops.FEW = 1 << 62
    elif cure == "join":
        import puna.processor

        puna.processor.join = batches.join = torch.cat
    elif cure == "cross_entropy":
        terms.cross_entropy = lambda logits_nV, targets_n: F.cross_entropy(logits_nV, targets_n, reduction="sum")
    elif cure == "attention":
        attend.BLOCKS_UP_TO = 0
    elif cure != "none":
        raise SystemExit(f"unknown cure {cure!r}; choose from {', '.join(CURES)}")


def measure(recipe: str, stage: str, steps: int, cache: Path, without: str) -> None:
    """Trains, and prints the median step's seconds."""
    leave_out(without)
    from puna import recipes
    from puna.data import Batches, build
    from puna.model import Llama4
    from puna.stages import make_processor
    from puna.stages.common import fit_model
    from puna.train import Job, train

    run = recipes.get(recipe)
    part = getattr(run, stage)
    few = {k: v | {"items": min(v["items"], 3000)} if "items" in v else v for k, v in part.data.options.items()}
    data = dataclasses.replace(part.data, options=few)
    processor = make_processor(run.tokenizer, run.model.vision, cache / "tokenizer", run.seed)
    config = fit_model(run.model, processor)
    sources = build(data, processor, config.chunk, cache / "data")
    mixture = data.mixture({name: len(rows) for name, rows in sources.items()}, steps, part.train.rows)
    batches = Batches(sources, mixture, processor, part.train.rows, steps=steps, seed=data.seed)
    settings = dataclasses.replace(part.train, steps=steps, checkpoint_every=10 * steps)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(stage, Path(folder), Llama4(config), processor, batches, settings, {"model": config.to_dict()},
                  quiet=True)  # fmt: skip
        train(job)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        seconds = [line["seconds"] for line in lines if "seconds" in line][steps // 3 :]
    print(json.dumps(statistics.median(seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--quick", action="store_true", help="pre-training only, fewer steps")
    parser.add_argument("--recipe", default="nano_scout")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of each row")
    parser.add_argument("--measure", nargs=4, metavar=("STAGE", "STEPS", "CACHE", "WITHOUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        stage, steps, cache, without = args.measure
        measure(args.recipe, stage, int(steps), Path(cache), without)
        return
    from puna.eval.record import commit, device, plain, versions

    stages, steps = (("pretrain",), 36) if args.quick else (("pretrain", "sft"), 60)
    begin, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as cache:

        def once(stage: str, without: str, steps: int = steps) -> float:
            command = [sys.executable, __file__, "--out", os.devnull, "--recipe", args.recipe,
                       "--measure", stage, str(steps), cache, without]  # fmt: skip
            return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

        for stage in stages:
            once(stage, "none", 3)  # packs the data, warms the files up
            for cure in CURES:
                pairs = [(once(stage, "none"), once(stage, cure)) for _ in range(args.rounds)]
                ours, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratios = [b / a for a, b in pairs]
                ratio = statistics.median(ratios)
                rows.append({
                    "name": f"{stage}/{cure}", "value": ratio, "unit": "seconds without / with", "n": len(pairs),
                    "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None,
                    "chance": None, "goal": WORTH, "met": ratio >= WORTH, "ours": ours, "peer": peer, "ratio": ratio,
                })  # fmt: skip
                print(f"{stage}/{cure:14} with {ours:.3f} s, without {peer:.3f} s, ratio {ratio:.2f} "
                      f"({', '.join(f'{r:.2f}' for r in ratios)})", flush=True)  # fmt: skip
    result = {
        "commit": commit(), "versions": versions(), "device": device(),
        "config": {"recipe": args.recipe, "stages": stages, "steps": steps, "rounds": args.rounds},
        "seconds": round(time.perf_counter() - begin, 1), "results": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
