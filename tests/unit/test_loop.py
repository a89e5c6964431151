"""The training loop: what it writes and when, what stops it, and that it goes on as if nothing had happened."""

import json
import os
import signal
import threading

import pytest
import torch
from damage import reseal
from safetensors.torch import load_file, save_file
from training_helpers import CONFIG, TRAIN, changed, job, random_batch, values

from puna.convert.puna import tensor_hash
from puna.data import Batch
from puna.errors import PunaError
from puna.model.moe import moe_layers
from puna.optim import wsd
from puna.train import Evaluation, checkpoint, metrics, train
from puna.train.loop import Stopped, compute_dtype
from puna.train.terms import NextToken


def lines(folder, kind="loss"):
    return [line for line in metrics.read(folder / "metrics.jsonl") if kind in line]


class Crash(Exception):
    """Stands for a process that dies."""


def until(step, what):
    """A source that does `what` before giving the batch of `step`."""

    def source(s):
        if s == step:
            what()
        return random_batch(s)

    return source


def crash():
    raise Crash


class Broken(NextToken):
    """Loss and gradient are not finite in the optimizer steps named, where a micro-batch (of two) is one slice."""

    def __init__(self, *steps):
        self.steps, self.calls = steps, 0

    def __call__(self, hidden_nD, head, batch):
        loss, sums = super().__call__(hidden_nD, head, batch)
        self.calls += 1
        return loss * (float("nan") if (self.calls - 1) // 2 in self.steps else 1.0), sums


def test_metrics_tell_each_step(tmp_path):
    run = job(tmp_path, steps=8, checkpoint_every=3)
    train(run)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == lines(tmp_path) and [line["step"] for line in written] == list(range(8))
    for step, line in enumerate(written):
        batch = random_batch(step)
        assert line["lr"] == TRAIN.lr * wsd(step, 8, TRAIN.warmup, TRAIN.decay, TRAIN.floor)
        assert line["tokens"] == int((batch.doc_ids_BT >= 0).sum()) and line["valid"] == int(batch.valid_BT.sum())
        assert line["sources"] == {"seen": 2, "text": 2} and line["source_tokens"] == batch.source_tokens
        assert line["tiles"] == 2 and line["skipped"] is False
        assert line["grad_norm"] > 0 and 0 <= line["waited"] <= line["seconds"]
        assert 0 <= line["accuracy"] <= 1 and 1 <= line["router/max_load"] <= CONFIG.n_experts
    assert len({line["lr"] for line in written}) > 3 and len({line["loss"] for line in written}) == 8
    assert not run.model.training and all(layer.selection_bias_E is None for layer in moe_layers(run.model))


def test_the_balance_bias_is_gone_when_the_last_step_learns(tmp_path):
    """It moves routes while it is there, and has faded out by the last step (`optim.schedule.anneal`)."""
    train(job(tmp_path, steps=10, balance=0.3, checkpoint_every=100))
    flips = [line["router/flip_share"] for line in lines(tmp_path)]
    assert flips[0] == 0 and min(flips[1:9]) > 0.05 and flips[9] == 0


@pytest.mark.parametrize(("warmup_head", "rate"), [(0, 1 / 4), (1, 1.0), (2, 1 / 2)])
def test_the_head_may_warm_up_on_its_own(tmp_path, warmup_head, rate):
    """A new model's head is zero, so after one step of Adam its entries are its own learning rate."""
    settings = {"warmup": 4, "warmup_head": warmup_head, "lr_head": 2.0, "checkpoint_every": 1}
    with pytest.raises(Crash):
        train(job(tmp_path, source=until(1, crash), **settings))
    head = load_file(tmp_path / "step-00000001" / "model.safetensors")["output.weight"]
    assert float(head.abs().max()) == pytest.approx(2 * TRAIN.lr * rate, rel=1e-3)
    assert lines(tmp_path)[0]["lr"] == TRAIN.lr / 4  # what is written is the matrices' rate


def test_it_learns(tmp_path):
    run = job(tmp_path, steps=25, source=lambda step: random_batch(0), checkpoint_every=100)
    train(run)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert losses[0] == pytest.approx(torch.tensor(96.0).log().item()) and losses[-1] < 0.6 * losses[0]


def test_evaluations_come_when_due_and_at_the_end(tmp_path):
    seen = []

    def evaluate(model):
        bias = [layer.selection_bias_E for layer in moe_layers(model)]
        seen.append((model.training, bias, values(model)["norm.weight"]))
        return {"number": float(len(seen))}

    def plain(model):
        return {"other": 1.0}

    run = job(tmp_path, steps=8, evaluations=(Evaluation("often", 3, evaluate), Evaluation("rarely", 100, plain)))
    with_evaluations = values(train(run))
    assert [(line["step"], line["eval"]) for line in lines(tmp_path, "eval")] == [
        (3, "often"), (6, "often"), (8, "often"), (8, "rarely"),
    ]  # fmt: skip
    assert [line["number"] for line in lines(tmp_path, "number")] == [1, 2, 3]
    assert all(not training and bias == [None, None] for training, bias, _ in seen)
    assert not torch.equal(seen[0][2], seen[1][2]) and torch.equal(seen[2][2], with_evaluations["norm.weight"])
    without = values(train(job(tmp_path / "plain", steps=8)))
    assert not changed(with_evaluations, without), "evaluation disturbs training"


def test_several_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    run = job(tmp_path, steps=20, term=Broken(2, 6, 7), max_skips=2, slice=1000)
    with pytest.raises(PunaError, match="2 steps in a row.*step 7.*train.lr"):
        train(run)
    written = lines(tmp_path)
    assert [line["step"] for line in written if line["skipped"]] == [2, 6, 7] and len(written) == 8
    assert written[6]["loss"] is None and "NaN" not in (tmp_path / "metrics.jsonl").read_text(), "NaN is no JSON"
    newest = checkpoint.newest(tmp_path)
    assert (newest["step"], newest["finished"]) == (6, False)
    mended = values(train(job(tmp_path, steps=20, slice=1000)))  # the same command goes on from there
    assert [line["step"] for line in lines(tmp_path)] == list(range(20))
    assert [line["step"] for line in lines(tmp_path) if line["skipped"]] == [2]
    other = train(job(tmp_path / "other", steps=20, slice=1000, term=Broken(2)))
    assert not changed(mended, values(other))


def test_a_skip_now_and_then_stops_nothing(tmp_path):
    run = job(tmp_path, steps=8, term=Broken(1, 2, 4, 5), max_skips=3, slice=1000)
    train(run)
    assert [line["step"] for line in lines(tmp_path) if line["skipped"]] == [1, 2, 4, 5]
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_skipped_step_leaves_weights_moments_and_bias_alone(tmp_path):
    run = job(tmp_path, steps=8, term=Broken(3, 4), max_skips=2, checkpoint_every=1, keep=9, slice=1000)
    with pytest.raises(PunaError):
        train(run)

    def saved(step):
        folder = tmp_path / f"step-{step:08d}"
        return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")

    assert not changed(saved(3), saved(4))  # the fourth step was skipped
    assert {"balance/0", "norm.weight", "exp_avg/norm.weight"} <= changed(saved(2), saved(3))


def test_a_run_goes_on_bitwise(tmp_path):
    """From the checkpoint of step 4, in a model of another seed: everything comes from the checkpoint."""
    whole = values(train(job(tmp_path / "whole")))
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(5, crash)))
    assert len(lines(tmp_path / "run")) == 5 and checkpoint.newest(tmp_path / "run")["step"] == 4
    asked = []
    again = job(tmp_path / "run", seed=9, source=lambda step: asked.append(step) or random_batch(step))
    assert changed(whole, values(again.model))
    assert not changed(whole, values(train(again)))
    assert asked == [4, 5, 6, 7]
    ours, theirs = lines(tmp_path / "run"), lines(tmp_path / "whole")
    assert [line["step"] for line in ours] == list(range(8))
    for key in ("loss", "grad_norm", "lr", "router/max_load", "router/flip_share"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key


@pytest.mark.parametrize("lost", ["exp_avg/", "exp_avg_sq/", "step/", "balance/"])
def test_going_on_needs_everything_that_is_saved(tmp_path, lost):
    """Each kind of training state matters: with zeros in its place a resumed run ends elsewhere."""
    settings = {"balance": 0.3, "rows": 4}
    whole = values(train(job(tmp_path / "whole", **settings)))
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(4, crash), **settings))
    folder = tmp_path / "run" / "step-00000004"
    tensors = load_file(folder / "optimizer.safetensors")
    names = [name for name in tensors if name.startswith(lost)]
    assert any(tensors[name].any() for name in names)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in names}
    save_file(tensors, folder / "optimizer.safetensors")
    hashes = {name: tensor_hash(tensor) for name, tensor in tensors.items()}
    reseal(folder, lambda run: run.update(training_hashes=hashes))
    assert changed(whole, values(train(job(tmp_path / "run", **settings))))


