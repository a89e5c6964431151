"""Answering on the CPU: our engine against transformers' `generate`, and against what reading the weights takes.

    python benchmarks/engine_cpu.py --out engine_cpu.json
    python benchmarks/engine_cpu.py --quick --out engine_cpu.json    (one pair of each, the type ours: 2 minutes)

The design's text model of 59M parameters (benchmarks/train_cpu.py), random weights, equal on both sides: the two must
give the same greedy tokens in float32 before anything is timed. Prompts are random ids, answers have a fixed length.

    decode      one prompt of 64 tokens, 128 tokens answered; the prompt's time is taken off
    streams     32 prompts of 64 tokens at once, 64 tokens each; the peer's own batched generate
    first       time to the first token after a prompt of 4,096

Each measurement is a process of its own, the two in turn; a ratio is the median of the pairs'. Both run in the type
that each is faster with (bfloat16 where the machine multiplies it natively; the peer's is tried). CPU seconds are
beside. On a machine that others use take --threads 1: threads that wait for each other tell nothing then.

**The bound.** A step of many streams reads every weight once, however many tokens it makes: bytes of the weights (all
experts; of the embedding only the rows looked up) over the rate at which memory is read here, measured as the sum of a
large tensor. The share of it is the bound's time over the step's.

**Dollars.** $ per M tokens = dollars per hour / (3600 x tokens per second) x 10^6, for the two cores this ran on; the
price is yours to set (--dollars-per-hour).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from train_cpu import clocks, make_peer, peak, peer_config, row

from puna.convert.huggingface import pieces
from puna.engine import Engine
from puna.eval.record import commit, device, plain, versions
from puna.model import Llama4
from puna.processor.files import write_atomic
from puna.train.loop import compute_dtype

PARTS = {  # name: prompts, tokens of each, tokens answered, goal (peer's seconds over ours)
    "decode": (1, 64, 128, 5.0),
    "streams": (32, 64, 64, 4.0),
    "first": (1, 4096, 1, 2.0),
}
BOUND_GOAL = 0.5
EXPERTS = 16


def prompts(rows: int, length: int) -> list[list[int]]:
    return torch.randint(5, 8192, (rows, length), generator=torch.Generator().manual_seed(rows)).tolist()


def models(dtype: torch.dtype, ours: bool = True, peer: bool = True):
    """The same function twice: (ours, transformers' or None)."""
    config = peer_config(EXPERTS)
    model = Llama4(config).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.output.weight, std=0.05, generator=torch.Generator().manual_seed(1))
        other = make_peer(config, "sdpa").eval() if peer else None
        if peer:
            state = other.state_dict()
            for name, parts in pieces(config, False).items():
                for part in parts:
                    state[part.key[1]].copy_(model.get_parameter(name)[part.block].reshape(part.shape))
            other.to(dtype)
    return model.to(dtype) if ours else None, other


def answer_ours(engine: Engine, rows: int, length: int, new: int) -> list[list[int]]:
    return [done.tokens for done in engine.generate(prompts(rows, length), max_tokens=new)]


def answer_peer(model, rows: int, length: int, new: int) -> list[list[int]]:
    tokens = torch.tensor(prompts(rows, length))
    with torch.inference_mode():
        done = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new,
                              do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)  # fmt: skip
    return done[:, length:].tolist()


def timed(answer, rows: int, length: int, new: int) -> dict:
    """Seconds and CPU seconds: of a whole answer, and of all its tokens but the first."""
    answer(rows, min(length, 64), 2)  # warm
    spans = []
    for tokens in (1, new) if new > 1 else (1,):
        begin = clocks()
        answer(rows, length, tokens)
        spans.append([b - a for a, b in zip(begin, clocks(), strict=True)])
    (seconds, cpu), first = spans[-1], spans[0]
    if new > 1:
        seconds, cpu = seconds - first[0], cpu - first[1]
    return {"seconds": seconds, "cpu": cpu, "tokens": rows * max(1, new - 1), "peak": peak()}


