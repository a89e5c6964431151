"""Training a Llama 4 on the CPU: ours against transformers' `Llama4ForCausalLM`, and against the machine's limit.

    python benchmarks/train_cpu.py --out train_cpu.json                    (20 minutes on two quiet cores with AMX)
    python benchmarks/train_cpu.py --quick --out train_cpu.json            (4 there)
    python benchmarks/train_cpu.py --only experts16 --out train_cpu.json   (one part; without AMX all is slower)

**Against the peer** (experts16, experts128): the design's text model of 59M parameters, and the same with 128 experts.
A step is 4,096 tokens, forward, backward, clipping and fused AdamW, on fp32 master weights; bfloat16 products where
the machine has them natively (the peer under autocast), else both in float32. Ours is the training loop's
`train_step`; the peer runs at the micro-batch and attention kernel it is fastest with (tried first; its experts have
one implementation, every expert on every token), with the allocator setting that our loop makes. Before anything is
timed, the two are given the same weights and must agree on loss and gradient norm.

Each measurement is a process of its own, the two in turn, three times or more; a ratio is the median of the pairs'.
Start and warm-up (a step) are not timed. A peer's step that takes minutes is measured as a few of its micro-batches
and the update, and multiplied out ("peer_micro_batches" says how many of how many). Peak memory is the processes'
largest resident set. CPU seconds are given beside: on a machine that others use, they are the better ratio.

**Against the machine** (nano): a compute-bound nano's model FLOPs a second over the same run's best 2048^3 product.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from puna.convert.hf_config import config_to_hf
from puna.convert.huggingface import pieces
from puna.data import Batch
from puna.eval.record import commit, device, plain, versions
from puna.model import Llama4, ModelConfig
from puna.optim.adamw import build_adamw
from puna.plan.flops import flops_per_token
from puna.processor.files import write_atomic
from puna.train import TrainConfig, memory
from puna.train.balance import Bias
from puna.train.loop import compute_dtype
from puna.train.step import train_step
from puna.train.terms import NextToken

ROWS, LENGTH = 8, 512  # of a step against the peer
PARTS = {"experts16": (16, 8.0), "experts128": (128, 40.0)}  # experts, goal
NANO_GOAL, NANO_ROWS, NANO_LENGTH = 0.30, 16, 1024
AGREE = 1e-4  # relative, fp32


def peer_config(experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8192, d_model=256, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=32, expert_width=512,
        dense_width=512, n_experts=experts, chunk=256,
    )  # fmt: skip


NANO = ModelConfig(
    vocab_size=8192, d_model=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64, expert_width=1024,
    dense_width=1024, n_experts=16, chunk=256,
)  # fmt: skip


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids, rare and frequent ones as in text: p ~ 1 / (rank + 10)."""
    share = 1 / (torch.arange(8192) + 10.0)
    return torch.multinomial(share, rows * length, True, generator=torch.Generator().manual_seed(seed)).view(rows, -1)


def batch_of(tokens_BT: torch.Tensor) -> Batch:
    B = len(tokens_BT)
    valid = torch.ones_like(tokens_BT, dtype=torch.bool)
    valid[:, -1] = False
    return Batch(tokens_BT, tokens_BT.roll(-1, 1), valid, torch.zeros_like(tokens_BT), None, (0,) * B, ("",) * B,
                 tuple(range(B)))  # fmt: skip


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Ours:
    """The training loop's step, without its files."""

    def __init__(self, config: ModelConfig, rows: int, length: int):
        memory.keep_freed_memory()
        self.settings = s = TrainConfig(rows=rows)
        self.model = Llama4(config).train()
        self.model.compute_dtype = compute_dtype(s.compute_dtype, torch.device("cpu"))
        self.optimizer = build_adamw(self.model, s.lr, s.weight_decay, (s.beta1, s.beta2), s.eps, s.multipliers)
        self.balancer = Bias(self.model, s.balance)
        self.batches = [batch_of(tokens(rows, length, seed)) for seed in range(3)]

    def step(self, number: int) -> None:
        self.balancer.apply(1.0)
        parts = self.batches[number % 3].split(self.settings.accumulate)
        result = train_step(self.model, self.optimizer, parts, NextToken(), self.settings.clip, self.settings.slice)
        if result.skipped:
            raise SystemExit("a step was not finite")
        self.balancer.adjust(result.counts)


def make_peer(config: ModelConfig, attention: str):
    """transformers' model of the same shape."""
    try:
        import transformers
    except ImportError:
        raise SystemExit("the peer is transformers: pip install 'puna[hf]'") from None
    transformers.logging.set_verbosity_error()
    raw = config_to_hf(config, "float32", {})
    raw.pop("architectures")
    text = transformers.Llama4TextConfig(**raw)
    return transformers.Llama4ForCausalLM._from_config(text, attn_implementation=attention).train()


