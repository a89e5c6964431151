"""Whatever ends a run before its time, the same command goes on and ends in bitwise equal weights.

Real command lines in processes of their own, on a model of 50 thousand parameters with pictures, experts and a balance
bias. The measure is one life that nothing disturbed.
"""

import json
import random
import signal
import time

import pytest
from lifecycle_helpers import (
    TINY,
    begin,
    checkpoints,
    differing,
    interrupt,
    losses,
    puna,
    record,
    same_course,
    wait_for,
    weights,
)

from puna import load

STAGES = {"pretrain": 36, "midtrain": 24, "sft": 24}  # steps of the recipe's stages


def test_an_undisturbed_life_learns_and_leaves_one_checkpoint_a_stage(whole):
    for stage, steps in STAGES.items():
        lines = losses(whole / stage)
        assert [line["step"] for line in lines] == list(range(steps))
        assert not any(line["skipped"] for line in lines)
        assert lines[-1]["loss"] < lines[0]["loss"], stage
        assert checkpoints(whole / stage) == [steps]
        assert record(whole / stage, steps)["finished"] is True
    assert any(line["tiles"] for line in losses(whole / "pretrain")), "no picture was read"
    first, second, third = (weights(whole / stage, steps) for stage, steps in STAGES.items())
    assert len({first["model"], second["model"], third["model"]}) == 3
    assert any(first["balance/0"]) and any(first["exp_avg/vision.projector.weight"])
    assert json.loads((whole / "report.json").read_text())["results"]


def test_sigterm_saves_says_how_to_go_on_and_the_rest_is_bitwise_the_same(whole, tmp_path):
    command, stage = ("pretrain", "tiny.py"), tmp_path / "runs" / "tiny" / "pretrain"
    process = begin(tmp_path, *command)
    wait_for(process, lambda: len(losses(stage)) >= 12)
    err = interrupt(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, err
    before = losses(stage)
    done = len(before)
    assert 12 <= done < 36
    assert f"stopped by SIGTERM after step {done - 1}; the same command goes on" in err and "Traceback" not in err
    assert checkpoints(stage)[-1] == done, "the steps since the last checkpoint were thrown away"
    assert record(stage, done)["finished"] is False
    assert (weights(stage, done)["model"] == weights(whole / "pretrain", 36)["model"]) is False

    assert "finished, step 36 of 36" in puna(tmp_path, *command)
    assert differing(stage, whole / "pretrain", 36) == []
    same_course(stage, whole / "pretrain")
    assert losses(stage)[:done] == before, "steps that were done were done again"


def test_sigkill_at_any_moment_costs_at_most_the_steps_since_the_last_checkpoint(whole, tmp_path):
    command, stage = ("pretrain", "tiny.py"), tmp_path / "runs" / "tiny" / "pretrain"
    for _ in range(2):
        process, kept = begin(tmp_path, *command), losses(stage)
        had = len(checkpoints(stage)) and checkpoints(stage)[-1]
        wait_for(process, lambda had=had: checkpoints(stage) and checkpoints(stage)[-1] > had)
        delay = random.uniform(0, 8) * losses(stage)[-1]["seconds"]  # up to eight steps
        time.sleep(delay)
        assert interrupt(process, signal.SIGKILL) is not None and process.returncode == -signal.SIGKILL
        newest = checkpoints(stage)[-1]
        print(f"killed {delay:.3f} s after a checkpoint, at step {len(losses(stage))}; newest checkpoint {newest}")
        assert had < newest < 36 and newest % 5 == 0
        assert losses(stage)[:had] == kept[:had], "steps behind a checkpoint were done again"
        assert record(stage, newest)["step"] == newest
    assert "finished, step 36 of 36" in puna(tmp_path, *command)
    assert differing(stage, whole / "pretrain", 36) == []
    same_course(stage, whole / "pretrain")
    assert checkpoints(stage) == [36] and not list(stage.glob(".step-*")), "a killed writer's files stayed"


def test_a_killed_life_goes_on_in_the_middle_of_its_stage(whole, tmp_path):
    command, run = ("raise", "tiny.py"), tmp_path / "runs" / "tiny"
    process = begin(tmp_path, *command)
    wait_for(process, lambda: len(losses(run / "midtrain")) >= 7)
    interrupt(process, signal.SIGKILL)
    assert checkpoints(run / "midtrain")[-1] < 24 and not (run / "report.json").exists()
    before = {p: p.stat().st_mtime_ns for p in run.glob("pretrain/step-00000036/*")}
    assert len(before) == 5

    puna(tmp_path, *command)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished stage was trained again"
    for stage, steps in STAGES.items():
        assert differing(run / stage, whole / stage, steps) == [], stage
        same_course(run / stage, whole / stage)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, whole)]
    for report in reports:  # all but how long it took
        assert [row["name"] for row in report["results"]][:2] == ["naming/en", "naming/en/shuffled"]
    assert reports[0]["results"] == reports[1]["results"] and reports[0]["model"] == reports[1]["model"]


