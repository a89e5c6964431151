"""Nothing lost: which checkpoints stay, every flipped byte found, no NaN let in, no clock trusted, no disk written that
must not be."""

import json
import os
import random
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
from bad_input_helpers import CHECKPOINT, files, is_mistake, small_disk
from damage import flip_byte, reseal, tensor_place
from safetensors.torch import load_file, save_file
from test_loop import Crash, crash, until
from training_helpers import State, changed, job, same, three_checkpoints, values

import puna as product
from puna.convert.puna import CorruptCheckpoint, open_checkpoint, tensor_hash
from puna.errors import PunaError
from puna.train import TrainConfig, checkpoint, metrics, train


def numbers(stage):
    return sorted(int(p.name.removeprefix("step-")) for p in checkpoint.steps(stage))


# ---- retention


@pytest.mark.parametrize(("keep", "every", "kept"), [(1, 0, [12]), (3, 0, [8, 10, 12]), (2, 2, [4, 8, 10, 12]),
                                                     (1, 3, [6, 12]), (9, 5, [2, 4, 6, 8, 10, 12])])  # fmt: skip
def test_the_last_k_and_every_nth_stay(tmp_path, keep, every, kept):
    """Checkpoints come every 2 steps; the run dies in step 13."""
    with pytest.raises(Crash):
        train(job(tmp_path, steps=20, keep=keep, keep_every=every, checkpoint_every=2, source=until(13, crash)))
    assert numbers(tmp_path) == kept


def test_every_nth_outlives_the_stage_and_a_resumed_run(tmp_path):
    settings = {"steps": 10, "keep": 1, "keep_every": 2, "checkpoint_every": 2}
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(7, crash), **settings))
    trained = values(train(job(tmp_path / "run", **settings)))
    assert numbers(tmp_path / "run") == [4, 8, 10]
    assert not changed(trained, values(train(job(tmp_path / "plain", steps=10))))
    assert product.load(tmp_path / "run" / "step-00000004")[0] is not None


def test_a_damaged_milestone_beyond_the_run_goes_and_one_within_stays(tmp_path):
    state = State()
    for _ in range(4):
        state.step()
        state.save(tmp_path)
    checkpoint.prune(tmp_path, 1, 3, 2)  # the run went back behind 4
    assert numbers(tmp_path) == [2, 3]


def test_a_negative_retention_is_refused():
    with pytest.raises(PunaError, match="train.keep_every must not be negative"):
        TrainConfig(keep_every=-1)


# ---- flipped bytes


def test_a_flipped_byte_anywhere_is_found_and_the_checkpoint_before_taken(tmp_path, tiny_processor):
    """Every byte of run.json and of both headers that JSON lives in, and a sample of all the rest."""
    state = State(processor=tiny_processor)
    held = {}
    for _ in range(2):
        state.step()
        state.save(tmp_path)
        held[state.done] = state.tensors()
    newest, rand = tmp_path / "step-00000002", random.Random(0)
    tried, fresh = 0, State(seed=1, processor=tiny_processor)
    for file in sorted(newest.iterdir()):
        good = file.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little") if file.suffix == ".safetensors" else 0
        places = rand.sample(range(len(good)), 40) + ([*range(8)] + rand.sample(range(header), 40) if header else [])
        for place in places:
            flip_byte(file, place, rand.choice([1, 2, 4, 8, 16, 32, 64, 128, 255]))
            with pytest.raises(PunaError, match=f"step-0*2.*|{file.name}") as caught:
                checkpoint.restore(newest, fresh.model, fresh.optimizer, fresh.balancer)
            assert isinstance(caught.value, CorruptCheckpoint), (file.name, place, caught.value)
            assert file.name in str(caught.value), (file.name, place, caught.value)
            file.write_bytes(good)
            tried += 1
    assert tried > 5 * 40
    flip_byte(newest / "tokenizer.json", 1000)
    fresh = State(seed=1, processor=tiny_processor)
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint: .*step-00000002/tokenizer.json"):
        assert fresh.resume(tmp_path)["step"] == 1
    assert same(fresh, held[1])


def test_a_checkpoint_of_before_there_were_such_hashes_still_loads(tmp_path):
    held = three_checkpoints(tmp_path)
    path = tmp_path / "step-00000003" / "run.json"
    record = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("files", "sha256")}
    path.write_text(json.dumps(record))
    state = State(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state.resume(tmp_path)["step"] == 3
    assert same(state, held[3])


# ---- NaN


@pytest.mark.parametrize(("file", "name"), [("model.safetensors", "norm.weight"),
                                            ("optimizer.safetensors", "exp_avg/norm.weight"),
                                            ("optimizer.safetensors", "balance/0")])  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_that_was_saved_is_named_and_not_gone_on_with(tmp_path, file, name, value):
    held, folder = three_checkpoints(tmp_path), tmp_path / "step-00000003"
    tensors = load_file(folder / file)
    tensors[name][1] = value
    save_file(tensors, folder / file)
    key = "hashes" if file.startswith("model") else "training_hashes"
    reseal(folder, lambda run: run[key].update({name: tensor_hash(tensors[name])}))
    state = State(seed=1)
    with pytest.warns(UserWarning, match=f"skipping .*{file}: tensor {name} holds NaN or infinity"):
        assert state.resume(tmp_path)["step"] == 2
    assert same(state, held[2])
    if file.startswith("model"):
        with pytest.raises(PunaError, match="tensor norm.weight in .*model.safetensors holds NaN or infinity"):
            product.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_exact_whatever_the_sum_does(dtype):
    from puna.convert.layout import finite

    high = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(high.sum()) and finite(high), "an overflowing sum is no infinity of the tensor"
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 57, 99):
            bad = torch.ones(100, dtype=dtype)
            bad[place] = value
            assert not finite(bad)
    assert not finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype)) and finite(torch.zeros(0, dtype=dtype))


