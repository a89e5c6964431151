"""Answering on the CPU: our engine against vLLM's CPU build, on our export of the same model.

    PUNA_VLLM_PYTHON=venv-vllm/bin/python python benchmarks/engine_vllm.py --threads 1 --out engine_vllm.json

The design's text model of 59M parameters (benchmarks/train_cpu.py) with random weights, written by
`puna.convert.export_hf`; vLLM (installed as docs/serving.md says, in an environment of its own) reads the folder and
nothing else. 1, 8 and 32 prompts of 64 random ids at once, 128 tokens each, greedy, float32; the time of all tokens
but the first counts, and how many answers are the same, token for token, is told. vLLM runs as it comes (it compiles)
and with enforce_eager, whichever is faster. The two in turn, each in a process of its own; the ratio is vLLM's seconds
over ours, the median of the rounds. Goal: at least 1.
vLLM may take more threads than --threads says: look at the ratio of CPU seconds too, and take --threads 2 on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STREAMS, PROMPT, NEW = (1, 8, 32), 64, 128
SETTINGS = {  # one process, nothing fetched, nothing reported
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip
STUB = """\
import torch

library = torch.library.Library("torchvision", "DEF")  # beside torch's CPU build torchvision lacks its own operators
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def timed(answer, prompts: list[list[int]]) -> dict:
    """Seconds and CPU seconds of all tokens but the first, and the tokens."""
    answer(prompts[:2], 4)  # warm
    spans = []
    for count in (1, NEW):
        begin = time.perf_counter(), time.process_time()
        tokens = answer(prompts, count)
        spans.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return {"seconds": spans[1][0] - spans[0][0], "cpu": spans[1][1] - spans[0][1], "tokens": tokens}


def theirs(folder: str, threads: int, eager: bool, prompts: dict[str, list[list[int]]]) -> dict:
    """In vLLM's environment: puna is not there."""
    os.environ.update(SETTINGS | {"OMP_NUM_THREADS": str(threads)})
    import vllm

    engine = vllm.LLM(model=folder, dtype="float32", enforce_eager=eager, block_size=32, max_num_seqs=max(STREAMS),
                      max_model_len=256, skip_tokenizer_init=True, seed=0)  # fmt: skip

    def answer(some, count):
        greedy = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        done = engine.generate([{"prompt_token_ids": each} for each in some], greedy, use_tqdm=False)
        return [list(each.outputs[0].token_ids) for each in done]

    return {"version": vllm.__version__} | {n: timed(answer, some) for n, some in prompts.items()}


def ours(folder: str, threads: int, prompts: dict[str, list[list[int]]]) -> dict:
    import torch

    import puna

    torch.set_num_threads(threads)
    engine = puna.Engine(puna.load(folder, dtype=torch.float32)[0], prefix_cache_bytes=0)

    def answer(some, count):
        return [done.tokens for done in engine.generate(some, max_tokens=count)]

    return {n: timed(answer, some) for n, some in prompts.items()}


def export(folder: Path) -> None:
    import torch
    from engine_cpu import models

    from puna.convert import export_hf

    export_hf(models(torch.float32, peer=False)[0], None, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder = args.measure
        prompts = json.loads((Path(folder).parent / "prompts.json").read_text())
        each = (ours(folder, args.threads, prompts) if what == "ours"
                else theirs(folder, args.threads, what == "eager", prompts))  # fmt: skip
        print(json.dumps(each))
        return
    import random

    from puna.eval.record import commit, device, plain, versions
    from puna.processor.files import write_atomic

    python = os.environ.get("PUNA_VLLM_PYTHON")
    if not python:
        raise SystemExit("PUNA_VLLM_PYTHON names no Python with vLLM: docs/serving.md says how to install one")
    begin, rand = time.perf_counter(), random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        export(work / "model")
        prompts = {n: [[rand.randrange(5, 8192) for _ in range(PROMPT)] for _ in range(n)] for n in STREAMS}
        (work / "prompts.json").write_text(json.dumps(prompts))
        (work / "site").mkdir()
        (work / "site" / "sitecustomize.py").write_text(STUB)

        def once(what: str) -> dict:
            command = [sys.executable if what == "ours" else python, __file__, "--out", os.devnull, "--threads",
                       str(args.threads), "--measure", what, str(work / "model")]  # fmt: skip
            env = dict(os.environ) if what == "ours" else os.environ | {"PYTHONPATH": str(work / "site")}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            return json.loads(done.stdout.splitlines()[-1])

        rounds = [(once("ours"), {how: once(how) for how in ("compiled", "eager")}) for _ in range(args.rounds)]
    rows = []
    for n in map(str, STREAMS):
        best = [(mine[n], min((each[n] for each in peer.values()), key=lambda found: found["seconds"]))
                for mine, peer in rounds]  # fmt: skip
        ratios = [peer["seconds"] / mine["seconds"] for mine, peer in best]
        same = [a == b for mine, peer in best for a, b in zip(mine["tokens"], peer["tokens"], strict=True)]
        made, median = int(n) * (NEW - 1), statistics.median(ratios)
        rows.append({
            "name": f"streams/{n}", "value": median, "unit": "vLLM's seconds / ours", "n": len(ratios),
            "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None, "chance": None,
            "goal": 1.0, "met": median >= 1.0, "same_answers": sum(same) / len(same),
            "ours_tokens_per_second": [made / mine["seconds"] for mine, _ in best],
            "vllm_compiled_tokens_per_second": [made / peer["compiled"][n]["seconds"] for _, peer in rounds],
            "vllm_eager_tokens_per_second": [made / peer["eager"][n]["seconds"] for _, peer in rounds],
            "cpu_ratio": statistics.median(peer["cpu"] / mine["cpu"] for mine, peer in best),
        })  # fmt: skip
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    write_atomic(args.out, json.dumps(plain({
        "commit": commit(), "versions": versions() | {"vllm": rounds[0][1]["eager"]["version"]},
        "device": device() | {"threads": args.threads},
        "config": {"dtype": "float32", "prompt": PROMPT, "new": NEW, "rounds": args.rounds},
        "seconds": round(time.perf_counter() - begin, 1), "results": rows,
    }), indent=1) + "\n")  # fmt: skip
    print(f"{sum(r['met'] for r in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
