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

LINUX = platform.libc_ver()[0] == "glibc" and sys.platform == "linux"
HELD = """
import sys, torch
from puna.train import memory
torch.set_num_threads(1)
def pages(field):
    return int(open("/proc/self/statm").read().split()[field])  # 0: mapped, 1: resident; of 4 KiB here
"""
FREED = (
    HELD
    + """
if sys.argv[1] == "keep":
    assert memory.keep_freed_memory() is True
def touch():
    parts = [torch.empty(1 << 20).fill_(1.0) for _ in range(8)]  # 8 x 4 MiB
    return pages(0), pages(1)
before = pages(0)
touch()
between, (mapped, resident) = pages(0), touch()
print(between - before, mapped - between, resident - pages(1))
"""
)
MIB = 256  # pages


def run(script, mode):
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(n) for n in done.stdout.split()]


@pytest.mark.skipif(not LINUX, reason="the setting is glibc's, the figures are Linux's")
def test_memory_that_was_freed_stays_mapped_and_is_used_again():
    """So that no page of it faults again. (Counting faults themselves tells what the kernel maps at once.)"""
    held, mapped_again, given_back = run(FREED, "keep")
    assert held > 24 * MIB and mapped_again < 8 * MIB and given_back < 8 * MIB
    held, mapped_again, _ = run(FREED, "leave")  # the last: glibc learns to keep some
    assert held < 8 * MIB and mapped_again > 24 * MIB


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


GROWN = (
    HELD
    + """
assert memory.keep_freed_memory()
if sys.argv[1] == "grow":
    assert memory.grow_heap(64 << 20) is True
    before = pages(1)
    assert memory.grow_heap(32 << 20) is True  # there already
    assert pages(1) - before < 256
before = pages(1)
assert float(torch.empty(8 << 20).fill_(1.0)[-1]) == 1  # 32 MiB
print(pages(1) - before)
"""
)


@pytest.mark.skipif(not LINUX, reason="the setting is glibc's, the figures are Linux's")
def test_a_heap_grown_beforehand_is_resident_before_it_is_used():
    """So its faults are behind it."""
    assert run(GROWN, "grow")[0] < 4 * MIB
    assert run(GROWN, "leave")[0] > 24 * MIB


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
