"""What one GPU makes of puna: right numbers, bfloat16 and FP8 training, large layers, memory, decoding.

    python benchmarks/gpu.py --out gpu.json                      all parts
    python benchmarks/gpu.py --only train_fp8 --out gpu.json     one of them (at most 8 minutes)
    python benchmarks/gpu.py --device cpu --quick --out x.json   the same code at tiny sizes, without a GPU

It needs a checkout with torch (2.11 or later), numpy and safetensors, nothing else, since GPU machines may be bare and
brief. FILE is rewritten after every row; the same command again does the rows that are missing, so a machine that goes
away loses one row. A part that runs out of time says so and leaves its other rows for the next call.

    correctness   the fast model against testing/reference.py in float32; FP8 products against the CPU's, bit for bit;
                  greedy decoding against whole forward passes
    train_bf16    a preset trained on the nursery's texts, two bytes a token, with the router's own routing; MFU
    train_fp8     the same with each FP8 recipe: speed against bfloat16 in turns in one run, and the loss after it all
    layers        one Behemoth-shaped layer with two of its experts (an eighth of them), forward and backward
    memory        the peak of a training step against `puna plan`'s arithmetic
    decode        tokens a second of 1, 8 and 32 answers against the bound of the memory's bandwidth

    MFU = tokens/s * (6 N + 12 sum over layers of H d k) / peak
    N: active parameters without the input embedding; k: a query's keys on average; peak: the card's dense bfloat16
    rate, also for FP8
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import lzma
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy
import safetensors
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # nothing is installed on a bare machine

import puna
from puna.engine import Engine
from puna.model import Llama4, ModelConfig, preset
from puna.model.init import std_of
from puna.optim import build_adamw
from puna.optim.adamw import set_lr
from puna.plan.flops import flops_per_token
from puna.plan.layout import ONE
from puna.plan.memory import PRECISIONS, Schedule, training_memory
from puna.precision import fp8_training
from puna.testing.reference import reference_logits
from puna.train.balance import Bias
from puna.train.step import train_step
from puna.train.terms import NextToken

SLICE = 4096  # positions of the loss at once
PART_SECONDS = 450.0  # then no new row is begun
CURVE_SECONDS = 300.0  # of a curve's longest, bfloat16's
CARDS = {  # part of a card's name: dense bfloat16 TFLOP/s, memory TB/s (NVIDIA's data sheets); the first that fits
    "GB200": (2500, 8.0), "B200": (2250, 8.0), "H200": (989, 4.8), "H100 NVL": (835, 3.9), "H100 PCIe": (756, 2.0),
    "H100": (989, 3.35), "A100": (312, 2.0), "L40S": (362, 0.86), "4090": (165, 1.0),
}  # fmt: skip
TINY = ModelConfig(
    vocab_size=512, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, expert_width=64, dense_width=96,
    n_experts=4, chunk=64, floor_scale=64, max_context=4096,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is."""

    config: ModelConfig
    rows: int  # of a step
    seq_len: int
    steps: int  # of a loss curve
    window: int  # steps of one measurement of speed
    layer: ModelConfig
    layer_tokens: int
    answers: tuple[int, ...]
    prompt: int
    new: int


def scale_of(name: str, device: str, quick: bool) -> Scale:
    """For a preset on a GPU, and a tiny model in a preset's place on a CPU."""
    one = dict(n_layers=1, n_experts=2, nope_layers=(), moe_layers=None, vocab_size=256, vision=None)
    behemoth = dataclasses.replace(preset("behemoth"), **one)
    if device == "cpu":
        maverick = {"moe_step": 2, "qk_norm": False, "n_experts": 8} if "maverick" in name else {}
        tiny = dataclasses.replace(TINY, moe_layers=None, **maverick)
        layer = dataclasses.replace(TINY, d_model=128, expert_width=192, **one)
        return Scale(tiny, 2, 128, 6 if quick else 30, 1, layer, 128, (1, 2), 16, 8)
    text = dataclasses.replace(preset(name), vision=None, vocab_size=65536)
    return Scale(text, 8, 4096, 60 if quick else 500, 10, behemoth, 16384, (1, 8, 32), 1024, 64 if quick else 256)


