"""A tiny trained run, a command line that reports what became of it, and a disk that can be filled."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from puna.cli.main import main

TINY = """
from puna.data import DataConfig
from puna.model import ModelConfig, VisionConfig
from puna.stages import RunConfig, StageConfig, TokenizerConfig
from puna.train import TrainConfig


def recipe():
    eye = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=64, adapter_width=16)
    model = ModelConfig(vocab_size=400, d_model=32, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=16, expert_width=32,
                        dense_width=32, n_experts=2, chunk=64, max_context=256, vision=eye)
    train = TrainConfig(steps=2, rows=2, warmup=1, checkpoint_every=2, eval_every=4, threads=1, compute_dtype="float32")
    data = DataConfig(64, {"sft/addition": 1.0}, options={"sft/addition": {"items": 64}})
    stage = StageConfig(data, train)
    return RunConfig("tiny", model, TokenizerConfig(400, chars=3000, code_chars=3000), stage, stage, stage)
"""
CHECKPOINT = Path("runs/tiny/pretrain/step-00000002")


def quick(patch: pytest.MonkeyPatch) -> None:
    """Stages without evaluations and without checking the nursery's hashes."""
    from puna import nursery
    from puna.stages import common

    patch.setattr(nursery, "verify", lambda: 0)
    patch.setattr(common, "bpb_evaluation", lambda *_, **__: lambda model: {"bpb/en": 3.0})


def make_trained(folder: Path) -> Path:
    """Fills a folder with the recipe tiny.py, its finished pre-training in runs/tiny and an export of it in hf."""
    (folder / "tiny.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)
        quick(patch)
        assert main(["pretrain", "tiny.py"]) == 0 and main(["convert", "runs/tiny", "hf", "--to", "hf"]) == 0
    return folder


def command_line(capsys, monkeypatch):
    """puna(*words) -> (exit code, stdout, stderr). What is no PunaError is raised, and so fails a test."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    quick(monkeypatch)

    def puna(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return puna


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but not the lock, which names the process that held it last."""
    found = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def is_mistake(result: tuple[int, str, str], *named: str) -> str:
    """Exit code 1 and one line of error at the end of stderr, which holds all of `named`; returns the line."""
    code, _, err = result
    lines = err.splitlines()
    assert code == 1 and "Traceback" not in err, err
    assert [line for line in lines if line.startswith("puna: error: ")] == lines[-1:], err
    for word in named:
        assert word in lines[-1], lines[-1]
    return lines[-1]


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "16m"):
    """A file system of its own in `folder` for the block; skips the test where it can't be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "puna-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    before = Path.cwd()
    try:
        os.chdir(folder)
        yield folder
    finally:
        os.chdir(before)
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def fill(free: int, ballast: Path = Path("ballast")) -> None:
    """Leaves `free` bytes of the file system of the working folder; removing `ballast` gives the rest back."""
    room = os.statvfs(".")
    ballast.write_bytes(b"x" * (room.f_bavail * room.f_frsize - free))
