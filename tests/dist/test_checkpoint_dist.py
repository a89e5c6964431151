"""Checkpoints of many processes: the files that one would write, read by any number of them, whole whatever dies."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from checkpoint_helpers import compare_known, fails, resumes, starts_from, train_on, write_known
from checkpoint_helpers import main as run_in_a_job
from damage import flip_byte, reseal, tensor_place
from dist_helpers import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import puna
from puna.cli.main import main
from puna.convert.puna import read_run, tensor_hash
from puna.data import Batches
from puna.data.mixture import Mixture
from puna.data.packing import PackedRows
from puna.testing.distributed import forks

LAYOUTS = {
    "fsdp2": (2, {}),
    "fsdp3": (3, {}),
    "fsdp4": (4, {}),
    "hsdp": (4, dict(dp_replicate=2)),
    "ep4": (4, dict(ep=4)),
    "tp2 cp2": (4, dict(tp=2, cp=2)),
    "tp2 ep2": (4, dict(tp=2, ep=2)),
    "cp2 ep2": (2, dict(cp=2, ep=2)),
    "pp2": (2, dict(pp=2)),
    "pp2 tp2": (4, dict(pp=2, tp=2)),
}
FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Checkpoints that one process wrote, by kind of model."""
    folder = tmp_path_factory.mktemp("one")
    for kind in ("scout", "maverick"):
        write_known(0, kind, None, folder / kind)
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


@pytest.fixture(scope="module")
def four(pool, tmp_path_factory):
    """A stage that four processes wrote, tensor and expert parallel."""
    stage = tmp_path_factory.mktemp("four")
    pool.run(write_known, 4, "maverick", dict(tp=2, ep=2), stage)
    return stage


@pytest.mark.parametrize("name", [*LAYOUTS, "one"])
def test_any_layout_reads_what_another_wrote(pool, four, name):
    if name == "one":
        assert compare_known(0, "maverick", None, four) == []
        return
    world, layout = LAYOUTS[name]
    assert pool.run(compare_known, world, "maverick", layout, four) == [[]] * world


def test_load_and_convert_see_no_difference(four, one, tmp_path):
    loaded = []
    for name, stage in (("four", four), ("one", one / "maverick")):
        loaded.append(dict(puna.load(stage)[0].named_parameters()))
        assert main(["convert", str(stage / "step-00000000"), str(tmp_path / name), "--to", "puna"]) == 0
    assert all(torch.equal(loaded[0][name], tensor) for name, tensor in loaded[1].items())
    assert loaded[0].keys() == loaded[1].keys()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "four" / path.name).read_bytes(), path.name


def test_going_on_with_four_two_and_three_processes_follows_the_curve_of_one(pool, tmp_path):
    """Twelve rows a step; each time another layout, and the checkpoints are written beside training."""
    alone = train_on(0, "maverick", None, tmp_path / "alone", 6, False)
    assert max(alone.values()) - min(alone.values()) > 0.05, "the curve has to fall for this to say something"
    losses = {}
    for world, layout, until in ((4, dict(ep=4), 2), (2, dict(tp=2), 4), (3, {}, 6)):
        first, *others = pool.run(train_on, world, "maverick", layout, tmp_path / "many", until)
        assert all(other == first for other in others)
        assert sorted(first) == list(range(until - 2, until))
        losses |= first
    assert losses == pytest.approx(alone, abs=1e-4)
    assert train_on(0, "maverick", None, tmp_path / "many", 6) == {}, "all six steps are done"
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    assert names == ["step-00000006"], "the last one alone is kept of a finished stage"


def test_a_checkpoint_written_beside_training_changes_no_bit(pool, tmp_path):
    for asynchronous, until in ((True, (2, 4)), (False, (4,))):
        for steps in until:  # the one is interrupted
            pool.run(train_on, 2, "scout", dict(ep=2), tmp_path / str(asynchronous), steps, asynchronous, "muon")
    files = [(tmp_path / str(a) / "step-00000004" / file).read_bytes() for file in FILES for a in (True, False)]
    assert files[0] == files[1] and files[2] == files[3]
    kinds = {name.partition("/")[0] for name in load_file(tmp_path / "True" / "step-00000004" / FILES[1])}
    assert {"momentum_buffer", "exp_avg", "balance"} <= kinds


@pytest.mark.parametrize(
    ("file", "name"),
    [(FILES[0], "layers.1.moe.experts.w13"), (FILES[0], "norm.weight"),
     (FILES[1], "exp_avg_sq/layers.0.attention.wo.weight"),
     (FILES[1], "balance/1"), (FILES[1], "random_state")],
)  # fmt: skip
def test_a_flipped_bit_is_found_by_one_process_and_known_to_all(pool, four, tmp_path, file, name):
    for step in ("step-00000000", "step-00000001"):
        shutil.copytree(four / "step-00000000", tmp_path / step)
    reseal(tmp_path / "step-00000001", lambda run: run.update(step=1))
    flip_byte(tmp_path / "step-00000001" / file, tensor_place(tmp_path / "step-00000001" / file, name) + 2, 1)
    results = pool.run(resumes, 4, "maverick", {}, tmp_path)
    for rank, (raised, step, warned) in enumerate(results):
        assert raised.startswith("CorruptCheckpoint") and f"{file}: tensor {name} does not match its hash" in raised
        assert step == 0 and len(warned) == (2 if rank == 0 else 0)
        assert rank or f"tensor {name}" in warned[0] and "another layout" in warned[1]


