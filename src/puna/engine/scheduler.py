"""Who runs next: continuous batching as plain bookkeeping (no tensors here, so it can be tested by itself).

A sequence waits, is *filled* (its prompt goes through the model, slice by slice) and then *decodes* one token a step:

    waiting -> [ row 0  row 1  row 2 | row 3  row 4 ]  -> gone, at once when finished
                 decoding              filling
                 (one forward a step)  (one slice of some of them a step)

Invariant: sequences fill rows 0 … n-1 of the cache without holes, the decoding ones first. So the decoding batch is
always read in place (see cache.py). Leaving and being promoted break it for a moment; `remove` and `promote` say
which cache rows to move or swap to restore it.

A step is one prompt slice and one decode, so that a long prompt never stops the answers that are running. A slice
ends at the latest at the next chunk border (cache.py says why), and is no larger than a budget of tokens; its
attention mask grows with what is already cached, so far into a long prompt slices become smaller. Sequences that
stand at the same position and have slices of similar length share one forward pass. The oldest goes first: nobody
starves.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

MASK_CELLS = 2**25  # most cells (new tokens x keys) of a prompt slice's attention mask: 32 MB as booleans
MIN_SLICE = 64


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence; it sets `row` and `arrival`."""

    length: int  # tokens of the prompt
    fed: int  # of these, already in the cache
    row: int
    arrival: int


class Scheduler:
    """Rows 0 … len(active)-1 hold `active`; the first `decoding` of them decode, the others are being filled."""

    def __init__(self, rows: int, chunk: int, prefill_tokens: int):
        self.rows, self.chunk, self.prefill_tokens = rows, chunk, prefill_tokens
        self.waiting: deque[Schedulable] = deque()
        self.active: list[Schedulable] = []
        self.decoding = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def add(self, sequence: Schedulable) -> None:
        """Puts a sequence at the end of the queue."""
        sequence.arrival, sequence.row = self._arrivals, -1
        self._arrivals += 1
        self.waiting.append(sequence)

    def admit(self) -> list[Schedulable]:
        """Gives waiting sequences the free rows; returns them."""
        new = []
        while self.waiting and len(self.active) < self.rows:
            sequence = self.waiting.popleft()
            sequence.row = len(self.active)
            self.active.append(sequence)
            new.append(sequence)
        return new

    def budget(self, fed: int) -> int:
        """Most tokens of one forward pass, over all its sequences, at position `fed` of the prompt."""
        return min(self.prefill_tokens, max(MIN_SLICE, MASK_CELLS // (fed + 1)))

    def slice_length(self, sequence: Schedulable) -> int:
        """Length of the sequence's next prompt slice: to its end, the chunk's border, or the budget."""
        border = self.chunk - sequence.fed % self.chunk
        return min(sequence.length - sequence.fed, border, self.budget(sequence.fed))

    def prefill(self) -> list[Schedulable]:
        """The sequences whose next slices share the next forward pass, in the order of their rows; empty if none."""
        filling = self.active[self.decoding :]
        if not filling:
            return []
        oldest = min(filling, key=lambda sequence: sequence.arrival)
        length, group, budget = self.slice_length(oldest), [oldest], self.budget(oldest.fed)
        longest = length
        for sequence in filling:
            other = self.slice_length(sequence)
            if sequence is oldest or sequence.fed != oldest.fed or not length <= 2 * other <= 4 * length:
                continue
            if (len(group) + 1) * max(longest, other) <= budget:
                group.append(sequence)
                longest = max(longest, other)
        return sorted(group, key=lambda sequence: sequence.row)

    def promote(self, sequence: Schedulable) -> tuple[int, int] | None:
        """The prompt is in the cache: the sequence decodes from now on. Returns two rows to swap, or None."""
        old, new = sequence.row, self.decoding
        self.decoding += 1
        if old == new:
            return None
        self._place(self.active[new], old)
        self._place(sequence, new)
        return old, new

    def remove(self, sequence: Schedulable) -> list[tuple[int, int]]:
        """The sequence leaves. Returns moves (from row, to row) to be done in this order; the last row is then free."""
        if sequence.row < 0:
            self.waiting.remove(sequence)
            return []
        moves, hole = [], sequence.row
        if hole < self.decoding:
            self.decoding -= 1
            moves.append((self.decoding, hole))
            hole = self.decoding
        moves.append((len(self.active) - 1, hole))
        moves = [(source, target) for source, target in moves if source != target]
        for source, target in moves:
            self._place(self.active[source], target)
        self.active.pop()
        sequence.row = -1
        return moves

    def _place(self, sequence: Schedulable, row: int) -> None:
        self.active[row], sequence.row = sequence, row