def measure(what: str, threads: str, *words: str) -> dict:
    torch.set_num_threads(int(threads))
    if what == "agreement":
        ours, peer = models(torch.float32)
        a, b = answer_ours(Engine(ours), 2, 300, 12), answer_peer(peer, 2, 300, 12)  # over a chunk's border
        return {"same": a == b, "ours": a, "peer": b}
    if what == "memory":
        x = torch.ones(2**27)
        x.sum()
        begin = time.perf_counter()
        for _ in range(5):
            x.sum()
        return {"bytes_per_second": 5 * x.nbytes / (time.perf_counter() - begin)}
    part, dtype = words[0], getattr(torch, words[1])
    rows, length, new, _ = PARTS[part]
    if what == "ours":
        engine = Engine(models(dtype, peer=False)[0], prefix_cache_bytes=0)
        return timed(lambda *size: answer_ours(engine, *size), rows, length, new)
    peer = models(dtype, ours=False)[1]
    return timed(lambda *size: answer_peer(peer, *size), rows, length, new)


def step_bytes(dtype: torch.dtype) -> int:
    """Bytes of the weights that a step of many streams reads."""
    model = Llama4(peer_config(EXPERTS))
    return sum(p.numel() for name, p in model.named_parameters() if "tok_embeddings" not in name) * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--quick", action="store_true", help="one pair of each, the peer in the type of ours")
    parser.add_argument("--only", choices=tuple(PARTS), help="one part")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of each ratio")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dollars-per-hour", type=float, default=0.10, help="of this machine (default 0.10)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    begin, rows, tried, rounds = time.perf_counter(), [], {}, 1 if args.quick else args.rounds
    native = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")

    def once(what: str, *words) -> dict:
        command = [sys.executable, __file__, "--out", os.devnull, "--measure", what, str(args.threads)]
        done = subprocess.run([*command, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def add(result: dict) -> None:
        rows.append(result)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
        write_atomic(args.out, json.dumps(plain({
            "commit": commit(), "versions": versions(), "device": device() | {"threads": args.threads},
            "config": {"dtype": native, "experts": EXPERTS, "rounds": rounds, "quick": args.quick, "peer_tried": tried,
                       "parts": PARTS, "dollars_per_hour": args.dollars_per_hour},
            "seconds": round(time.perf_counter() - begin, 1), "results": rows,
        }), indent=1) + "\n")  # fmt: skip

    if not once("agreement")["same"]:
        raise SystemExit("the two do not give the same greedy tokens: nothing was timed")
    print("the same greedy tokens, over a chunk's border", flush=True)
    for part in (name for name in PARTS if args.only in (None, name)):
        other = native
        if not args.quick:
            tries = {each: once("peer", part, each)["cpu"] for each in ("float32", "bfloat16")}
            other, tried[part] = min(tries, key=tries.get), tries
        pairs = [(once("ours", part, native), once("peer", part, other)) for _ in range(rounds)]
        take = lambda key, pairs=pairs: [(ours[key], peer[key]) for ours, peer in pairs]  # noqa: E731
        rates = [ours["tokens"] / ours["seconds"] for ours, _ in pairs]
        add(row(f"{part}/seconds", take("seconds"), "peer / ours, wall clock", PARTS[part][3], dtype=native,
                peer_dtype=other, cpu_ratio=statistics.median(peer / ours for ours, peer in take("cpu")),
                ours_tokens_per_second=rates,
                peer_tokens_per_second=[peer["tokens"] / peer["seconds"] for _, peer in pairs],
                dollars_per_million_tokens=args.dollars_per_hour / 3600 / statistics.median(rates) * 1e6,
                ours_peak=max(ours["peak"] for ours, _ in pairs),
                peer_peak=max(peer["peak"] for _, peer in pairs)))  # fmt: skip
        if part == "streams":
            rate, size = once("memory")["bytes_per_second"], step_bytes(getattr(torch, native))
            step = statistics.median(ours["seconds"] / (PARTS[part][2] - 1) for ours, _ in pairs)
            add({"name": "streams/share of the bound", "value": size / rate / step, "unit": "share", "n": len(pairs),
                 "stderr": None, "chance": None, "goal": BOUND_GOAL, "met": size / rate / step >= BOUND_GOAL,
                 "bytes_a_step": size, "memory_bytes_per_second": rate, "seconds_a_step": step})  # fmt: skip
    print(f"{sum(r['met'] for r in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
