"""A checkpoint is whole or it is none: written aside, flushed and renamed; what it brings back is all there was."""

import dataclasses
import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from damage import reseal
from training_helpers import CONFIG, State, changed, lively_model, same, three_checkpoints

import puna
from puna.convert.puna import read_run
from puna.errors import PunaError
from puna.model import VisionConfig
from puna.train import checkpoint


@pytest.fixture
def stage(tmp_path):
    """A stage with checkpoints of steps 1 to 3, and what each holds."""
    return tmp_path / "stage", three_checkpoints(tmp_path / "stage")


def test_a_round_trip_brings_back_everything(stage):
    folder, held = stage
    assert changed(held[2], held[3]) >= {"norm.weight", "exp_avg/norm.weight", "step/norm.weight", "random_state"}
    other = State(seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = other.resume(folder)
    assert (run["step"], run["finished"]) == (3, False) and same(other, held[3])
    assert {"balance/0", "balance/1", "exp_avg_sq/vision.projector.weight"} <= held[3].keys()
    assert checkpoint.newest(folder) == run and json.loads(json.dumps(run)) == run
    assert run["environment"] == checkpoint.environment()


def test_parameters_that_never_had_a_gradient_have_no_moments(tmp_path):
    state = State()
    state.step(pictures=False)
    state.save(tmp_path)
    other = State(seed=5)
    other.resume(tmp_path)
    assert same(other, state.tensors())
    assert "exp_avg/norm.weight" in other.tensors() and "exp_avg/vision.projector.weight" not in other.tensors()
    for each in (state, other):
        each.done = 1
        each.step()
    assert same(other, state.tensors())


def test_nothing_to_resume(tmp_path):
    state = State()
    before = state.tensors()
    assert state.resume(tmp_path / "none") is None and checkpoint.newest(tmp_path / "none") is None
    assert checkpoint.steps(tmp_path / "none") == [] and same(state, before)


def test_a_checkpoint_takes_its_name_when_it_is_whole(tmp_path, monkeypatch):
    synced, renamed = [], []
    rename, sync = Path.replace, os.fsync

    def watched(self, target):
        if self.name.startswith(".step-"):
            names = sorted(p.name for p in self.iterdir())
            renamed.append((self.parent, Path(target).name, names, len(synced)))
            assert not Path(target).exists()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(handle) or sync(handle))
    state = State()
    state.step()
    state.save(tmp_path)
    [(parent, name, names, flushed)] = renamed
    assert (parent, name) == (tmp_path, "step-00000001")
    assert names == ["model.safetensors", "optimizer.safetensors", "run.json"] and flushed >= len(names)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_what_was_there(stage, monkeypatch, error):
    folder, held = stage

    def fails(*_):
        raise error

    state = State()
    state.resume(folder)
    state.step()
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(checkpoint, "plan_safetensors", fails)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PunaError) as caught:
        state.save(folder)
    if caught.type is PunaError:
        assert "step-00000004" in str(caught.value) and "free some disk space" in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == before
    other = State(seed=1)
    assert other.resume(folder)["step"] == 3 and same(other, held[3])


