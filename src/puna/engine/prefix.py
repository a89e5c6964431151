"""The prefix cache: a beginning that was computed once is not computed again.

Conversations repeat themselves: a system prompt, the turns so far, a picture asked about twice, n answers to one
prompt. What the model knows of a beginning is its keys and values; if they are kept, the next prompt goes on behind.

**Only global layers' pages are kept.** A local layer sees its own chunk alone, so at a chunk border it has forgotten
everything: the next token starts it afresh. A beginning of whole chunks is therefore known by the pages of the global
layers, a quarter of all keys and values, and costs no copy: the pages get one more owner (pages.py). Inside a chunk it
would take the local slots too; so beginnings are shared in whole chunks, and the rest of the prompt is computed.

**The key is the content.** Chunk i's key is a hash over the key of chunk i-1, the chunk's token ids and the pixels of
its pictures (all patch tokens have one id). So equal keys mean equal beginnings, from the first token on. The chain
starts with a salt, the tenant's: who may not know what others asked cannot find out by timing (CVE-2025-46570). Keys
and values of other weights are never found: with new weights all is forgotten, and what running answers have is not
shared.

Whole answers enter too, chunk by chunk as they grow. What was used least recently is dropped first, ends of chains
before their beginnings, and nothing that a running sequence uses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b

from puna.engine.pages import Pages


def chain(before: bytes, tokens: bytes, pictures: Iterable[bytes] = ()) -> bytes:
    """The key of a chunk behind the one with the key `before`: of its token ids, and of its pictures' hashes."""
    return blake2b(b"".join([before, tokens, *pictures]), digest_size=16).digest()


class PrefixCache:
    """Pages of known chunks by key, at most `capacity` pages; least recently used first."""

    def __init__(self, pages: Pages, capacity: int):
        self.pages, self.capacity, self.held = pages, capacity, 0
        self.entries: OrderedDict[Hashable, list[int]] = OrderedDict()
        pages.reclaim = self.drop

    def get(self, key: Hashable | None) -> list[int] | None:
        """The chunk's pages (the caller becomes no owner of them), or None."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Hashable, pages: Sequence[int]) -> None:
        """Keeps the chunk's pages, if it is new and there is or can be made room."""
        if key in self.entries:
            return
        excess = self.held + len(pages) - self.capacity
        if excess > 0 and self.drop(excess) < excess:
            return
        self.pages.share(pages)
        self.entries[key] = list(pages)
        self.held += len(pages)

    def drop(self, n: int) -> int:
        """Frees n pages, or as many as nobody else uses; returns how many."""
        freed = 0
        for key, pages in list(self.entries.items()) if n > 0 else ():
            if freed >= n:
                break
            if self.pages.owners[pages[0]] == 1:
                self.pages.give(self.entries.pop(key))
                freed += len(pages)
        self.held -= freed
        return freed

    def forget(self, keys: Iterable[Hashable | None]) -> None:
        """Drops these, for their numbers turned out to be wrong."""
        for key in keys:
            pages = self.entries.pop(key, [])
            self.held -= len(pages)
            self.pages.give(pages)

    def clear(self) -> None:
        """Forgets everything."""
        self.forget(list(self.entries))