# ---- the command line


@pytest.mark.parametrize("form", ["hf", "puna", "meta"])
def test_convert_takes_the_checkpoint_before_a_damaged_one(puna, form):
    """The byte is in a tensor, so it shows in the middle of the conversion; what was written of it is gone."""
    to = ("--to", form, *(("--shards", "1") if form == "meta" else ()))
    assert puna("convert", "runs/tiny/pretrain", "right", *to)[0] == 0
    newer = shutil.copytree(CHECKPOINT, CHECKPOINT.with_name("step-00000003"))
    file = newer / "model.safetensors"
    flip_byte(file, tensor_place(file, "layers.3.moe.router.weight"), 1)
    with pytest.warns(
        UserWarning, match="step-00000003: tensor layers.3.moe.router.weight .*trying the checkpoint before"
    ):
        assert puna("convert", "runs/tiny/pretrain", "out", *to)[0] == 0
    assert files(Path("out")) == files(Path("right")) and not list(Path(".").glob(".out*"))
    is_mistake(puna("convert", newer, "other", *to), "step-00000003", "layers.3.moe.router.weight")
    file = CHECKPOINT / "model.safetensors"
    flip_byte(file, tensor_place(file, "norm.weight"), 1)
    with pytest.warns(UserWarning):
        is_mistake(puna("convert", "runs/tiny/pretrain", "other", *to), "all checkpoints", "are damaged")
    assert not Path("other").exists() and not list(Path(".").glob(".other*"))


@pytest.mark.parametrize("name", ["processor.json", "tokenizer.json"])
def test_a_flipped_byte_beside_the_weights_is_found_by_convert_too(puna, name):
    flip_byte(CHECKPOINT / name, 60, 1)
    with pytest.raises(CorruptCheckpoint, match=f"{name} does not match its hash"):
        open_checkpoint(CHECKPOINT)
    with pytest.warns(UserWarning):
        is_mistake(puna("convert", "runs/tiny/pretrain", "out", "--to", "hf"), name)


def test_nan_in_a_downloaded_model_is_named(puna):
    file = Path("hf/model-00001-of-00001.safetensors")
    tensors = load_file(file)
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    tensors[name][1, 2, 3] = float("nan")
    save_file(tensors, file)
    for words in (("convert", "hf", "out", "--to", "puna"), ("generate", "hf", "Hello")):
        is_mistake(puna(*words), name, file.name, "holds NaN or infinity")
    assert not Path("out").exists()


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Years back and forth at every look, and checkpoints whose files seem to come from 1971 and from 2100."""
    plain = values(train(job(tmp_path / "plain")))
    rand = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rand.uniform(0, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: int(rand.uniform(0, 4e18)))
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(5, crash)))
    for step, year in ((2, 2100), (4, 1971)):
        for path in (tmp_path / "run" / f"step-{step:08d}").iterdir():
            os.utime(path, ((year - 1970) * 3.15e7,) * 2)
    assert checkpoint.newest(tmp_path / "run")["step"] == 4
    asked = []
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=lambda step: asked.append(step) or crash()))
    assert asked == [4]
    assert not changed(plain, values(train(job(tmp_path / "run"))))
    assert [line["step"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl")] == list(range(8))


def test_a_read_only_folder_can_be_read_and_refuses_in_one_line(puna, tmp_path):
    work = Path.cwd()
    with small_disk(tmp_path / "disk"):
        shutil.copytree(work, ".", dirs_exist_ok=True)
        before, ticket = files(Path(".")), tmp_path / "elsewhere"
        subprocess.run(["mount", "-o", "remount,ro", str(Path.cwd())], check=True, capture_output=True)
        try:
            assert puna("generate", "runs/tiny", "Hello", "--max-tokens", "2")[0] == 0
            assert puna("report", "tiny")[0] == 0
            assert puna("report", "tiny", "--out", tmp_path / "page.html")[0] == 0
            assert puna("convert", "runs/tiny", ticket, "--to", "hf")[0] == 0
            assert files(ticket) == files(Path("hf"))
            for words in (("midtrain", "tiny.py"), ("raise", "tiny.py"), ("pretrain", "tiny.py", "--name", "other"),
                          ("convert", "runs/tiny", "out", "--to", "hf"), ("report", "tiny", "--out", "page.html"),
                          ("tokenizer", "train", "tiny.py", "--out", "tok")):  # fmt: skip
                is_mistake(puna(*words), "Read-only file system")
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(Path.cwd())], check=True, capture_output=True)
        assert files(Path(".")) == before