def peer_loss(model, tokens_BT: torch.Tensor, tokens_in_step: int) -> torch.Tensor:
    """This micro-batch's part of the step's mean loss."""
    native = compute_dtype("auto", torch.device("cpu")) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if native else contextlib.nullcontext():
        logits = model(input_ids=tokens_BT, use_cache=False).logits
    logits = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, tokens_BT[:, 1:].flatten(), reduction="sum") / tokens_in_step


def measure_ours(experts: int, steps: int) -> dict:
    ours = Ours(peer_config(experts), ROWS, LENGTH)
    ours.step(0)
    spans = []
    for number in range(1, steps + 1):
        begin = clocks()
        ours.step(number)
        spans.append([b - a for a, b in zip(begin, clocks(), strict=True)])
    seconds, cpu = (statistics.median(column) for column in zip(*spans, strict=True))
    return {"seconds": seconds, "cpu": cpu, "peak": peak()}


def measure_peer(experts: int, micro: int, attention: str, budget: float) -> dict:
    """Seconds of a step of ROWS rows: as many of its micro-batches as `budget` seconds allow, and the update."""
    memory.keep_freed_memory()
    model = make_peer(peer_config(experts), attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    counted, whole = ROWS * (LENGTH - 1), ROWS // micro

    def forward_backward(seed: int) -> None:
        peer_loss(model, tokens(micro, LENGTH, seed), counted).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    forward_backward(0)
    update()
    begin, done = clocks(), 0
    while done < whole and (done < 1 or time.perf_counter() - begin[0] < budget):
        done += 1
        forward_backward(done)
    between = clocks()
    update()
    end = clocks()
    seconds, cpu = ((b - a) * whole / done + c - b for a, b, c in zip(begin, between, end, strict=True))
    return {"seconds": seconds, "cpu": cpu, "peak": peak(), "micro_batches": f"{done} of {whole}"}


def measure_agreement() -> dict:
    """Relative differences of loss and gradient norm, ours and the peer's, at the same weights in float32."""
    config, tokens_BT = peer_config(16), tokens(1, LENGTH)
    ours, peer = Llama4(config).train(), make_peer(config, "sdpa")
    state = peer.state_dict()
    with torch.no_grad():
        torch.nn.init.normal_(ours.output.weight, std=0.05)  # begins as 0, which would hide the body
        for name, parts in pieces(config, False).items():
            for part in parts:
                state[part.key[1]].copy_(ours.get_parameter(name)[part.block].reshape(part.shape))
    found = []
    for model in (ours, peer):
        logits = ours(tokens_BT) if model is ours else peer(input_ids=tokens_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        found.append((loss.item(), norm.item()))
    (a, b), (c, d) = found
    return {"loss": abs(a / c - 1), "gradient": abs(b / d - 1)}


def measure_nano(rows: int, rounds: int) -> dict:
    """Model FLOPs a second of whole steps, and the best 2048^3 product's, taken in turn."""
    ours = Ours(NANO, rows, NANO_LENGTH)
    dtype, flops = ours.model.dtype, flops_per_token(NANO, NANO_LENGTH) * rows * NANO_LENGTH
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    ours.step(0)

    def rates(work, operations: float) -> list[float]:
        """Operations a second of the clock on the wall, and of the processors'."""
        begin = clocks()
        work()
        return [operations / (end - start) for start, end in zip(begin, clocks(), strict=True)]

    steps, products = [], []
    for number in range(1, rounds + 1):
        products += [rates(lambda: torch.mm(a, b), 2 * 2048**3) for _ in range(10)]
        steps.append(rates(lambda number=number: ours.step(number), flops))
    best = [max(column) for column in zip(*products, strict=True)]
    return {"rates": [step[0] for step in steps], "product": best[0], "cpu": [step[1] / best[1] for step in steps],
            "dtype": str(dtype).removeprefix("torch."), "peak": peak()}  # fmt: skip


def measure(what: str, *words: str) -> dict:
    threads, *words = words
    torch.set_num_threads(int(threads))
    if what == "ours":
        return measure_ours(int(words[0]), int(words[1]))
    if what == "peer":
        return measure_peer(int(words[0]), int(words[1]), words[2], float(words[3]))
    return measure_agreement() if what == "agreement" else measure_nano(int(words[0]), int(words[1]))


def available() -> int:
    """Bytes of memory that can still be had (Linux); elsewhere a great many."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def peer_bytes(experts: int, micro: int) -> int:
    """About what the peer needs in float32: weights, gradients, two moments, and for every token *every* expert's
    input, two halves, their activation, product and output, and as much again of one layer in the backward."""
    config = peer_config(experts)
    parameters = 8 * experts * 3 * config.d_model * config.expert_width
    row = 2 * config.d_model + 4 * config.expert_width
    return 16 * parameters + 4 * experts * micro * LENGTH * row * (config.n_layers + 2)


def row(name: str, pairs: list[tuple[float, float]], unit: str, goal: float, **more) -> dict:
    """One result: `pairs` of (ours, peer), of which more is worse, so that the ratio is peer / ours."""
    ratios = [peer / ours for ours, peer in pairs]
    ratio = statistics.median(ratios)
    ours, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "name": name, "value": ratio, "unit": unit, "n": len(pairs),
        "stderr": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None, "chance": None,
        "goal": goal, "met": ratio >= goal, "ours": ours, "peer": peer, "ratio": ratio, **more,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--quick", action="store_true", help="the peer as found fastest before, fewer steps and rows")
    parser.add_argument("--only", choices=(*PARTS, "nano"), help="one part")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of each ratio")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    begin, rows, tried = time.perf_counter(), [], {}
    tokens_in_step, budget = ROWS * LENGTH, 20.0 if args.quick else 60.0

    def once(what: str, *words) -> dict:
        command = [sys.executable, __file__, "--out", os.devnull, "--measure", what, str(args.threads)]
        done = subprocess.run([*command, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    def add(result: dict) -> None:
        rows.append(result)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
        write_atomic(args.out, json.dumps(plain({
            "commit": commit(), "versions": versions(), "device": device() | {"threads": args.threads},
            "config": {"compute_dtype": dtype, "rows": ROWS, "length": LENGTH, "rounds": args.rounds,
                       "quick": args.quick, "peer_tried": tried},
            "seconds": round(time.perf_counter() - begin, 1), "results": rows,
        }), indent=1) + "\n")  # fmt: skip

    dtype = str(compute_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    chosen = [part for part in PARTS if args.only in (None, part)]
    if chosen:
        apart = once("agreement")
        print(f"same weights, same function: loss and gradient norm differ by {apart}", flush=True)
        if max(apart.values()) > AGREE:
            raise SystemExit("the two models are not the same function: nothing was timed")
    for part in chosen:
        experts, goal = PARTS[part]
        fits = [micro for micro in (1, 2, 4, 8) if peer_bytes(experts, micro) < 0.9 * available()]
        if not fits:
            raise SystemExit(f"the peer needs {peer_bytes(experts, 1) / 1e9:.0f} GB with {experts} experts; free some")
        micro, attention = (2 if 2 in fits else 1) if experts <= 16 else 1, "sdpa"
        if not args.quick:
            tries = {(each, "sdpa"): once("peer", experts, each, "sdpa", budget / 4)["cpu"] for each in fits[:3]}
            micro = min(tries, key=tries.get)[0]
            tries[micro, "eager"] = once("peer", experts, micro, "eager", budget / 4)["cpu"]
            micro, attention = min(tries, key=tries.get)
            tried[part] = {f"micro-batch {m}, {a}: CPU seconds a step": v for (m, a), v in tries.items()}
        pairs = []
        for _ in range(args.rounds):
            ours = once("ours", experts, 2 if args.quick else 4)
            pairs.append((ours, once("peer", experts, micro, attention, budget)))
            print(f"{part}: a step in seconds and CPU seconds, ours, peer: "
                  f"{[(round(a['seconds'], 2), round(a['cpu'], 2)) for a in pairs[-1]]}", flush=True)  # fmt: skip
        take = lambda key, pairs=pairs: [(ours[key], peer[key]) for ours, peer in pairs]  # noqa: E731
        about = {"peer_micro_batch": micro, "peer_attention": attention, "compute_dtype": dtype}
        add(row(f"{part}/tokens per second", take("seconds"), "ratio of speeds, wall clock", goal, **about,
                peer_micro_batches=pairs[-1][1]["micro_batches"],
                ours_tokens_per_second=[tokens_in_step / ours["seconds"] for ours, _ in pairs],
                peer_tokens_per_second=[tokens_in_step / peer["seconds"] for _, peer in pairs],
                cpu_ratio=statistics.median(peer / ours for ours, peer in take("cpu")),
                ours_cpu_seconds=[ours for ours, _ in take("cpu")],
                peer_cpu_seconds=[peer for _, peer in take("cpu")]))  # fmt: skip
        add(row(f"{part}/peak memory", take("peak"), "peer / ours, bytes", 1.0, **about))
    if args.only in (None, "nano"):
        some = NANO_ROWS // 4 if args.quick else NANO_ROWS
        found = once("nano", some, args.rounds)
        shares = [rate / found["product"] for rate in found["rates"]]
        share = statistics.median(shares)
        add({"name": f"nano/share of the 2048^3 product in {found['dtype']}", "value": share, "unit": "share",
             "n": len(shares), "stderr": statistics.stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else None,
             "chance": None, "goal": NANO_GOAL, "met": share >= NANO_GOAL, "ours": statistics.median(found["rates"]),
             "peer": found["product"], "ratio": share, "cpu_ratio": statistics.median(found["cpu"]),
             "tokens_in_step": some * NANO_LENGTH, "peak_bytes": found["peak"]})  # fmt: skip
    print(f"{sum(each['met'] for each in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
