"""What an optimizer or a way of balancing is worth: short pre-trainings that differ in it alone, on the same tokens.

    python benchmarks/choices.py --out choices.json             (about two hours on two cores)
    python benchmarks/choices.py --quick --out choices.json     (about 20 minutes: half the width, fewer steps)

A model of nano_scout's shape is trained by the one loop on the recipe's own data, with midtrain's learning rate, one
thread and a process for each choice and seed, in turn. A row is a choice against the baseline (adamw and bias) with the
same seed: bits per byte of held-out English and German less the baseline's (negative is better; routed by argmax, as
everything outside training is), or the processor's seconds of a step over the baseline's. What else the runs ended with
is beside the rows: loss, load and dead experts over the last tenth of the steps, and for expert choice the bits with
thresholds on the gates.
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

BASELINE = "adamw+bias"
CHOICES = (BASELINE, "muon+bias", "adamw+auxiliary", "adamw+expert_choice")


def measure(choice: str, steps: int, seed: int, quick: bool, cache: Path) -> dict[str, float]:
    """Trains once, and says what the run ended with."""
    from safetensors.torch import load_file

    from puna import nursery, recipes
    from puna.data import Batches, build
    from puna.eval import bpb_evaluation
    from puna.model import Llama4
    from puna.recipes.nano import GROW
    from puna.stages import make_processor
    from puna.stages.common import fit_model
    from puna.train import Job, TrainConfig, checkpoint, metrics, train
    from puna.train.balance import thresholds

    run = recipes.get("nano_scout")
    if quick:
        shape = dict(d_model=128, n_heads=4, head_dim=32, expert_width=128, dense_width=256)
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, **shape))
    data = run.pretrain.data
    few = {k: v | {"items": min(v["items"], 12000)} if "items" in v else v for k, v in data.options.items()}
    data = dataclasses.replace(data, options=few, seq_len=256, seed=seed)
    processor = make_processor(run.tokenizer, run.model.vision, cache / "tokenizer", run.seed)
    config = fit_model(run.model, processor)
    sources = build(data, processor, config.chunk, cache / "data")
    optimizer, balancing = choice.split("+")
    settings = TrainConfig(steps=steps, rows=4, warmup=20, optimizer=optimizer, balancing=balancing, threads=1,
                           heap_mb=512, checkpoint_every=10 * steps, **GROW)  # fmt: skip
    mixture = data.mixture({name: len(rows) for name, rows in sources.items()}, steps, settings.rows)
    batches = Batches(sources, mixture, processor, settings.rows, steps=steps, seed=seed)
    bits = bpb_evaluation(processor, {lang: nursery.texts(lang, "val")[:1] for lang in ("en", "de")}, window=256)
    with tempfile.TemporaryDirectory() as folder:
        job = Job("pretrain", Path(folder), Llama4(config, seed=seed), processor, batches, settings,
                  {"model": config.to_dict()}, quiet=True)  # fmt: skip
        begin = time.process_time()
        model = train(job)
        found = {"seconds": (time.process_time() - begin) / steps}
        lines = [line for line in metrics.read(Path(folder) / "metrics.jsonl") if "loss" in line]
        tail = lines[-steps // 10 :]
        for name in ("loss", "router/max_load", "router/entropy", "router/dead", "router/flip_share"):
            found[name] = statistics.fmean(line[name] for line in tail)
        found |= bits(model)
        if balancing == "expert_choice":
            state = load_file(checkpoint.steps(Path(folder))[0] / "optimizer.safetensors")
            gates = [state[f"gates/{i}"] for i in range(sum(name.startswith("gates/") for name in state))]
            with thresholds(model, gates):
                found |= {f"{name} by thresholds": value for name, value in bits(model).items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--quick", action="store_true", help="half the width, fewer steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of each run (default 300, quick 150)")
    parser.add_argument("--measure", nargs=4, metavar=("CHOICE", "STEPS", "SEED", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        choice, steps, seed, cache = args.measure
        print(json.dumps(measure(choice, int(steps), int(seed), args.quick, Path(cache))))
        return
    from puna.eval.record import commit, device, plain, versions

    steps, begin = args.steps or (150 if args.quick else 300), time.perf_counter()
    found: dict[str, list[dict]] = {choice: [] for choice in CHOICES}
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(args.seeds):
            for choice in CHOICES:
                command = [sys.executable, __file__, "--out", os.devnull, *(["--quick"] * args.quick),
                           "--measure", choice, str(steps), str(seed), cache]  # fmt: skip
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[choice].append(json.loads(out.splitlines()[-1]))
                print(choice, seed, found[choice][-1], flush=True)
    rows = []
    for choice in CHOICES[1:]:
        for name, unit in (("bpb/en", "bits per byte less"), ("bpb/de", "bits per byte less"), ("seconds", "ratio")):
            pairs = [(run[name], base[name]) for run, base in zip(found[choice], found[BASELINE], strict=True)]
            each = [a / b if name == "seconds" else a - b for a, b in pairs]
            ours, peer = (statistics.fmean(column) for column in zip(*pairs, strict=True))
            rows.append({
                "name": f"{choice}/{name}", "value": statistics.fmean(each), "unit": unit, "n": len(each),
                "stderr": statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
                "chance": None, "goal": None, "met": None, "ours": ours, "peer": peer, "ratio": ours / peer,
            })  # fmt: skip
            print(f"{rows[-1]['name']:32} {rows[-1]['value']:+.4f} ({', '.join(f'{x:+.4f}' for x in each)})")
    result = {
        "commit": commit(), "versions": versions(), "device": device(),
        "config": {"baseline": BASELINE, "steps": steps, "quick": args.quick, "seeds": args.seeds}, "runs": found,
        "seconds": round(time.perf_counter() - begin, 1), "results": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
