"""The scheduler alone: rows without holes, decoding rows first, slices within chunks and budgets, nobody starves."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.scheduler import MIN_SLICE, Scheduler


class Job:
    def __init__(self, name, length):
        self.name, self.length, self.fed, self.row, self.arrival = name, length, 0, -1, 0


def check(scheduler, stored):
    """The invariant, and that a cache which obeyed all moves holds every job where the scheduler thinks it is."""
    for row, job in enumerate(scheduler.active):
        assert job.row == row and stored[row] == job.name
    for job in scheduler.active[: scheduler.decoding]:
        assert job.fed == job.length
    for job in scheduler.active[scheduler.decoding :]:
        assert job.fed < job.length


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([8, 32]), st.sampled_from([1, 20, 100]))
def test_random_life(seed, rows, chunk, budget):
    dice = random.Random(seed)
    scheduler, stored, waited = Scheduler(rows, chunk, budget), [None] * rows, {}
    for name in range(25):
        scheduler.add(Job(name, dice.randint(1, 3 * chunk)))
    while len(scheduler):
        for job in scheduler.admit():
            stored[job.row] = job.name
        check(scheduler, stored)
        group = scheduler.prefill()
        assert bool(group) == (scheduler.decoding < len(scheduler.active))
        if group:
            oldest = min(scheduler.active[scheduler.decoding :], key=lambda job: job.arrival)
            lengths = [scheduler.slice_length(job) for job in group]
            assert oldest in group and {job.fed for job in group} == {oldest.fed}
            assert [job.row for job in group] == sorted(job.row for job in group)
            assert len(group) * max(lengths) <= budget or len(group) == 1
            for job, n in zip(group, lengths, strict=True):
                assert 1 <= n <= budget and job.fed // chunk == (job.fed + n - 1) // chunk
                job.fed += n
            for job in group:
                if job.fed == job.length and (swap := scheduler.promote(job)):
                    a, b = swap
                    stored[a], stored[b] = stored[b], stored[a]
        check(scheduler, stored)
        leaving = [job for job in [*scheduler.active, *scheduler.waiting] if dice.random() < 0.15]
        for job in leaving:
            for source, target in scheduler.remove(job):
                stored[target] = stored[source]
            check(scheduler, stored)
        waited = {job.name for job in scheduler.waiting}
        assert not waited or len(scheduler.active) + len(leaving) >= rows


def test_slices_get_smaller_far_into_a_long_prompt():
    scheduler = Scheduler(1, 8192, 2048)
    job = Job("long", 10**7)
    sizes = []
    for job.fed in (0, 8192, 10**5, 10**6 + 1, 9 * 10**6):
        sizes.append(scheduler.slice_length(job))
    assert sizes[:2] == [2048, 2048] and sizes == sorted(sizes, reverse=True) and sizes[-1] == MIN_SLICE


def test_short_and_long_slices_do_not_share_a_pass():
    scheduler = Scheduler(4, 64, 1000)
    for name, length in (("a", 40), ("b", 5), ("c", 60), ("d", 21)):
        scheduler.add(Job(name, length))
    scheduler.admit()
    assert [job.name for job in scheduler.prefill()] == ["a", "c", "d"]