def test_what_a_killed_writer_left_is_ignored_and_swept_up(stage):
    folder, held = stage
    left = folder / ".step-abc123"
    shutil.copytree(folder / "step-00000003", left)
    (left / "run.json").unlink()
    (folder / "step-9.tmp").mkdir()
    assert [p.name for p in checkpoint.steps(folder)] == [f"step-{n:08d}" for n in (3, 2, 1)]
    state = State(seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state.resume(folder)["step"] == 3 and same(state, held[3])
        assert same_model(puna.load(folder)[0], held[3])
    checkpoint.prune(folder, 9, 3)
    assert not left.exists() and len(checkpoint.steps(folder)) == 3


def same_model(model, held):
    return all(torch.equal(p, held[name]) for name, p in model.named_parameters())


def test_prune_keeps_the_newest(stage):
    folder, _ = stage
    for keep, left in ((3, [3, 2, 1]), (2, [3, 2]), (1, [3])):
        checkpoint.prune(folder, keep, 3)
        assert [p.name for p in checkpoint.steps(folder)] == [f"step-{n:08d}" for n in left]


def test_the_same_step_again_replaces_it(stage):
    folder, held = stage
    state = State(seed=3)
    state.step()
    state.save(folder)
    again = State()
    for name in ("step-00000002", "step-00000003"):
        shutil.rmtree(folder / name)
    assert again.resume(folder)["step"] == 1
    assert same(again, state.tensors()) and not same(again, held[1])


@pytest.mark.parametrize("key", ["torch", "threads", "cpu"])
def test_another_machine_is_warned_of_and_goes_on(stage, key):
    folder, held = stage
    reseal(folder / "step-00000003", lambda run: run["environment"].update({key: "another"}))
    state = State(seed=1)
    with pytest.warns(UserWarning, match=f"another {key}: the run goes on, but not bitwise") as caught:
        state.resume(folder)
    assert len(caught) == 1 and same(state, held[3])


def test_the_environment_is_this_one():
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            here = checkpoint.environment()
            assert here["threads"] == count and here["torch"] == torch.__version__ and len(here["cpu"]) > 3
    finally:
        torch.set_num_threads(threads)


def test_a_checkpoint_is_a_model_that_loads(tmp_path, tiny_processor):
    eye = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=32, adapter_width=24)
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch, vision=eye)
    state = State(config=config, processor=tiny_processor)
    with torch.no_grad():
        state.model.output.weight.copy_(lively_model(config=config).output.weight)
    state.step(pictures=False)
    folder = state.save(tmp_path / "stage", finished=True)
    assert read_run(folder)["finished"] is True and folder.stat().st_mode & 0o777 == 0o755
    tokens = torch.randint(0, 256, (1, 40))
    for path in (folder, tmp_path / "stage"):
        model, processor = puna.load(path)
        assert model.config == config and not model.training and same_model(model, state.tensors())
        assert processor.tokenizer.encode("a fox") == tokenizer.encode("a fox") and processor.image is not None
        assert torch.equal(model(tokens), state.model.eval()(tokens))


def test_written_in_a_thread_it_is_the_checkpoint_of_the_step(tmp_path, monkeypatch):
    """Training goes on while the thread writes: what it writes is what `save` was given, bit for bit."""
    begun, go_on = threading.Event(), threading.Event()
    original = checkpoint.plan_safetensors

    def slow(*given):
        begun.set()
        assert go_on.wait(30)
        return original(*given)

    state = State()
    state.step()
    state.save(tmp_path / "straight")
    held = state.tensors()
    monkeypatch.setattr(checkpoint, "plan_safetensors", slow)
    with checkpoint.Saver(tmp_path / "thread", asynchronous=True) as saver:
        target = saver.save(1, False, {"model": state.model.config.to_dict()}, *state.parts)
        assert begun.wait(30) and not target.exists()
        state.step()
        assert changed(held, state.tensors())
        go_on.set()
        saver.wait()
    for file in ("model.safetensors", "optimizer.safetensors", "run.json"):
        assert (target / file).read_bytes() == (tmp_path / "straight" / target.name / file).read_bytes()
    again = State(seed=2)
    assert again.resume(tmp_path / "thread")["step"] == 1 and same(again, held)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a mistake")])
def test_an_error_of_the_thread_is_one_of_the_next_save(tmp_path, monkeypatch, error):
    def fails(*_):
        raise error

    state = State()
    state.step()
    record = {"model": state.model.config.to_dict()}
    monkeypatch.setattr(checkpoint, "plan_safetensors", fails)
    with checkpoint.Saver(tmp_path, asynchronous=True) as saver:
        saver.save(1, False, record, *state.parts)
        with pytest.raises(PunaError, match=f"can't write checkpoint .*step-00000001.*{error.args[-1]}"):
            saver.save(2, False, record, *state.parts)
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        saver.save(2, False, record, *state.parts)
        saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_interrupted_run_gives_up_what_it_writes(tmp_path, monkeypatch):
    state = State()
    with pytest.raises(KeyboardInterrupt), checkpoint.Saver(tmp_path, asynchronous=True) as saver:
        monkeypatch.setattr(checkpoint.Saver, "_write", lambda saver, job, meeting: meeting.hear("never"))
        saver.timeout = 600
        saver.save(1, False, {}, *state.parts)
        raise KeyboardInterrupt
    assert not checkpoint.steps(tmp_path) and saver.thread is not None and not saver.thread.is_alive()


def test_a_moment_of_another_shape_is_an_error(tmp_path):
    state = State()
    state.step()
    parameter = state.model.norm.weight
    state.optimizer.state[parameter]["exp_avg"] = torch.zeros(3)
    with pytest.raises(PunaError, match=r"the optimizer's exp_avg/norm.weight has shape \[3\], its parameter \[32\]"):
        state.save(tmp_path)
    assert not list(tmp_path.iterdir())