def test_a_finished_run_returns_at_once(tmp_path):
    first = values(train(job(tmp_path)))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = train(job(tmp_path, seed=9, source=lambda step: crash()))
    assert not changed(first, values(again)) and not again.training
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert checkpoint.steps(tmp_path) == [tmp_path / "step-00000008"]


def test_checkpoints_beside_training_end_in_the_same_weights(tmp_path):
    whole = values(train(job(tmp_path / "whole")))
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(5, crash), checkpoint_async=True))
    assert not changed(whole, values(train(job(tmp_path / "run", checkpoint_async=True))))
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-00000008"]
    assert not list((tmp_path / "run").glob(".step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 7])  # in the middle, and in the last step
def test_a_signal_finishes_the_step_and_saves(tmp_path, number, step):
    before = signal.getsignal(number)
    run = job(tmp_path / "run", source=until(step, lambda: os.kill(os.getpid(), number)), checkpoint_every=100)
    with pytest.raises(Stopped, match=f"{number.name} after step {step}; the same command goes on") as stopped:
        train(run)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    newest = checkpoint.newest(tmp_path / "run")
    assert (newest["step"], newest["finished"]) == (step + 1, step == 7)
    assert len(lines(tmp_path / "run")) == step + 1
    whole = values(train(job(tmp_path / "whole")))
    assert not changed(whole, values(train(job(tmp_path / "run"))))


def test_signals_are_left_alone_outside_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: train(job(tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert checkpoint.newest(tmp_path)["finished"] and signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = job(tmp_path, source=until(3, lambda: monkeypatch.setattr(checkpoint, "plan_safetensors", full)))
    with pytest.raises(PunaError, match="step-00000004.*No space left.*run again"):
        train(run)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000002"] and not list(tmp_path.glob(".step-*"))
    assert not changed(values(train(job(tmp_path / "whole"))), values(train(job(tmp_path))))


@pytest.mark.parametrize(
    ("machine", "supported", "bf16", "amx", "expected"),
    [
        ("x86_64", True, True, False, torch.bfloat16),
        ("x86_64", True, False, True, torch.bfloat16),
        ("x86_64", True, False, False, torch.float32),  # AVX-512 alone only imitates it, at half of float32's speed
        ("x86_64", False, False, False, torch.float32),
        ("aarch64", True, False, False, torch.bfloat16),
        ("aarch64", False, False, False, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_it_is_native(monkeypatch, machine, supported, bf16, amx, expected):
    import puna.train.loop as loop

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(loop.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert compute_dtype("auto", cpu) is expected
    assert compute_dtype("auto", cuda) is (torch.bfloat16 if supported else torch.float32)
    assert [compute_dtype(name, cpu) for name in ("bfloat16", "float32")] == [torch.bfloat16, torch.float32]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert compute_dtype("auto", cpu) is torch.float32


def test_computing_in_bfloat16_keeps_fp32_master_weights(tmp_path):
    models = [train(job(tmp_path / name, compute_dtype=name)) for name in ("bfloat16", "float32")]
    assert [m.compute_dtype for m in models] == [torch.bfloat16, torch.float32]
    assert all(p.dtype is torch.float32 for m in models for p in m.parameters())
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("bfloat16", "float32")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_batch_goes_where_the_model_is(tmp_path, monkeypatch):
    """Sources make batches on the CPU; a model of a process with a GPU is there."""
    sent, to = [], Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: sent.append(device) or to(batch, device))
    made = job(tmp_path, steps=2)
    train(made)
    assert sent == 2 * [made.model.tok_embeddings.weight.device]