class Result:
    """The rows so far, in a file that is whole at any moment."""

    def __init__(self, path: Path, config: dict, device: dict):
        self.path, self.begin, self.spent = path, time.perf_counter(), 0.0
        self.values = {"commit": commit(), "versions": versions(), "device": device, "config": config, "seconds": 0.0,
                       "results": []}  # fmt: skip
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            for key in ("commit", "versions", "device", "config"):
                if old.get(key) != self.values[key]:
                    raise SystemExit(f"{path} holds results of another {key} ({old.get(key)}, now {self.values[key]}): "
                                     "give another --out")  # fmt: skip
            self.values["results"], self.spent = old["results"], old["seconds"]

    def find(self, name: str) -> dict | None:
        return next((row for row in self.values["results"] if row["name"] == name), None)

    def add(self, name: str, value: float, unit: str, n: int = 1, stderr: float | None = None,
            goal: float | None = None, met: bool | None = None, **more) -> None:  # fmt: skip
        row = {"name": name, "value": value, "unit": unit, "n": n, "stderr": stderr, "chance": None, "goal": goal,
               "met": met} | more  # fmt: skip
        self.values["results"].append(json.loads(json.dumps(row), parse_constant=lambda _: None))  # NaN is null in JSON
        self.values["seconds"] = round(self.spent + time.perf_counter() - self.begin, 1)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)
        verdict = "" if met is None else f"   goal {goal:g}: {'met' if met else 'MISSED'}"
        print(f"{name:36} {value:12.5g} {unit}{verdict}", flush=True)