def test_a_finished_life_is_only_read(whole):
    def files():
        return {p.relative_to(whole): (p.stat().st_mtime_ns, p.stat().st_size)
                for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}  # fmt: skip

    before = files()
    assert len(before) > 20
    assert "goals met" in puna(whole.parents[1], "raise", "tiny.py")
    assert files() == before
    assert "finished, step 24 of 24" in puna(whole.parents[1], "sft", "tiny.py")
    assert {p: v for p, v in files().items() if p.name != "sft.json"} == before


@pytest.fixture(scope="module")
def apart(whole, tmp_path_factory):
    """A folder in which each stage was run alone, from a model given by --init: pretrain for six steps, midtrain and
    sft as in the whole life."""
    folder = tmp_path_factory.mktemp("apart")
    model = str(whole / "pretrain")
    puna(folder, "pretrain", "tiny.py", "--name", "more", "--init", model, "--train.steps", "6", "--train.rows=8")
    puna(folder, "midtrain", "tiny.py", "--name", "long", "--init", model)
    puna(folder, "sft", "tiny.py", "--name", "tuned", "--init", "runs/long/midtrain")
    return folder / "runs"


def test_stages_alone_with_init_are_those_of_a_life(whole, apart):
    for name, stage, init in (("long", "midtrain", str(whole / "pretrain")), ("tuned", "sft", "runs/long/midtrain")):
        steps = STAGES[stage]
        assert record(apart / name / stage, steps)["config"]["init"] == init
        assert differing(apart / name / stage, whole / stage, steps) == [], stage
        same_course(apart / name / stage, whole / stage)
        assert not (apart / name / "pretrain").exists() and not (apart / name / "tokenizer").exists()


def test_pretraining_from_a_model_begins_where_it_ended(whole, apart):
    lines = losses(apart / "more" / "pretrain")
    assert [line["step"] for line in lines] == list(range(6))  # --train.steps 6
    assert max(sum(line["sources"].values()) for line in lines) == 8  # --train.rows=8
    assert lines[0]["loss"] < 5 < losses(whole / "pretrain")[0]["loss"]  # ln(400) = 5.99 is a new model's


def test_what_came_out_is_a_model_for_everything_else(apart):
    model, processor = load(apart / "tuned")
    assert not model.training and processor.image is not None
    assert model.config.vocab_size == processor.tokenizer.vocab_size == 400
    said = puna(apart.parent, "generate", "runs/tuned", "2 + 2 =", "--max-tokens", "4")
    assert isinstance(said, str)


def test_a_life_that_begins_with_the_tower_apart(tmp_path):
    seer = TINY.replace('"tiny", model', '"seer", model').replace(
        "bpb_bytes=2048,\n                   chance_chars=20_000),\n",
        "bpb_bytes=2048,\n                   chance_chars=20_000),\n"
        '        vision=stage(128, 20, {"captions": 0.7, "scenes": 0.3}, 3, rows=4),\n',
    ).replace('ITEMS = {', 'ITEMS = {"scenes": {"items": 100}, ')
    for folder in ("undisturbed", "killed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "seer.py").write_text(seer, encoding="utf-8")
    one, other = (tmp_path / folder for folder in ("undisturbed", "killed"))
    puna(one, "pretrain", "seer.py", code=1)  # it starts from the tower, which has not been trained
    puna(one, "vision", "seer.py")
    puna(one, "pretrain", "seer.py", "--train.steps", "6")
    process = begin(other, "vision", "seer.py")
    wait_for(process, lambda: len(losses(other / "runs/seer/vision")) >= 8)
    interrupt(process, signal.SIGKILL)
    puna(other, "vision", "seer.py")
    puna(other, "pretrain", "seer.py", "--train.steps", "6")
    for stage, steps in (("vision", 20), ("pretrain", 6)):
        assert differing(other / "runs/seer" / stage, one / "runs/seer" / stage, steps) == [], stage
    before, after = (weights(one / "runs/seer" / stage, steps) for stage, steps in (("vision", 20), ("pretrain", 6)))
    assert any(before["exp_avg/vision.projector.weight"]) and "exp_avg/output.weight" not in before
    assert before["model"] != after["model"]
