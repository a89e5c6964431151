"""Trackers follow metrics.jsonl: every number once, resumed or not; they can stop a run from beginning, never from
going on. The three real ones are read back where they are installed (extra `track`)."""

import json
import warnings

import pytest
import torch
from test_loop import Crash, crash, lines, until
from training_helpers import changed, job, values

from puna.cli.main import main
from puna.errors import PunaError
from puna.train import Evaluation, trackers, train


@pytest.fixture
def told(monkeypatch):
    """What a tracker of the test's own was told: [(step, numbers)] by id of its opening."""
    calls, monkey = [], {}

    def opened(folder, title, id, config):
        calls.append([])
        monkey["title"], monkey["id"] = title, id

        def log(step, numbers):
            if monkey.get("fails") == len(calls[-1]):
                raise ConnectionError("no route to host")
            calls[-1].append((step, numbers))

        return log, lambda: monkey.setdefault("closed", True)

    monkeypatch.setattr(trackers, "MODULES", {"own": "json"})
    monkeypatch.setattr(trackers, "OPEN", {"own": opened})
    return calls, monkey


EVALUATIONS = (Evaluation("bpb", 3, lambda model: {"bpb/en": 3.0, "answers": [{"text": "hello"}]}),)


def test_numbers_are_flat_finite_and_nothing_else():
    line = {"step": 3, "loss": None, "skipped": False, "lr": 0.5, "eval": "bpb", "sources": {"text/en": 2},
            "router/layers": {"dead": [0.0, 0.5]}, "answers": [{"text": "x"}], "bad": float("nan")}  # fmt: skip
    assert dict(trackers.numbers(line)) == {
        "step": 3, "skipped": 0, "lr": 0.5, "sources/text/en": 2, "router/layers/dead/0": 0,
        "router/layers/dead/1": 0.5,
    }  # fmt: skip


def test_every_line_is_told_once_though_the_run_was_killed(tmp_path, told):
    calls, state = told
    plain = values(train(job(tmp_path / "plain", evaluations=EVALUATIONS)))
    with pytest.raises(Crash):
        train(job(tmp_path / "run", track=("own",), source=until(5, crash), evaluations=EVALUATIONS))
    first_id = state["id"]
    assert not changed(plain, values(train(job(tmp_path / "run", track=("own",), evaluations=EVALUATIONS))))
    assert state["id"] == first_id and state["closed"] and len(calls) == 2
    assert [step for step, _ in calls[0]] == [0, 1, 2, 3, 3, 4]  # the checkpoint is of step 4: 4 is done again
    assert [step for step, _ in calls[1]] == [5, 6, 6, 7, 8], "step 4 was told twice"
    told_losses = [numbers["loss"] for call in calls for _, numbers in call if "loss" in numbers]
    assert told_losses == [line["loss"] for line in lines(tmp_path / "run")]
    assert any(name.startswith("grad/") for name in calls[0][0][1]) and "router/layers/entropy/1" in calls[0][0][1]
    assert calls[0][3] == (3, {"bpb/en": 3.0})
    assert state["title"] == f"{tmp_path.name}/{job(tmp_path).name}"


def test_asked_for_in_the_middle_it_is_told_the_past(tmp_path, told):
    calls, _ = told
    with pytest.raises(Crash):
        train(job(tmp_path / "run", source=until(5, crash)))
    train(job(tmp_path / "run", track=("own",)))
    assert [step for step, _ in calls[0]] == list(range(8))


def test_a_failure_is_warned_of_once_and_costs_nothing(tmp_path, told):
    calls, state = told
    state["fails"] = 3
    with pytest.warns(UserWarning, match="own failed .no route to host.*metrics.jsonl has all") as caught:
        weights = values(train(job(tmp_path / "run", track=("own",))))
    assert len([w for w in caught if "own failed" in str(w.message)]) == 1 and len(calls[0]) == 3
    assert len(lines(tmp_path / "run")) == 8 and not changed(weights, values(train(job(tmp_path / "plain"))))


