"""The pipeline's order of work and the split of the blocks, without processes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.parallel.pipeline import schedule, split_layers

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))  # pp, chunks, groups


def simulate(pp, chunks, micro, forward=1.0, backward=2.0):
    """(time, most activations waiting by process), with messages between neighbours in the order they were sent."""
    orders = [schedule(i, pp, chunks, micro) for i in range(pp)]
    ends, clock, at, most, waiting = {}, [0.0] * pp, [0] * pp, [0] * pp, [0] * pp
    stages = pp * chunks
    while any(at[i] < len(orders[i]) for i in range(pp)):
        moved = False
        for i in range(pp):
            if at[i] == len(orders[i]):
                continue
            work = orders[i][at[i]]
            stage = work.chunk * pp + i
            need = []
            if work.forward and stage:
                need = [(True, work.micro, stage - 1)]
            if not work.forward:
                need = [(True, work.micro, stage)] + ([(False, work.micro, stage + 1)] if stage + 1 < stages else [])
            if any(n not in ends for n in need):
                continue
            clock[i] = max([clock[i], *(ends[n] for n in need)]) + (forward if work.forward else backward) / chunks
            ends[work.forward, work.micro, stage] = clock[i]
            waiting[i] += 1 if work.forward else -1
            most[i] = max(most[i], waiting[i])
            at[i] += 1
            moved = True
        assert moved, "nobody can go on"
    return max(clock), most


@settings(max_examples=150, deadline=None)
@given(SHAPES)
def test_every_work_once_and_nobody_waits_forever(shape):
    pp, chunks, groups = shape
    micro = groups * pp
    time, most = simulate(pp, chunks, micro)
    for i in range(pp):
        works = schedule(i, pp, chunks, micro)
        assert len(works) == len(set(works)) == 2 * micro * chunks
        bound = pp - i if chunks == 1 else 2 * (pp - i) + (chunks - 1) * pp
        assert most[i] <= min(bound, micro * chunks)
    assert time >= micro * 3.0 - 1e-9


@pytest.mark.parametrize("pp, chunks, micro", [(4, 1, 8), (2, 1, 3), (4, 2, 8), (2, 4, 4), (3, 2, 6)])
def test_idle_time_is_the_formula(pp, chunks, micro):
    time, _ = simulate(pp, chunks, micro)
    assert time == pytest.approx(3.0 * (micro + (pp - 1) / chunks))


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_messages_meet_in_order(shape):
    """What one process sends another of one kind, in order, is what that one expects, in order."""
    pp, chunks, groups = shape
    stages = pp * chunks
    for forward in (True, False):
        for i in range(pp):
            to = (i + (1 if forward else -1)) % pp
            step = 1 if forward else -1
            works = [[w for w in schedule(r, pp, chunks, groups * pp) if w.forward == forward] for r in (i, to)]
            sent, taken = ([(w.micro, w.chunk * pp + r) for w in some] for r, some in zip((i, to), works, strict=True))
            sent = [(m, s + step) for m, s in sent if s != (stages - 1 if forward else 0)]
            assert sent == [(m, s) for m, s in taken if s != (0 if forward else stages - 1)]


def test_micro_batches_of_an_interleaved_pipeline_come_in_groups():
    with pytest.raises(PunaError, match="accumulate 5 must be a multiple of parallel.pp 2"):
        schedule(0, 2, 2, 5)


def test_blocks_are_split_evenly_and_the_ends_get_fewer():
    assert split_layers(48, 4, 1) == [range(0, 12), range(12, 24), range(24, 36), range(36, 48)]
    assert [len(r) for r in split_layers(10, 4, 1)] == [2, 3, 3, 2]
    found = split_layers(7, 2, 2)
    assert [i for r in found for i in r] == list(range(7)) and len(found[-1]) == 1
    with pytest.raises(PunaError, match="exceeds model.n_layers 3"):
        split_layers(3, 2, 2)
