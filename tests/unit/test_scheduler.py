"""The scheduler alone: rows without holes, pages without leaks, slices within chunks and budgets, nobody starves."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.pages import Pages
from puna.engine.prefix import PrefixCache, chain
from puna.engine.scheduler import MIN_SLICE, Scheduler


class Job:
    """A prompt, and an answer that is made up as it comes; its key is the content itself."""

    def __init__(self, name, prompt, limit=0, chunk=8):
        self.name, self.tokens, self.prompt, self.limit, self.chunk = name, list(prompt), len(prompt), limit, chunk
        self.target = self.fed = self.cached = self.preemptions = self.arrival = 0
        self.row, self.pages = -1, []

    @property
    def known(self):
        return len(self.tokens)

    def key(self, chunk):
        return tuple(self.tokens[: (chunk + 1) * self.chunk])


class Machine:
    """What an engine does, without a model: a row holds its chunk's tokens, a page its tokens, written where told."""

    def __init__(self, rows, chunk, budget, page, total, capacity):
        self.chunk = chunk
        self.pages = Pages(page, total)
        self.prefix = PrefixCache(self.pages, capacity)
        self.scheduler = Scheduler(rows, chunk, budget, self.prefix, self)
        self.rows, self.stored, self.let_in = [[] for _ in range(rows)], {}, []

    def move(self, source, target, tokens):
        self.rows[target] = self.rows[source][:tokens]

    def swap(self, a, b, tokens):
        self.rows[a], self.rows[b] = self.rows[b][:tokens], self.rows[a][:tokens]

    def feed(self, job, n):
        """The next n tokens go through the model: they must find all before them where the scheduler says."""
        begin, size = job.fed // self.chunk * self.chunk, self.pages.size
        assert self.rows[job.row][: job.fed - begin] == job.tokens[begin : job.fed]
        stored = [token for page in job.pages for token in self.stored.get(page, [None] * size)]
        assert stored[: job.fed] == job.tokens[: job.fed]
        self.rows[job.row] = job.tokens[begin : job.fed + n]
        for at in range(job.fed, job.fed + n):
            page = job.pages[at // size]
            assert self.pages.owners[page] == 1, "who writes into a page is alone in it"
            self.stored[page] = [*self.stored.get(page, [])[: at % size], job.tokens[at], *[None] * (size - 1)][:size]
        self.scheduler.advance(job, n)

    def check(self):
        scheduler, jobs = self.scheduler, self.scheduler.active
        assert [job.row for job in jobs] == list(range(len(jobs)))
        assert all(job.fed >= job.target for job in jobs[: scheduler.decoding])
        assert all(job.fed < job.target for job in jobs[scheduler.decoding :])
        assert all(job.row == -1 and not job.pages and not job.fed for job in scheduler.waiting)
        order = [job.arrival for job in scheduler.waiting]
        assert order == sorted(order) and (not order or all(job.arrival < order[0] for job in jobs))
        owners = [0] * len(self.pages.owners)
        for pages in [*(job.pages for job in jobs), *self.prefix.entries.values()]:
            for page in pages:
                owners[page] += 1
        assert owners == self.pages.owners and self.pages.free == self.pages.total - sum(n > 0 for n in owners)
        assert self.prefix.held == sum(map(len, self.prefix.entries.values())) <= self.prefix.capacity

    def step(self, budget):
        """One step of an engine. Returns who finished."""
        scheduler = self.scheduler
        decoding = list(scheduler.active[: scheduler.decoding])
        fed = {job: job.fed for job in decoding}
        for job in scheduler.admit():
            assert job.fed < job.target == job.known
            self.let_in += [job.arrival] if not job.preemptions else []
        self.check()
        group = scheduler.prefill()
        filling = scheduler.active[scheduler.decoding :]
        assert bool(group) == bool(filling)
        if group:
            assert min(filling, key=lambda job: job.arrival) in group and len({job.fed for job in group}) == 1
            assert [job.row for job in group] == sorted(job.row for job in group)
            lengths = [scheduler.slice_length(job) for job in group]
            assert len(group) * max(lengths) <= budget or len(group) == 1
            for job, n in zip(group, lengths, strict=True):
                assert 1 <= n <= budget and job.fed // self.chunk == (job.fed + n - 1) // self.chunk
                self.feed(job, n)
                if job.fed == job.target:
                    job.tokens.append(len(job.tokens) % 3)
        self.check()
        for job in scheduler.decode():
            self.feed(job, 1)
            job.tokens.append(len(job.tokens) % 3)
        self.check()
        assert all(job.fed == fed[job] + 1 or job.row == -1 for job in decoding), "an answer stood still"
        done = [job for job in scheduler.active[: scheduler.decoding] if job.known >= job.prompt + job.limit]
        for job in done:
            scheduler.remove(job)
        return done


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(1, 6), page=st.sampled_from([2, 8]),
    budget=st.sampled_from([1, 5, 100]), scarce=st.booleans(), capacity=st.sampled_from([0, 3, 30]),
)  # fmt: skip
def test_random_life(seed, rows, page, budget, scarce, capacity):
    """Prompts with common beginnings, answers, aborts, few pages: nothing is lost, leaks, or waits for ever."""
    dice, chunk, longest = random.Random(seed), 8, 40
    machine = Machine(rows, chunk, budget, page, longest // page + (0 if scarce else 1000), capacity)
    beginnings = [[dice.randint(0, 9) for _ in range(24)] for _ in range(2)]
    jobs = []
    for name in range(12):
        prompt = dice.choice(beginnings)[: dice.randint(0, 24)] + [dice.randint(0, 9)]
        jobs.append(Job(name, prompt, dice.randint(1, longest - len(prompt))))
    todo, left, steps = list(jobs), set(jobs), 0
    while left:
        while todo and dice.random() < 0.3:
            machine.scheduler.add(todo.pop(0))
        left -= set(machine.step(budget))
        for job in [*machine.scheduler.active, *machine.scheduler.waiting]:
            if dice.random() < 0.01:
                machine.scheduler.remove(job)
                left.discard(job)
        machine.check()
        steps += 1
        assert steps < 20_000, "no end in sight"
    assert machine.let_in == sorted(machine.let_in), "first come, first served"
    assert not len(machine.scheduler) and machine.pages.free == machine.pages.total - machine.prefix.held
    machine.prefix.clear()
    assert machine.pages.free == machine.pages.total and machine.pages.owners == []
    assert scarce or not machine.scheduler.preemptions
    assert all(job.cached % chunk == 0 and job.cached < job.prompt for job in jobs)


def run(machine, jobs, steps=1000):
    """Steps until all are done; they must get there."""
    left = set(jobs)
    for _ in range(steps):
        left -= set(machine.step(100))
        if not left:
            return
    raise AssertionError(f"{len(left)} are not done")


def test_the_youngest_is_preempted_and_goes_on():
    """Two answers that fit together at first: the younger one gives way once, and both get all their tokens."""
    machine = Machine(2, 8, 100, 2, 12, 0)
    old, young = Job("old", range(6), 16), Job("young", range(5), 9)
    machine.scheduler.add(old)
    machine.scheduler.add(young)
    run(machine, [old, young])
    assert (old.preemptions, young.preemptions) == (0, machine.scheduler.preemptions) and young.preemptions > 0
    assert (old.known, young.known) == (22, 14) and machine.pages.free == 12


def test_n_answers_of_one_prompt_compute_it_once():
    """Three with the same 20 tokens: one computes two chunks, the others wait and take them, and compute the rest."""
    machine = Machine(3, 8, 100, 4, 100, 100)
    jobs = [Job(name, range(20), 4) for name in range(3)]
    for job in jobs:
        machine.scheduler.add(job)
    machine.scheduler.admit()
    assert [job.name for job in machine.scheduler.prefill()] == [0]
    run(machine, jobs)
    assert [job.cached for job in jobs] == [0, 16, 16] and machine.scheduler.prefix_tokens == 32
    assert machine.scheduler.prefix_hits == 2


def test_answers_enter_the_prefix_cache():
    """The next turn finds the first one's answer, up to the last border."""
    machine = Machine(1, 8, 100, 8, 100, 100)
    first = Job("first", range(10), 10)
    machine.scheduler.add(first)
    run(machine, [first])
    second = Job("second", [*first.tokens, 1, 2, 3], 1)
    machine.scheduler.add(second)
    run(machine, [second])
    assert second.cached == 16


def test_a_full_prefix_cache_forgets_the_ends_of_the_oldest():
    machine = Machine(1, 8, 100, 8, 100, 4)
    prefix = machine.prefix
    a, b = Job("a", [1] * 25, 1), Job("b", [2] * 17, 1)
    for job in (a, b):
        machine.scheduler.add(job)
        run(machine, [job])
    assert {(1,) * 8, (2,) * 8, (2,) * 16} <= set(prefix.entries)
    assert (1,) * 24 not in prefix.entries, "the end of the oldest chain goes first"
    used = Job("used", [1] * 9, 5)
    machine.scheduler.add(used)
    machine.step(100)
    assert used.cached == 8 and prefix.drop(100) > 0 and list(prefix.entries) == [(1,) * 8], "what is used stays"


def test_keys_are_of_the_whole_content():
    root = chain(b"", b"alice")
    keys = {chain(root, b"12345678"), chain(chain(b"", b"bob"), b"12345678"), chain(root, b"12345679"),
            chain(root, b"12345678", [b"a" * 16]), chain(root, b"12345678", [b"b" * 16])}  # fmt: skip
    assert len(keys) == 5 and chain(root, b"12345678") in keys


def test_slices_get_smaller_far_into_a_long_prompt_if_answers_wait():
    machine = Machine(2, 8192, 2048, 8192, 10_000, 0)
    scheduler, job, answer = machine.scheduler, Job("long", []), Job("answer", [1], 9, 8192)
    job.target, sizes = 10**7, []
    places = (0, 8192, 10**5 // 8192 * 8192, 10**6, 9 * 10**6)
    for job.fed in places:
        sizes.append(scheduler.slice_length(job))
    assert sizes == [2048] * 5, "nobody waits: as large as may be"
    scheduler.add(answer)
    machine.step(2048)
    sizes = []
    for job.fed in places:
        sizes.append(scheduler.slice_length(job))
    assert sizes[:2] == [2048, 1024] and sizes == sorted(sizes, reverse=True) and sizes[-1] == MIN_SLICE


def test_short_and_long_slices_do_not_share_a_pass():
    machine = Machine(4, 64, 1000, 64, 100, 0)
    for name, length in (("a", 40), ("b", 5), ("c", 60), ("d", 21)):
        machine.scheduler.add(Job(name, range(length), 1, 64))
    machine.scheduler.admit()
    assert [job.name for job in machine.scheduler.prefill()] == ["a", "c", "d"]


def test_the_lowest_pages_come_first():
    pages = Pages(4, 10)
    a, b = pages.take(3), pages.take(5)
    assert (a, b) == ([0, 1, 2], [3, 4, 5, 6, 7]) and pages.take(3) is None and pages.free == 2
    pages.share([1])
    pages.give(a)
    assert pages.free == 4 and pages.take(3) == [0, 2, 8]
    pages.give(b)
    pages.give([8])
    assert pages.owners == [1, 1, 1], "free pages at the end are no storage"


@pytest.mark.parametrize("total", [1, 7, 30])
def test_every_page_is_given_out_once(total):
    dice, pages, held = random.Random(total), Pages(1, total), []
    for _ in range(500):
        if held and dice.random() < 0.5:
            pages.give(held.pop(dice.randrange(len(held))))
        elif (got := pages.take(n := dice.randint(1, 5))) is not None:
            assert len(got) == n
            held.append(got)
        else:
            assert n > pages.free
        flat = [page for pages_ in held for page in pages_]
        assert len(flat) == len(set(flat)) == total - pages.free and all(0 <= page < total for page in flat)
