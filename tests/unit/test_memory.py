"""The allocator keeps what a step frees: the next step takes no page faults for it. Elsewhere nothing is changed."""

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from training_helpers import job

from puna.train import memory, train

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import resource, sys, torch
from puna.train.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory() is True
def touch():
    parts = [torch.empty(1 << 20).fill_(1.0) for _ in range(8)]  # 8 x 4 MiB, 8192 pages
    return sum(float(part[-1]) for part in parts)
for _ in range(2):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    assert touch() == 8
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="the setting is glibc's")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    """Pages mapped while ten times 8,192 of them are touched (fewer, if the kernel maps huge ones)."""
    kept, left = faults("keep"), faults("leave")
    print(f"{kept} page faults with freed memory kept, {left} without")
    assert kept < 8192 and kept < left / 3


@pytest.fixture
def mallopt(monkeypatch):
    """Records the options set; `answers` are what mallopt returns."""
    calls, answers = [], {}
    fake = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)) or answers.get(option, 1))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    return SimpleNamespace(calls=calls, answers=answers)


def test_where_there_is_no_glibc_nothing_is_changed(monkeypatch, mallopt):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False and mallopt.calls == []


def test_blocks_of_all_sizes_come_from_the_heap_and_stay_there(monkeypatch, mallopt):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.39"))
    assert memory.keep_freed_memory() is True
    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
    assert dict(mallopt.calls) == {-4: 0, -1: -1, -2: 2**26, -8: 1}
    mallopt.answers[-4] = 0
    assert memory.keep_freed_memory() is False, "an allocator that refuses is told"


GROWN = """
import resource, sys, torch
from puna.train import memory
torch.set_num_threads(1)
assert memory.keep_freed_memory()
if sys.argv[1] == "grow":
    assert memory.grow_heap(64 << 20) is True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert memory.grow_heap(32 << 20) is True  # there already
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 64
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert float(torch.empty(8 << 20).fill_(1.0)[-1]) == 1  # 32 MiB, 8192 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="the setting is glibc's")
def test_a_heap_grown_beforehand_has_its_faults_behind_it():
    counts = {}
    for mode in ("grow", "leave"):
        done = subprocess.run([sys.executable, "-c", GROWN, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        counts[mode] = int(done.stdout)
    assert counts["grow"] < 256 and counts["grow"] < counts["leave"] / 4, counts


def test_training_grows_the_heap_by_what_it_is_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "grow_heap", asked.append)
    train(job(tmp_path / "a", steps=1))
    train(job(tmp_path / "b", steps=1, heap_mb=3))
    assert asked == [0, 3 << 20]
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: False)
    train(job(tmp_path / "c", steps=1, heap_mb=3))
    assert len(asked) == 2, "memory that is not kept need not be grown"


def test_training_asks_for_it_once_and_trains_the_same_without(tmp_path, monkeypatch):
    asked, models = [], []
    for answer in (True, False):
        monkeypatch.setattr(memory, "keep_freed_memory", lambda answer=answer: asked.append(answer) or answer)
        models.append(train(job(tmp_path / str(answer), steps=2)))
    assert asked == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
