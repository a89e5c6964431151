"""Who runs next: continuous batching as plain bookkeeping (no tensors here, so it can be tested by itself).

A sequence waits, is *filled* (its prompt goes through the model, slice by slice) and then *decodes* one token a step:

    waiting -> [ row 0  row 1  row 2 | row 3  row 4 ]  -> gone, at once when finished
       ^         decoding              filling
       |         (one forward a step)  (one slice of some of them a step)
       +------------- preempted: the youngest, when pages run out

Invariant: sequences fill rows 0 … n-1 of the cache without holes, the decoding ones first, so that the decoding batch
is read in place (cache.py). Who leaves or is promoted breaks it for a moment; the storage is told which rows to move.

**Steps.** A step is one slice of prompts and one token for every answer, so a long prompt never stops the answers that
are running. A slice ends at the latest at the next chunk border, and is no larger than a budget: far into a long
prompt, where a token costs more since it looks at more keys, it becomes smaller as long as answers wait for it.
Sequences that stand at the same position and have slices of similar length share one forward pass.

**Order.** First come, first served: who waits gets a place only after all who came earlier, and the oldest prompt is
always among those that are filled. Nobody starves.

**Pages** (pages.py). A sequence is let in when there are pages for all its tokens. So only answers can run out of them
while they grow. Then the *youngest* sequence gives all it has back and waits, as the first of the queue; let in again,
it is filled with its prompt and its answer so far, and goes on. The oldest is never preempted for another, so something
always gets finished; that each sequence fits alone is for the caller to check.

**Beginnings** (prefix.py). At each chunk border a sequence that is being filled takes the chunks ahead that are known,
and what is computed becomes known. Of several sequences before the same unknown chunk only one computes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Protocol

from puna.engine.prefix import PrefixCache

MIN_SLICE = 64
REACH = 8192  # keys which cost a token as much to look at as all its other work (nano, two cores)


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence; it sets all but `known`."""

    known: int  # tokens whose ids are known: those of the prompt and the answer so far
    target: int  # of these, how many must be fed before it decodes: as many as were known when it was let in
    fed: int  # tokens in the cache
    cached: int  # of the prompt's, those that were not computed but found
    pages: list[int]
    row: int
    arrival: int
    preemptions: int

    def key(self, chunk: int) -> Hashable | None:
        """Stands for all content up to the end of this chunk (whose tokens are known); None: must not be shared."""


