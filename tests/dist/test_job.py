"""Whole commands under torchrun: a stage on several processes is the stage on one; a lost process ends the job with a
word about it, and the same command goes on, with another layout too."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from dist_helpers import free_port
from lifecycle_helpers import TINY, checkpoints, losses, puna

from puna.cli.main import main

STAGE = ("--train.steps", "12", "--train.rows", "12", "--train.accumulate", "2", "--train.checkpoint_every", "3",
         "--model.n_kv_heads", "2")  # fmt: skip


def start(folder, processes, *words):
    (folder / "tiny.py").write_text(TINY, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "puna", "pretrain", "tiny.py", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(job, stage, step):
    """Until there is a checkpoint of this step."""
    deadline = time.monotonic() + 240
    while step not in checkpoints(stage):
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.py").write_text(TINY, encoding="utf-8")
    puna(folder, "pretrain", "tiny.py", *STAGE)
    return folder / "runs" / "tiny"


def command(rank, folder, port, words):
    """A command as torchrun starts it: (exit code, stderr)."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with (contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO()) as said):  # fmt: skip
        return main(words), said.getvalue()


def test_killed_and_resumed_on_other_processes_it_follows_the_run_of_one(alone, pool, tmp_path):
    stage = tmp_path / "runs" / "tiny" / "pretrain"
    job = start(tmp_path, 4, *STAGE, "--parallel.ep", "2", "--parallel.cp", "2")
    wait_for(job, stage, 3)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    begin = time.monotonic()
    said = job.communicate(timeout=90)[0]
    assert job.returncode != 0 and time.monotonic() - begin < 60
    assert re.search(r"SIGKILL|Signal 9", said) and "lost another process" in said
    job = start(tmp_path, 2, *STAGE, "--parallel.pp", "2")
    wait_for(job, stage, max(checkpoints(stage)) + 3)
    os.killpg(job.pid, signal.SIGTERM)
    job.communicate(timeout=90)
    for code, said in pool.run(command, 3, tmp_path, free_port(), ["pretrain", "tiny.py", *STAGE]):
        assert code == 0, said
    one, many = losses(alone / "pretrain"), losses(stage)
    assert [line["step"] for line in many] == list(range(12))
    for a, b in zip(one, many, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        assert (a["tokens"], a["valid"], a["sources"], a["source_tokens"], a["tiles"]) == (
            b["tokens"], b["valid"], b["sources"], b["source_tokens"], b["tiles"])  # fmt: skip


@pytest.mark.parametrize("words, message", [
    (("--parallel.tp", "3"), r"parallel: dp_replicate 1 x dp_shard 1 x cp 1 x tp 3"),
    (("--parallel.ep", "2", "--train.rows", "3", "--train.accumulate", "1"), "train.rows 3 must be a multiple of"),
    (("--parallel.cp", "2", "--data.seq_len", "64"), "parallel.cp 2: rows are cut between chunks"),
])  # fmt: skip
def test_what_does_not_fit_is_told(pool, tmp_path, words, message):
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    for code, said in pool.run(command, 2, tmp_path, free_port(), ["pretrain", "tiny.py", *words]):
        assert code == 1 and re.search("^puna: error: .*" + re.escape(message), said, re.M), said


@pytest.mark.parametrize("setting", ["tp", "ep", "pp_chunks", "dp_shard"])
def test_one_process_says_how_several_are_started(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    assert main(["pretrain", "tiny.py", f"--parallel.{setting}", "2"]) == 1
    assert "there is one process: start several with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("launched, gpu", [(True, True), (True, False), (False, True)])
def test_torchrun_on_one_gpu_makes_a_process_of_one(monkeypatch, launched, gpu):
    from puna.cli import train

    monkeypatch.delenv("RANK", raising=False)
    if launched:
        monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert train._one_gpu() == (launched and gpu)
