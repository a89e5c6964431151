"""Who owns which page: the bookkeeping of the global layers' storage (no tensors here; cache.py has them).

A *page* is the place of `size` successive tokens' keys and values in every global layer. A sequence lists its pages in
order. One page can stand in several lists, when answers share a beginning (prefix.py): it has as many owners, and is
free again when the last one gives it back. Only pages that are full are ever shared, so nobody writes into them.

The lowest free pages are given out first: decoding reads neighbouring pages as one piece, and what lies behind the last
page with an owner can be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Pages:
    """`total` pages of `size` tokens; `owners[i]` of page i, pages behind the list's end have none.

    reclaim(n): asked for n more free pages before `take` gives up; may do nothing.
    """

    def __init__(self, size: int, total: int):
        self.size, self.total, self.free = size, total, total
        self.owners: list[int] = []
        self.reclaim: Callable[[int], object] = lambda n: None

    def count(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.size)

    def take(self, n: int) -> list[int] | None:
        """The n lowest free pages; None if there aren't so many."""
        if n > self.free:
            self.reclaim(n - self.free)
        if n > self.free:
            return None
        taken = [page for page, owners in enumerate(self.owners) if not owners][:n]
        taken += range(len(self.owners), len(self.owners) + n - len(taken))
        self.owners += [0] * (taken[-1] + 1 - len(self.owners)) if taken else []
        self.share(taken)
        self.free -= n
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Each of the pages has one more owner."""
        for page in pages:
            self.owners[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """Each of the pages has one owner less."""
        for page in pages:
            self.owners[page] -= 1
            self.free += not self.owners[page]
        while self.owners and not self.owners[-1]:
            self.owners.pop()