@pytest.mark.parametrize("layout", [dict(tp=2, ep=2), dict(dp_replicate=2), dict(pp=2)], ids=str)
def test_a_stage_starts_from_a_checkpoint_part_by_part(pool, one, layout):
    assert pool.run(starts_from, 4, layout, one / "maverick" / "step-00000000") == [([], [])] * 4


@pytest.mark.parametrize("layout", [{}, dict(pp=2)], ids=str)
def test_a_damaged_start_is_known_to_all(pool, one, tmp_path, layout):
    """One process verifies the tensor, before any waits for it; of a stage all then take the checkpoint before."""
    for step in ("step-00000000", "step-00000001"):
        shutil.copytree(one / "maverick" / "step-00000000", tmp_path / step)
    path, name = tmp_path / "step-00000001" / FILES[0], "layers.3.moe.experts.w2"
    flip_byte(path, tensor_place(path, name) + 2, 1)
    for said, _ in pool.run(starts_from, 4, layout, tmp_path / "step-00000001", timeout=20.0):
        assert f"tensor {name} does not match its hash" in said
    for wrong, warned in pool.run(starts_from, 4, layout, tmp_path):
        assert wrong == [] and f"tensor {name}" in warned[0] and "trying the checkpoint before" in warned[0]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("who", "how", "said"), [(2, "disk", "No space left"), (0, "disk", "No space left"),
                                                  (1, "silent", "process 1 was not heard of for 3 s")])  # fmt: skip
def test_one_process_fails_and_all_say_why(pool, tmp_path, who, how, said, asynchronous):
    results = pool.run(fails, 3, "scout", {}, tmp_path, who, how, asynchronous)
    for error, left in results:
        assert "can't write checkpoint" in error and "step-00000002" in error and said in error
        assert left == ["step-00000001"], "nothing half-written, and the one before is there"
    for step in (1, 3):
        run = read_run(tmp_path / f"step-0000000{step}")
        for file, kind in zip(FILES, ("hashes", "training_hashes"), strict=True):
            tensors = load_file(tmp_path / f"step-0000000{step}" / file)
            assert {name: tensor_hash(tensor) for name, tensor in tensors.items()} == run[kind]


def job(stage, asynchronous: bool, killed: bool) -> list[tuple[int, str, float]]:
    """Two processes that are nobody's: (exit code, stderr, seconds after the first exit) of each."""
    stage.parent.mkdir(exist_ok=True)
    port, started, ended = free_port(), [], {}
    for rank in range(2):
        errors = stage.with_name(f"errors-{killed}-{rank}")
        process = forks().Process(target=run_in_a_job, args=(rank, port, str(errors), str(stage), asynchronous, killed))
        process.start()
        started.append((process, errors))
    while len(ended) < 2:
        for rank, (process, _) in enumerate(started):
            process.join(0.05)
            if process.exitcode is not None:
                ended.setdefault(rank, time.monotonic())
    first = min(ended.values())
    return [(process.exitcode, errors.read_text(), ended[rank] - first)
            for rank, (process, errors) in enumerate(started)]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_process_killed_in_a_checkpoint_leaves_the_one_before(pool, tmp_path, asynchronous):
    (code, said, late), (died, _, _) = job(tmp_path / "run", asynchronous, True)
    assert died == -signal.SIGKILL and code == 1 and late < 10, said
    assert asynchronous or "process 1 was not heard of for 3 s" in said
    whole = [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")]
    assert whole == ["step-00000001"]
    assert [code for code, _, _ in job(tmp_path / "run", asynchronous, False)] == [0, 0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"], "swept, and finished"
    pool.run(train_on, 2, "scout", {}, tmp_path / "straight", 3)
    for file in FILES:
        one, other = (tmp_path / name / "step-00000003" / file for name in ("run", "straight"))
        assert one.read_bytes() == other.read_bytes()


def packed(count: int) -> PackedRows:
    tokens = np.arange(count * 8, dtype=np.int32).reshape(count, 8)
    return PackedRows(tokens, np.zeros_like(tokens), np.ones(tokens.shape, bool), [[]] * count, count)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_order_of_the_data_is_that_of_one_process(data):
    """However often and on however many processes a run goes on: together they read the rows that one would."""
    batch_rows = data.draw(st.integers(1, 24))
    steps = data.draw(st.integers(1, 6))
    counts = [n for n in range(1, batch_rows + 1) if batch_rows % n == 0]
    sources = {"a": packed(40), "b": packed(33)}
    mixture = Mixture({"a": 2, "b": 1}, {name: len(rows) for name, rows in sources.items()}, seed=5)
    whole = Batches(sources, mixture, None, batch_rows, prefetch=0)
    for step in range(steps):
        of = data.draw(st.sampled_from(counts))
        parts = [Batches(sources, mixture, None, batch_rows, prefetch=0, part=(i, of))(step) for i in range(of)]
        expected = whole(step)
        assert sum((part.row_index for part in parts), ()) == expected.row_index
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), expected.tokens_BT)
        assert sum((part.row_sources for part in parts), ()) == expected.row_sources
