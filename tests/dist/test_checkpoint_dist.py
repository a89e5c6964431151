"""Checkpoints of many processes: the files that one would write, read by any number of them, whole whatever dies."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import compare_known, fails, resumes, train_on, write_known
from damage import flip_byte, tensor_place
from safetensors.torch import load_file, save_file

LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp3": (3, {}),
    "fsdp4": (4, {}),
    "hsdp": (4, dict(dp_replicate=2)),
    "ep4": (4, dict(ep=4)),
    "tp2 cp2": (4, dict(tp=2, cp=2)),
    "tp2 ep2": (4, dict(tp=2, ep=2)),
    "cp2 ep2": (2, dict(cp=2, ep=2)),
}
FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Checkpoints that one process wrote, by kind of model."""
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the pool's processes
    for kind in ("scout", "maverick"):
        write_known(0, kind, None, folder / kind)
    torch.set_num_threads(threads)
    return folder


def run_of(folder):
    """run.json without what differs by right: the layout, and with it the text's own hash."""
    run = json.loads((folder / "run.json").read_text())
    assert run.pop("sha256") and run["environment"].pop("layout", None) is not None or "layout" not in run
    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_many_processes_write_the_bytes_that_one_writes(pool, one, tmp_path, name):
    world, layout = LAYOUTS[name]
    kind = "scout" if name in ("fsdp2", "tp2 ep2") else "maverick"
    pool.run(write_known, world, kind, layout, tmp_path, world % 2 == 0)
    expected, folder = one / kind / "step-00000000", tmp_path / "step-00000000"
    assert sorted(p.name for p in folder.iterdir()) == [*FILES, "run.json"]
    for file in FILES:
        assert (folder / file).read_bytes() == (expected / file).read_bytes(), file
    assert run_of(folder) == run_of(expected)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000000"]


def test_one_process_writes_the_bytes_that_the_library_writes(one, tmp_path):
    for file in FILES:
        path = one / "maverick" / "step-00000000" / file
        save_file(load_file(path), tmp_path / file, metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / file).read_bytes()
    training = load_file(one / "maverick" / "step-00000000" / FILES[1])
    assert {"random_state", "balance/1", "step/norm.weight", "exp_avg/layers.1.moe.experts.w13"} <= training.keys()


@pytest.mark.parametrize("name", [*LAYOUTS, "one"])
def test_any_layout_reads_what_another_wrote(pool, one, tmp_path, name):
    stage = tmp_path
    pool.run(write_known, 4, "maverick", dict(tp=2, ep=2), stage)
    if name == "one":
        assert compare_known(0, "maverick", None, stage) == []
        return
    world, layout = LAYOUTS[name]
    assert pool.run(compare_known, world, "maverick", layout, stage) == [[]] * world
