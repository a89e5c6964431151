"""A full disk costs nothing that was there: training, exports and every smaller file end with one line of error, leave
no halves behind, and go on when there is room again."""

import os
import shutil
from pathlib import Path

import pytest
from bad_input_helpers import CHECKPOINT, files, fill, is_mistake, small_disk


def test_a_full_disk_stops_training_and_keeps_what_was_there(puna, tmp_path):
    """Room for one checkpoint and a half: the second can't be written. With more room the same command goes on."""
    one = sum(map(len, files(CHECKPOINT).values()))
    words = ("midtrain", "tiny.py", "--train.steps", "4")
    work = Path.cwd()
    with small_disk(tmp_path / "disk"):
        shutil.copytree(work, ".", dirs_exist_ok=True)
        earlier = files(Path("runs/tiny/pretrain"))
        fill(one * 3 // 2 + 64_000)
        is_mistake(puna(*words), "midtrain/step-00000004", "No space left", "free some disk space and run again")
        kept = files(Path("runs/tiny/midtrain/step-00000002"))
        assert len(kept) == 5 and not list(Path("runs").rglob(".step-*"))
        assert not Path("runs/tiny/midtrain/step-00000004").exists()
        assert files(Path("runs/tiny/pretrain")) == earlier
        assert puna("generate", "runs/tiny/midtrain", "Hello", "--max-tokens", "2")[0] == 0
        Path("ballast").unlink()
        code, out, _ = puna(*words)
        assert code == 0 and "finished, step 4 of 4" in out


@pytest.mark.parametrize("free", [0, 4096, 20_480])
def test_a_disk_that_is_full_from_the_beginning(puna, tmp_path, free):
    """Whichever file is the first that finds no room."""
    work = Path.cwd()
    with small_disk(tmp_path / "disk"):
        shutil.copytree(work, ".", dirs_exist_ok=True)
        before = files(Path("runs/tiny/pretrain"))
        fill(free)
        for words in (("midtrain", "tiny.py"), ("raise", "tiny.py", "--name", "mine"),
                      ("tokenizer", "train", "tiny.py", "--out", "tok")):  # fmt: skip
            if free < 16_000 or words[0] != "tokenizer":
                line = is_mistake(puna(*words), "No space left")
                assert "space" in line.partition("No space left on device")[2], line
        assert files(Path("runs/tiny/pretrain")) == before
        left = [p for p in Path(".").rglob("*") if p.name.endswith(".tmp") or p.name.startswith((".step", ".config"))]
        assert not left, "half-written files stayed"


@pytest.mark.parametrize("form", ["hf", "puna"])
@pytest.mark.parametrize("free", [0, 60_000])
def test_a_full_disk_leaves_no_half_export(puna, tmp_path, form, free):
    work = Path.cwd()
    with small_disk(tmp_path / "disk"):
        shutil.copytree(work, ".", dirs_exist_ok=True)
        before = files(Path("runs"))
        fill(free)
        line = is_mistake(puna("convert", "runs/tiny", "out", "--to", form), "can't write out", "No space left")
        assert line.endswith("check the disk's space and rights")
        assert files(Path("runs")) == before and not list(Path(".").glob("*out*"))


def test_without_a_disk_of_ones_own_the_writer_refuses(puna, monkeypatch):
    """The same where nothing can be mounted."""

    def no_room(*_):
        raise OSError(28, "No space left on device")

    before = files(Path("runs/tiny"))
    monkeypatch.setattr(os, "pwrite", no_room)
    for form in ("hf", "puna"):
        is_mistake(puna("convert", "runs/tiny", "out", "--to", form), "can't write out", "No space left")
    is_mistake(puna("midtrain", "tiny.py"), "can't write checkpoint", "No space left", "free some disk space")
    assert files(Path("runs/tiny")).items() >= before.items()
    assert not list(Path(".").glob("*out*")) and not list(Path("runs/tiny/midtrain").glob("*step-*"))