class Storage(Protocol):
    """Where rows lie; `tokens` says how many of their tokens count."""

    def move(self, source: int, target: int, tokens: int) -> None:
        """Row `source` becomes row `target`."""

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchanges two rows."""


class Scheduler:
    """Rows 0 … len(active)-1 hold `active`; the first `decoding` of them decode, the others are being filled."""

    def __init__(self, rows: int, chunk: int, prefill_tokens: int, prefix: PrefixCache, storage: Storage):
        self.rows, self.chunk, self.prefill_tokens = rows, chunk, prefill_tokens
        self.pages, self.prefix, self.storage = prefix.pages, prefix, storage
        self.waiting: deque[Schedulable] = deque()
        self.active: list[Schedulable] = []
        self.decoding = 0
        self.preemptions = self.prefix_hits = self.prefix_tokens = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def add(self, sequence: Schedulable) -> None:
        """Puts a sequence at the end of the queue."""
        sequence.arrival, sequence.row = self._arrivals, -1
        self._arrivals += 1
        self.waiting.append(sequence)

    def admit(self) -> list[Schedulable]:
        """Lets in who is waiting, in order, while there are rows and pages; returns them."""
        new = []
        while self.waiting and len(self.active) < self.rows:
            sequence = self.waiting[0]
            sequence.target, sequence.fed = sequence.known, 0
            found = self._adopt(sequence)
            if not self._reserve(sequence, sequence.target + 1):
                self._empty(sequence)
                break
            sequence.row = len(self.active)
            self.active.append(self.waiting.popleft())
            self._count(sequence, found)
            new.append(sequence)
        return new

    def budget(self, fed: int) -> int:
        """Most tokens of one forward pass, over all its sequences, at position `fed` of the prompt."""
        if not self.decoding:
            return self.prefill_tokens
        return min(self.prefill_tokens, max(MIN_SLICE, self.prefill_tokens * REACH // (REACH + fed)))

    def room(self, sequence: Schedulable) -> int:
        """Tokens up to its chunk's border: no forward pass may feed it more."""
        return self.chunk - sequence.fed % self.chunk

    def slice_length(self, sequence: Schedulable) -> int:
        """Length of the sequence's next prompt slice: to its end, the chunk's border, or the budget."""
        return min(sequence.target - sequence.fed, self.room(sequence), self.budget(sequence.fed))

    def prefill(self) -> list[Schedulable]:
        """The sequences whose next slices share the next forward pass, in the order of their rows; empty if none."""
        filling = sorted(self.active[self.decoding :], key=lambda sequence: sequence.arrival)
        for sequence in filling:
            self._count(sequence, self._adopt(sequence))
        if not filling:
            return []
        oldest, group = filling[0], [filling[0]]
        length = longest = self.slice_length(oldest)
        budget, keys = self.budget(oldest.fed), {self._computes(oldest)}
        for sequence in filling[1:]:
            other, key = self.slice_length(sequence), self._computes(sequence)
            if sequence.fed != oldest.fed or (key in keys and key is not None) or not length <= 2 * other <= 4 * length:
                continue
            if (len(group) + 1) * max(longest, other) <= budget:
                group.append(sequence)
                longest = max(longest, other)
                keys.add(key)
        return sorted(group, key=lambda sequence: sequence.row)

    def decode(self) -> list[Schedulable]:
        """All who decode, each with room for one more token. For that the youngest may have had to go."""
        for sequence in sorted(self.active[: self.decoding], key=lambda sequence: sequence.arrival):
            while sequence.row >= 0 and not self._reserve(sequence, sequence.fed + 1):
                self.preempt(max(self.active, key=lambda sequence: sequence.arrival))
        return self.active[: self.decoding]

    def fit(self, sequence: Schedulable, n: int) -> int:
        """How many of the next n tokens of one that decodes can be fed at once: up to its chunk's border, and as long
        as there are pages without taking any from others."""
        n = min(n, self.room(sequence))
        return n if self._reserve(sequence, sequence.fed + n) else len(sequence.pages) * self.pages.size - sequence.fed

    def advance(self, sequence: Schedulable, n: int) -> None:
        """n more of its tokens are in the cache. With the last of its target it decodes from now on."""
        sequence.fed += n
        if sequence.fed % self.chunk == 0:
            chunk = sequence.fed // self.chunk - 1
            if (key := sequence.key(chunk)) is not None:
                self.prefix.put(key, self._pages_of(sequence, chunk))
        if sequence.row >= self.decoding and sequence.fed == sequence.target:
            self._promote(sequence)

    def preempt(self, sequence: Schedulable) -> None:
        """Takes everything from the youngest active sequence; it waits as the first of the queue."""
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def remove(self, sequence: Schedulable) -> None:
        """The sequence leaves for good."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    # ---- rows

    def _promote(self, sequence: Schedulable) -> None:
        other, row = self.active[self.decoding], sequence.row
        if other is not sequence:
            self.storage.swap(row, self.decoding, max(self._local(other), self._local(sequence)))
            self.active[row], other.row = other, row
            self.active[self.decoding], sequence.row = sequence, self.decoding
        self.decoding += 1

    def _leave(self, sequence: Schedulable) -> None:
        """Fills the hole that the sequence leaves in the rows, and gives its pages back."""
        hole = sequence.row
        if hole < self.decoding:
            self.decoding -= 1
            hole = self._fill(hole, self.decoding)
        self._fill(hole, len(self.active) - 1)
        self.active.pop()
        for chunk in reversed(range(sequence.fed // self.chunk)):  # its beginning was used last
            self.prefix.get(sequence.key(chunk))
        self._empty(sequence)

    def _fill(self, hole: int, source: int) -> int:
        """Moves row `source` into the hole; returns where the hole is now."""
        if source != hole:
            moved = self.active[source]
            self.storage.move(source, hole, self._local(moved))
            self.active[hole], moved.row = moved, hole
        return source

    def _local(self, sequence: Schedulable) -> int:
        """Tokens of its row that are alive: those of the chunk it is in."""
        return sequence.fed % self.chunk

    # ---- pages

    def _reserve(self, sequence: Schedulable, tokens: int) -> bool:
        """Pages for so many tokens; False, and nothing taken, if there are not enough."""
        missing = self.pages.count(tokens) - len(sequence.pages)
        if missing > 0:
            taken = self.pages.take(missing)
            if taken is None:
                return False
            sequence.pages += taken
        return True

    def _empty(self, sequence: Schedulable) -> None:
        self.pages.give(sequence.pages)
        sequence.pages, sequence.row, sequence.fed = [], -1, 0

    def _pages_of(self, sequence: Schedulable, chunk: int) -> list[int]:
        n = self.chunk // self.pages.size
        return sequence.pages[chunk * n : (chunk + 1) * n]

    def _computes(self, sequence: Schedulable) -> Hashable | None:
        """The key of the whole chunk which the sequence is in, if it gets to its end before it decodes."""
        chunk = sequence.fed // self.chunk
        return sequence.key(chunk) if self.prefix.capacity and (chunk + 1) * self.chunk <= sequence.target else None

    def _adopt(self, sequence: Schedulable) -> int:
        """At a border: takes the chunks ahead that are known; returns their tokens. The last token of all is computed
        in any case: for its logits."""
        began = sequence.fed
        while sequence.fed % self.chunk == 0 and sequence.fed + self.chunk < sequence.target:
            chunk = sequence.fed // self.chunk
            found = self.prefix.get(sequence.key(chunk))
            if found is None:
                break
            self.pages.share(found)
            self.pages.give(self._pages_of(sequence, chunk))
            sequence.pages[chunk * len(found) : (chunk + 1) * len(found)] = found
            sequence.fed += self.chunk
        return sequence.fed - began

    def _count(self, sequence: Schedulable, found: int) -> None:
        self.prefix_tokens += found
        if found and not sequence.preemptions:
            self.prefix_hits += not sequence.cached
            sequence.cached += found
