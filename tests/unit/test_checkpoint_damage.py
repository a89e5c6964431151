"""Damage of a checkpoint is named with file and tensor, and the one before it is taken; nothing changes before all is
checked."""

import warnings

import pytest
import torch
from damage import reseal
from safetensors.torch import load_file, save_file
from training_helpers import State, same, three_checkpoints

from puna.convert.puna import CorruptCheckpoint, tensor_hash
from puna.errors import PunaError
from puna.train import checkpoint


@pytest.fixture
def stage(tmp_path):
    """A stage with checkpoints of steps 1 to 3, and what each holds."""
    return tmp_path / "stage", three_checkpoints(tmp_path / "stage")


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-50])


def flip(file, name):
    def damage(folder):
        tensors = load_file(folder / file)
        tensors[name].view(torch.uint8).flatten()[5] ^= 1
        save_file(tensors, folder / file)

    return damage


def drop(file, name):
    def damage(folder):
        tensors = load_file(folder / file)
        del tensors[name]
        save_file(tensors, folder / file)

    return damage


def edit(change):
    return lambda folder: reseal(folder, change)


def rename_a_parameter(folder):
    """Names and hashes agree, but with another model's."""
    tensors = load_file(folder / "model.safetensors")
    tensors["other.weight"] = tensors.pop("norm.weight")
    save_file(tensors, folder / "model.safetensors")
    edit(lambda run: run.update(hashes={n: tensor_hash(t) for n, t in tensors.items()}))(folder)


DAMAGES = {
    "model cut": (cut("model.safetensors"), "model.safetensors can't be read"),
    "optimizer cut": (cut("optimizer.safetensors"), "optimizer.safetensors can't be read"),
    "run.json cut": (cut("run.json"), "run.json"),
    "model gone": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "optimizer gone": (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
    "run.json gone": (lambda folder: (folder / "run.json").unlink(), "run.json"),
    "a bit of a weight": (flip("model.safetensors", "norm.weight"), "tensor norm.weight does not match"),
    "a bit of a moment": (flip("optimizer.safetensors", "exp_avg/norm.weight"), "exp_avg/norm.weight does not match"),
    "a bit of the bias": (flip("optimizer.safetensors", "balance/0"), "tensor balance/0 does not match"),
    "a weight gone": (drop("model.safetensors", "norm.weight"), "tensor norm.weight"),
    "a moment gone": (drop("optimizer.safetensors", "exp_avg/norm.weight"), "tensor exp_avg/norm.weight"),
    "random state gone": (drop("optimizer.safetensors", "random_state"), "tensor random_state"),
    "another model": (rename_a_parameter, "norm.weight is missing or unexpected"),
    "no hashes of training": (edit(lambda run: run.pop("training_hashes")), "optimizer.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_it_taken(stage, what):
    folder, held = stage
    damage, named = DAMAGES[what]
    damage(folder / "step-00000003")
    state = State(seed=1)
    untouched = state.tensors()
    with pytest.raises(CorruptCheckpoint, match=named) as caught:
        checkpoint.restore(folder / "step-00000003", state.model, state.optimizer, state.balancer)
    assert "step-00000003" in str(caught.value)
    assert same(state, untouched), "something was changed before everything was checked"
    with pytest.warns(UserWarning, match=f"skipping a damaged checkpoint: .*{named}"):
        assert state.resume(folder)["step"] == 2
    assert same(state, held[2])


def test_when_all_are_damaged_a_stage_begins_again(stage):
    folder, _ = stage
    for path in checkpoint.steps(folder):
        cut("optimizer.safetensors")(path)
    state = State(seed=1)
    before = state.tensors()
    with pytest.warns(UserWarning, match="damaged") as caught:
        assert state.resume(folder) is None
    assert len(caught) == 3 and same(state, before)


def test_a_damaged_checkpoint_never_displaces_a_whole_one(stage):
    """After going back to an older checkpoint, the newer, damaged ones do not count among those that are kept."""
    folder, _ = stage
    cut("model.safetensors")(folder / "step-00000003")
    cut("optimizer.safetensors")(folder / "step-00000002")
    state = State(seed=1)
    with pytest.warns(UserWarning):
        assert state.resume(folder)["step"] == 1
    state.step()
    state.save(folder)
    checkpoint.prune(folder, 1, state.done)
    again = State(seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.resume(folder)["step"] == 2
    assert same(again, state.tensors())


def test_another_format_is_an_error_not_damage(stage):
    """A newer puna's checkpoint must not be passed over silently, and then overwritten."""
    folder, _ = stage
    edit(lambda run: run.update(format=2))(folder / "step-00000003")
    with pytest.raises(PunaError, match="newer puna"):
        State().resume(folder)
