"""A life of seconds, and how to run, interrupt and compare it from outside, as a person at a shell would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from puna.cli.main import main
from puna.convert.puna import STEP
from puna.testing.distributed import forks
from puna.train import metrics

TINY = """
from puna.data import DataConfig
from puna.eval import EvalConfig
from puna.model import ModelConfig, VisionConfig
from puna.stages import RunConfig, StageConfig, TokenizerConfig
from puna.train import TrainConfig

ITEMS = {"captions": {"items": 200}, "sft/addition": {"items": 200}, "sft/naming": {"items": 200},
         "long/en": {"max_chars": 60_000}, "text/en": {"max_chars": 60_000}}


def stage(seq_len, steps, weights, seed, **train):
    data = DataConfig(seq_len, weights, seed, {name: ITEMS[name] for name in weights})
    return StageConfig(data, TrainConfig(steps=steps, warmup=2, lr=3e-3, checkpoint_every=5, eval_every=1000,
                                         threads=1, compute_dtype="float32", **train))


def recipe():
    eye = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=64, adapter_width=16)
    model = ModelConfig(vocab_size=400, d_model=32, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=16, expert_width=32,
                        dense_width=32, n_experts=4, chunk=64, floor_scale=64, max_context=512, vision=eye)
    return RunConfig(
        "tiny", model, TokenizerConfig(400, chars=3000, code_chars=3000),
        stage(128, 36, {"text/en": 0.4, "captions": 0.4, "sft/addition": 0.2}, 0, rows=16, accumulate=2),
        stage(256, 24, {"long/en": 0.6, "captions": 0.4}, 1, rows=8),
        stage(192, 24, {"sft/naming": 0.6, "sft/addition": 0.4}, 2, rows=8),
        EvalConfig(naming=2, naming_languages=1, grounding=1, addition=1, needle=1, languages=("en",), bpb_bytes=2048,
                   chance_chars=20_000),
    )
"""


def write_recipe(folder: Path) -> None:
    (folder / "tiny.py").write_text(TINY, encoding="utf-8")


def start(folder: Path, *words: str) -> subprocess.Popen:
    """Starts `puna words` in `folder`, which then holds the recipe tiny.py, as a shell would."""
    write_recipe(folder)
    return subprocess.Popen(
        [sys.executable, "-m", "puna.cli.main", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


IMPORTED = ("torch._dynamo", "puna.life", "puna.cli.main", "puna.cli.train", "puna.cli.tools", "puna.cli.data",
            "puna.cli.talk")  # fmt: skip


def _command(folder: str, words: tuple[str, ...], said: str) -> None:
    for number in (1, 2):
        os.dup2(os.open(f"{said}/{number}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.exit(main(list(words)))


class Forked:
    """A command as subprocess.Popen has it, in a process of its own that did not have to import torch: a fork of one
    that has. It saves three seconds of a processor each."""

    def __init__(self, folder: Path, *words: str):
        write_recipe(folder)
        self.said = tempfile.TemporaryDirectory()
        self.process = forks(IMPORTED).Process(target=_command, args=(str(folder), words, self.said.name))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr) when it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("puna", timeout)
        files = [Path(self.said.name, str(number)) for number in (1, 2)]
        return tuple(file.read_text(encoding="utf-8") if file.exists() else "" for file in files)


begin = Forked


def puna(folder: Path, *words: str, code: int = 0, begin=Forked) -> str:
    """Runs `puna words` to its end; returns stdout."""
    process = begin(folder, *words)
    out, err = process.communicate()
    assert process.returncode == code, err
    return out


def wait_for(process: subprocess.Popen, condition) -> None:
    """Until `condition()` is true; an error if the command ends before."""
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the command ended too early ({process.returncode}): {process.communicate()[1]}")
        time.sleep(0.002)


def interrupt(process: subprocess.Popen, number: int) -> str:
    """Sends a signal and waits for the end; returns stderr. An error if the command was done before the signal."""
    assert process.poll() is None, f"the command ended before signal {number}"
    process.send_signal(number)
    return process.communicate()[1]


def killed(folder, words, delay, after=lambda: True):
    """Starts a command, waits for `after`, then `delay` seconds, and kills it; False if it was done before that."""
    process = begin(folder, *words)
    while not after() and process.poll() is None:
        time.sleep(0.002)
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)  # it may be done in this very moment
        process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), "the command failed by itself"
    return process.returncode != 0


def losses(stage: Path) -> list[dict]:
    """The lines of a stage's metrics.jsonl that tell of a step."""
    return [line for line in metrics.read(stage / "metrics.jsonl") if "loss" in line]


def checkpoints(stage: Path) -> list[int]:
    """Steps of a stage's checkpoints, oldest first."""
    return sorted(int(STEP.search(p.name).group(1)) for p in stage.glob("step-*"))


def weights(stage: Path, step: int) -> dict[str, bytes]:
    """A checkpoint's bytes: model.safetensors whole, and each tensor of training but torch's random state, which every
    process begins with another one of and nothing draws from."""
    folder = stage / f"step-{step:08d}"
    training = load_file(folder / "optimizer.safetensors")
    moments = {name: tensor.numpy().tobytes() for name, tensor in training.items() if name != "random_state"}
    return moments | {"model": (folder / "model.safetensors").read_bytes()}


def differing(one: Path, other: Path, step: int) -> list[str]:
    """What differs between two stages' checkpoints of a step; empty: bitwise equal."""
    a, b = weights(one, step), weights(other, step)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def same_course(one: Path, other: Path) -> None:
    """Two stages took the same steps: each exactly once, with the same numbers, whatever the clock said."""
    lines = [[{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in losses(stage)]
             for stage in (one, other)]  # fmt: skip
    assert [line["step"] for line in lines[0]] == list(range(len(lines[1])))
    assert lines[0] == lines[1]
    evaluations = [[line for line in metrics.read(stage / "metrics.jsonl") if "eval" in line] for stage in (one, other)]
    assert evaluations[0] == evaluations[1] and evaluations[0]


def record(stage: Path, step: int) -> dict:
    """run.json of a checkpoint."""
    return json.loads((stage / f"step-{step:08d}" / "run.json").read_text(encoding="utf-8"))