def commit() -> str:
    """The checkout's commit, "-dirty" if it was changed; "unknown" for a copy without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(command, cwd=here, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    return found | {module.__name__: module.__version__ for module in (puna, torch, numpy, safetensors)}


class Machine:
    """The device with its rates: from the table, or measured where the table does not know it."""

    def __init__(self, kind: str):
        self.device = torch.device(kind)
        self.cuda = kind == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else platform.processor() or platform.machine()
        known = next((rates for part, rates in CARDS.items() if part in self.name), None) if self.cuda else None
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.source = "table" if known else "measured"
        self.peak, self.bandwidth = (known[0] * 1e12, known[1] * 1e12) if known else self._measure()

    def describe(self) -> dict:
        found = {"name": self.name, "rates": self.source, "threads": torch.get_num_threads()}
        if self.source == "table":
            found |= {"peak_tflops": self.peak / 1e12, "bandwidth_tb_s": self.bandwidth / 1e12}
        if self.cuda:
            found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        return found

    def seconds(self, function: Callable[[], object]) -> float:
        """Wall-clock of one call, the device's work included."""
        self.wait()
        begin = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def goal(self, goal: float, met: bool) -> dict:
        """Goals are a GPU's: on a CPU they are not judged."""
        return {"goal": goal, "met": met if self.cuda else None}

    def reset(self) -> None:
        """Forgets what earlier parts left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _measure(self) -> tuple[float, float]:
        n = 8192 if self.cuda else 512
        a = torch.randn(n, n, device=self.device, dtype=self.dtype)
        self.seconds(lambda: a @ a)
        flops = 2 * n**3 / min(self.seconds(lambda: a @ a) for _ in range(5))
        return flops, 2 * a.nbytes / min(self.seconds(a.clone) for _ in range(5))


# ---- what is trained on


@cache
def text_tokens() -> Tensor:
    """The nursery's texts, two bytes a token: real words at ids below 65,536, without a tokenizer. int64 [N]."""
    folder = Path(puna.__file__).parent / "nursery" / "data" / "text"
    raw = b"".join(lzma.decompress(path.read_bytes()) for path in sorted(folder.rglob("*.xz")))
    if len(raw) < 1 << 20:
        raise SystemExit(f"there are no texts in {folder}: run this from a whole checkout of puna")
    return torch.frombuffer(bytearray(raw[: len(raw) // 2 * 2]), dtype=torch.uint16).long()


def batches(scale: Scale, machine: Machine, step: int, rows: int, tokens_N: Tensor) -> Iterator[SimpleNamespace]:
    """A step's micro-batches of `rows` rows: places drawn by the step alone, one document a row."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, len(tokens_N) - scale.seq_len - 1, (scale.rows, 1), generator=generator)
    all_BT = tokens_N[start + torch.arange(scale.seq_len + 1)]
    for part in all_BT.split(rows):
        part = part.to(machine.device, non_blocking=True)
        x_BT, y_BT = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        whole = torch.ones_like(x_BT, dtype=torch.bool)
        yield SimpleNamespace(tokens_BT=x_BT, targets_BT=y_BT, valid_BT=whole, doc_ids_BT=torch.zeros_like(x_BT),
                              tiles=None, extra={})  # fmt: skip


def build(config: ModelConfig, machine: Machine, dtype: torch.dtype) -> Llama4:
    """A new model, drawn on the device: the deviations of model/init.py, other numbers."""
    with torch.device("meta"):
        model = Llama4(config).to(dtype)
    fill(model.to_empty(device=machine.device))
    return model


@torch.no_grad()
def fill(model: Llama4) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        std = std_of(name, tuple(parameter.shape), model.config)
        if std is None:
            parameter.fill_(float(name != "output.weight"))  # norms; there are no biases without pictures
        else:
            parameter.normal_(0, std)


class Training:
    """A model with its optimizer, stepping as the training loop does, in the micro-batches that are fastest here."""

    def __init__(self, scale: Scale, machine: Machine, fp8: str = "off", lr: float = 6e-4, warmup: int = 40):
        self.scale, self.machine, self.lr, self.warmup = scale, machine, lr, warmup
        self.tokens_N, self.done, self.rows = text_tokens() % scale.config.vocab_size, 0, scale.rows
        self.model = build(scale.config, machine, torch.float32).train()
        self.model.compute_dtype = machine.dtype
        fp8_training.attach(self.model, fp8)
        self.optimizer = build_adamw(self.model, lr, 0.1, (0.9, 0.95), 1e-8)
        self.balancer = Bias(self.model, 1e-3)
        seconds = {}
        for recompute in (0, 2, 1):  # no block computed twice, every second, all: memory for time, for larger products
            rows = scale.rows
            while rows and (needed := self._try(rows, recompute)) is None:
                rows //= 2
            if rows:
                seconds[rows, recompute] = needed
        if not seconds:
            raise SystemExit(f"not even one row of {scale.seq_len} tokens fits on {machine.name}: use a larger GPU")
        self.rows, self.model.recompute = min(seconds, key=seconds.get)
        self.restart()

    def _try(self, rows: int, recompute: int) -> float | None:
        """Seconds of a step in micro-batches of `rows` rows; None where they don't fit."""
        self.rows, self.model.recompute, needed = rows, recompute, None
        try:
            self.step()
            needed = self.machine.seconds(self.step)
        except torch.OutOfMemoryError:
            pass
        self.optimizer.zero_grad(set_to_none=True)
        self.machine.reset()
        return needed

    def restart(self) -> None:
        """The initial values again: curves begin alike, whatever was tried before."""
        fill(self.model)
        self.optimizer.state.clear()
        self.balancer, self.done = Bias(self.model, 1e-3), 0

    def step(self):
        set_lr(self.optimizer, min(1.0, (self.done + 1) / self.warmup))
        self.balancer.apply(1.0)
        micro = list(batches(self.scale, self.machine, self.done, self.rows, self.tokens_N))
        result = train_step(self.model, self.optimizer, micro, NextToken(), 1.0, SLICE)
        self.balancer.adjust(result.counts, result.seen)
        self.done += 1
        return result

    def speed(self) -> float:
        """Tokens a second over a window of steps."""
        seconds = self.machine.seconds(lambda: [self.step() for _ in range(self.scale.window)])
        return self.scale.window * self.scale.rows * self.scale.seq_len / seconds

    def curve(self, steps: int, seconds: float = math.inf) -> dict:
        """Trains for some steps, fewer where they would take longer than `seconds`; losses in ten means."""
        results, begin = [], time.perf_counter()
        while len(results) < steps and time.perf_counter() - begin < seconds:
            results.append(self.step())
        size = max(1, len(results) // 10)
        means = [statistics.fmean(r.loss for r in results[i : i + size]) for i in range(0, len(results), size)]
        return {"loss": means[-1], "n": len(results), "losses": means, "skipped": sum(r.skipped for r in results),
                "max_load": results[-1].metrics["router/max_load"]} | self.shape()

    def shape(self) -> dict:
        return {"rows": self.rows, "recompute": self.model.recompute}


# ---- the parts: functions that yield (name, what makes the row); a row is made only if the file hasn't it


def correctness(scale: Scale, machine: Machine, result: Result):
    def model_error(config: ModelConfig) -> None:
        model = Llama4(config).eval()
        with torch.no_grad():
            model.output.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        T = 2 * config.chunk + 40
        tokens = torch.randint(0, config.vocab_size, (2, T), generator=torch.Generator().manual_seed(2))
        docs = torch.stack([torch.zeros(T, dtype=torch.int64), (torch.arange(T) >= config.chunk).long()])
        state = {name: p.detach().double() for name, p in model.named_parameters()}
        expected = reference_logits(state, config, tokens, doc_ids_BT=docs)
        with torch.no_grad():
            found = model.to(machine.device)(tokens.to(machine.device), doc_ids_BT=docs.to(machine.device)).cpu()
        error = float((found.double() - expected).norm() / expected.norm())
        result.add(f"correctness/{kind}", error, "relative error of logits, float32", goal=1e-5, met=error <= 1e-5)

    for kind, changes in (("scout", {}), ("maverick", {"moe_step": 2, "moe_layers": None, "qk_norm": False})):
        yield f"correctness/{kind}", lambda c=changes: model_error(dataclasses.replace(TINY, **c))

    def products(recipe: str) -> None:
        """Numbers whose products are exact (tests/unit/test_fp8_training.py), so that order does not matter."""
        generator = torch.Generator().manual_seed(3)
        numbers = lambda *shape: torch.randint(28, 449, shape, generator=generator).bfloat16()  # noqa: E731
        x, w, dy = numbers(128, 64), numbers(4, 64, 96), numbers(128, 96)
        x[:, 0], x[::16], dy[:, 0], dy[::16], w[:, 0], w[:, :, 0] = 448, 448, 448, 448, 448, 448
        counts, different = torch.tensor([48, 0, 17, 63]), 0
        for function in (
            lambda x, w, dy, n: fp8_training.mm(x, w[0].t(), recipe),
            lambda x, w, dy, n: fp8_training.mm(dy, w[1], recipe),
            lambda x, w, dy, n: fp8_training.mm(dy.t(), x.t(), recipe),
            lambda x, w, dy, n: fp8_training.grouped_mm(x, w.transpose(1, 2), n, recipe),
            lambda x, w, dy, n: fp8_training.grouped_outer(x, dy, n, recipe),
        ):  # fmt: skip
            here = function(*(t.to(machine.device) for t in (x, w, dy, counts))).cpu()
            different += int((here != function(x, w, dy, counts)).sum())
        result.add(f"correctness/fp8/{recipe}", different, "numbers unlike the CPU's", goal=0, met=different == 0)

    for recipe in ("rowwise", "tensorwise"):
        yield f"correctness/fp8/{recipe}", lambda r=recipe: products(r)

    def greedy() -> None:
        config, model = TINY, Llama4(TINY).to(machine.device).eval()
        with torch.no_grad():
            model.output.weight.normal_(0, 0.1)
        prompt = torch.randint(0, 512, (config.chunk - 6,), generator=torch.Generator().manual_seed(4)).tolist()
        new = Engine(model).generate([prompt], max_tokens=24, temperature=0.0)[0].tokens
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(new)], device=machine.device))[0]
        top = logits[len(prompt) - 1 : -1].float()
        short = top.max(-1).values - top.gather(1, torch.tensor(new, device=top.device)[:, None])[:, 0]
        wrong = int((short > 1e-4).sum())
        result.add("correctness/decode", wrong, "tokens that are not the argmax", len(new), goal=0, met=wrong == 0)

    yield "correctness/decode", greedy


def train_bf16(scale: Scale, machine: Machine, result: Result):
    def run() -> None:
        training = Training(scale, machine)
        rates = [training.speed() for _ in range(4)][1:]
        rate = statistics.median(rates)
        mfu = rate * flops_per_token(scale.config, scale.seq_len) / machine.peak
        result.add("train_bf16/mfu", mfu, f"of {machine.peak / 1e12:.3g} TFLOP/s", 3,
                   stderr=statistics.stdev(rates) / 3**0.5 / rate * mfu, **machine.goal(0.4, mfu >= 0.4),
                   tokens_per_second=rate, **training.shape())  # fmt: skip

    yield "train_bf16/mfu", run
    yield "train_bf16/loss", lambda: base_curve(scale, machine, result)


def base_curve(scale: Scale, machine: Machine, result: Result) -> None:
    found = Training(scale, machine).curve(scale.steps, CURVE_SECONDS)
    result.add("train_bf16/loss", found.pop("loss"), "nats, mean of the last tenth", **found)


def train_fp8(scale: Scale, machine: Machine, result: Result):
    def speeds() -> None:
        """bfloat16 and the recipes in turns on one model: what is attached is all that differs."""
        training, found = Training(scale, machine), {"off": [], "rowwise": [], "tensorwise": []}
        for turn in range(4):
            for recipe, rates in found.items():
                fp8_training.attach(training.model, recipe)
                rates.append(training.speed())
            if not turn:  # compiling
                found = {recipe: [] for recipe in found}
        for recipe in ("rowwise", "tensorwise"):
            ratios = [a / b for a, b in zip(found[recipe], found["off"], strict=True)]
            ours, peer, ratio = (statistics.median(rates) for rates in (found[recipe], found["off"], ratios))
            result.add(f"train_fp8/speed/{recipe}", ratio, "x bfloat16", 3, stderr=statistics.stdev(ratios) / 3**0.5,
                       **machine.goal(1.2, ratio >= 1.2), ours=ours, peer=peer, ratio=ratio,
                       mfu=ours * flops_per_token(scale.config, scale.seq_len) / machine.peak)  # fmt: skip

    def curve(recipe: str) -> None:
        if result.find("train_bf16/loss") is None:
            base_curve(scale, machine, result)
        machine.reset()
        base = result.find("train_bf16/loss")
        found = Training(scale, machine, recipe).curve(base["n"])
        off = found["loss"] / base["value"] - 1
        result.add(f"train_fp8/loss/{recipe}", off, "of bfloat16's loss", ours=found.pop("loss"), peer=base["value"],
                   ratio=1 + off, **machine.goal(0.005, abs(off) <= 0.005), **found)  # fmt: skip

    yield "train_fp8/speed/tensorwise", speeds
    for recipe in ("rowwise", "tensorwise"):
        yield f"train_fp8/loss/{recipe}", lambda r=recipe: curve(r)


def layers(scale: Scale, machine: Machine, result: Result):
    def run(recipe: str) -> None:
        config, T = scale.layer, scale.layer_tokens
        host = build(config, machine, machine.dtype).train()  # what a cluster's ranks gather is bfloat16
        fp8_training.attach(host, recipe)
        layout = host.layout(torch.zeros(1, T, dtype=torch.int64, device=machine.device))
        x_BTD = torch.randn(1, T, config.d_model, device=machine.device, dtype=machine.dtype, requires_grad=True)

        def both() -> None:
            host.layers[0](x_BTD, layout, None, None).backward(x_BTD.detach())
            host.zero_grad(set_to_none=True)

        both()
        both()
        rates = []
        per_token = flops_per_token(config, T) - 6 * config.vocab_size * config.d_model  # no head
        for _ in range(3):
            rates.append(per_token * T * 3 / machine.seconds(lambda: [both() for _ in range(3)]) / 1e12)
        rate = statistics.median(rates)
        result.add(f"layers/behemoth/{recipe}", rate, "TFLOP/s", 3, stderr=statistics.stdev(rates) / 3**0.5,
                   **machine.goal(390, rate >= 390))  # fmt: skip

    for recipe in ("off", "rowwise", "tensorwise"):
        yield f"layers/behemoth/{recipe}", lambda r=recipe: run(r)


def memory(scale: Scale, machine: Machine, result: Result):
    def run() -> None:
        machine.reset()
        before = machine.peak_bytes()
        training = Training(scale, machine)
        machine.reset()
        training.step()
        measured = machine.peak_bytes() - (0 if machine.cuda else before)
        planned = planned_bytes(scale, training)
        ratio = planned / measured if measured else None
        unit = "GB at the peak of a step" if machine.cuda else "GB more than ever before, resident"
        result.add("memory/step", measured / 1e9, unit, ours=planned / 1e9,
                   peer=measured / 1e9, ratio=ratio, **(machine.goal(0.15, abs(ratio - 1) <= 0.15) if ratio else {}),
                   **training.shape())  # fmt: skip

    yield "memory/step", run


def planned_bytes(scale: Scale, training: Training) -> float:
    precision = PRECISIONS["mixed" if training.machine.cuda else "float32"]
    schedule = Schedule(rows=training.rows, recompute=training.model.recompute, slice=SLICE)
    return sum(training_memory(scale.config, ONE, schedule, precision, scale.seq_len).values())


def decode(scale: Scale, machine: Machine, result: Result):
    def run(answers: int) -> None:
        model = build(scale.config, machine, machine.dtype).eval()
        with torch.no_grad():
            model.output.weight.normal_(0, 0.02)
        engine = Engine(model, max_batch=answers, max_context=2 * (scale.prompt + scale.new))
        source = torch.Generator().manual_seed(5)
        prompts = torch.randint(0, scale.config.vocab_size, (answers, scale.prompt), generator=source).tolist()
        engine.generate(prompts, max_tokens=2)
        rates = []
        for _ in range(3):
            first = machine.seconds(lambda: engine.generate(prompts, max_tokens=1))
            whole = machine.seconds(lambda: engine.generate(prompts, max_tokens=scale.new))
            rates.append(answers * (scale.new - 1) / max(whole - first, 1e-9))
        rate, count = statistics.median(rates), model.parameter_count()
        reached = 1 - (1 - 1 / scale.config.n_experts) ** answers  # share of the experts that a step reads
        read = count.text - count.embedding - (1 - reached) * count.routed_experts
        bound = answers * machine.bandwidth / (read * machine.dtype.itemsize)
        result.add(f"decode/{answers}", rate, "tokens/s", 3, stderr=statistics.stdev(rates) / 3**0.5, ours=rate,
                   peer=bound, ratio=rate / bound)  # fmt: skip

    for answers in scale.answers:
        yield f"decode/{answers}", lambda n=answers: run(n)


PARTS = {f.__name__: f for f in (correctness, train_bf16, train_fp8, layers, memory, decode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result; rows that it holds are not made again")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--preset", default="small_scout", choices=("small_scout", "small_maverick"))
    parser.add_argument("--quick", action="store_true", help="short loss curves and answers")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU here: run this on a machine with one (and torch built for it), or see "
                         "that it works with --device cpu --quick, whose numbers mean nothing")  # fmt: skip
    machine, scale = Machine(args.device), scale_of(args.preset, args.device, args.quick)
    config = {"preset": args.preset if machine.cuda else "tiny, in its place", "quick": args.quick} | {
        key: value for key, value in dataclasses.asdict(scale).items() if key not in ("config", "layer")}  # fmt: skip
    result, late = Result(args.out, json.loads(json.dumps(config)), machine.describe()), []
    for part in args.only:
        begin = time.perf_counter()
        for name, make in PARTS[part](scale, machine, result):
            if result.find(name) is None:
                if machine.cuda and time.perf_counter() - begin > PART_SECONDS * (0.5 if args.quick else 1.0):
                    late.append(name)
                else:
                    machine.reset()
                    make()
    if late:
        print(f"no time was left for {', '.join(late)}: the same command again makes these rows")
    judged = [row for row in result.values["results"] if row["met"] is not None]
    print(f"{sum(row['met'] for row in judged)} of {len(judged)} goals met")


if __name__ == "__main__":
    main()