def test_what_cannot_begin_stops_the_run_before_its_first_step(tmp_path, monkeypatch, told):
    def refused(*_):
        raise RuntimeError("no login")

    monkeypatch.setitem(trackers.OPEN, "own", refused)
    asked = []
    with pytest.raises(PunaError, match="--track own can't begin: no login; mend that, or leave it out"):
        train(job(tmp_path / "run", track=("own",), source=asked.append))
    assert not asked and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_damaged_note_of_what_was_told_is_an_error_not_a_second_telling(tmp_path, told):
    with pytest.raises(Crash):
        train(job(tmp_path / "run", track=("own",), source=until(5, crash)))
    (tmp_path / "run" / ".track-own").write_text("{")
    with pytest.raises(PunaError, match=r"\.track-own can't be read .*: remove it"):
        train(job(tmp_path / "run", track=("own",)))
    (tmp_path / "run" / ".track-own").unlink()
    train(job(tmp_path / "run", track=("own",)))
    assert [step for step, _ in told[0][-1]] == list(range(8))


def test_unknown_and_missing_trackers_are_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(PunaError, match="unknown tracker 'wandbb'"):
        trackers.check(("wandbb",))
    monkeypatch.setitem(trackers.MODULES, "trackio", "no_such_module_as_this")
    monkeypatch.chdir(tmp_path)
    assert main(["raise", "nano_scout", "--track", "trackio"]) == 1
    assert "--track trackio can't be used" in (err := capsys.readouterr().err) and "pip install 'puna[track]'" in err
    assert not (tmp_path / "runs").exists(), "something was begun"


def interrupted(folder, name):
    """A job tracked by `name`, killed and resumed; returns the lines of its metrics with a loss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves
        with pytest.raises(Crash):
            train(job(folder, track=(name,), source=until(5, crash), evaluations=EVALUATIONS))
        train(job(folder, track=(name,), evaluations=EVALUATIONS))
    assert not json.loads((folder / f".track-{name}").read_text())["sent"] < 8
    return lines(folder)


def test_tensorboard_files_hold_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = interrupted(tmp_path / "run", "tensorboard")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2  # a file each time it was opened
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == list(range(8))
    losses = torch.tensor([event.value for event in read.Scalars("loss")])
    assert torch.equal(losses, torch.tensor([line["loss"] for line in written]))
    assert [event.step for event in read.Scalars("bpb/en")] == [3, 6, 8]
    assert {"grad/experts", "router/layers/entropy/0", "router/entropy", "sources/text"} <= set(read.Tags()["scalars"])


def test_trackio_holds_every_step_once(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (utils, __import__("trackio.sqlite_storage", fromlist=["x"])):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db", raising=False)
    written = interrupted(tmp_path / "run", "trackio")
    runs = list(trackio.Api().runs("puna"))
    assert len(runs) == 1 and runs[0].name.startswith(f"{tmp_path.name}/")
    logs = [each for each in SQLiteStorage.get_logs("puna", runs[0].name) if "loss" in each]
    assert [each["step"] for each in logs] == list(range(8))
    assert [each["loss"] for each in logs] == [line["loss"] for line in written]


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format, 32 KiB blocks of (crc, length, type) and data, behind a
    header of 7 bytes. Types: 1 whole, 2 first, 3 middle, 4 last."""
    data, at, held = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def test_wandb_offline_holds_every_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    written = interrupted(tmp_path / "run", "wandb")
    found, ids = [], set()
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime_ns):
        for data in wandb_records(file):
            entry = Record.FromString(data)
            if entry.HasField("run"):
                ids.add(entry.run.run_id)
            if entry.HasField("history"):
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in entry.history.item}
                found += [(items["step"], items["loss"])] if "loss" in items else []
    assert len(ids) == 1, "a resumed run is another one"
    assert found == [(line["step"], line["loss"]) for line in written]
