"""Speculative decoding: guess some tokens cheaply, check them all in one forward pass of the model.

Decoding reads every weight to make one token; with k guessed tokens behind the newest one the same reading checks k + 1
positions. The guesses of a *drafter* are either what followed the same few tokens earlier in the text (`Lookup`:
free, good where an answer repeats its prompt), or what a small model says (`Draft`).

**Nothing changes but the time.** The model chooses each token as it would without a draft: from its own logits, with
the request's own random number for that place; the draft only says how long one forward pass can go on:

    newest    d1    d2    d3          fed in one pass: 4 positions
       v      v     v     v
      t1     t2    t3    t4           chosen one after the other while t_i = d_i:
     = d1   = d2  != d3               t1 and t2 confirm d1 and d2, t3 replaces d3; three tokens of one pass

Given the past, P(d is accepted) = p(d), and what comes in place of a rejected d is distributed as p without d: that is
the rule of speculative sampling (arXiv 2211.17192) for a drafter that proposes one token with certainty. Since u is
shared, more is true than that the distribution is kept: the same seed gives the same tokens, with any drafter, any
draft length and any neighbours (greedy answers too). The price: drawing from the draft's distribution q and accepting
with min(1, p/q) accepts more where many tokens are likely (docs/LOG.md has numbers), but there the answer hangs on the
draft's length, hence on who else is in the batch. A small model drafts with the same u, so that where its distribution
is the model's, its token is too.

**The cache.** Keys of rejected tokens lie beyond the valid length and are overwritten. For local layers that holds
inside a chunk only: behind a border they would overwrite keys that are alive after the rejection. So no pass of drafted
tokens crosses one, and no draft takes pages from other sequences (scheduler.py, `fit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from puna.engine.cache import HybridCache, Place, page_size
from puna.engine.pages import Pages
from puna.engine.request import Running
from puna.engine.sampler import sample
from puna.errors import PunaError

LONGEST, SHORTEST = 4, 2  # tokens at the text's end that are looked up
DRAFT_TOKENS = 4  # guesses of a draft model, where nothing else is said
CHECKED = 64  # most tokens of one checking pass: with more, arithmetic takes the time, and a rejected one costs its own
BEHIND = 8  # most tokens that a draft model reads in the pass that begins a draft


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, requests: Sequence[Running], most: int) -> list[list[int]]:
        """For each request at most `most` tokens that may follow its text; none where there is no guess."""

    def forget(self, id: str) -> None:
        """The request of this id is over."""


def usable(request: Running, draft: list[int]) -> list[int]:
    """As much of a draft as the request can take: within its limit, before a stop token, as its grammar allows."""
    draft = draft[: request.limit - len(request.tokens) - 1]
    draft = list(takewhile(lambda token: token not in request.stop_ids, draft))
    return draft if request.chooser.grammar is None else request.chooser.grammar.follow(draft)


class Lookup:
    """Guesses that the text goes on as it did after the last place where its newest tokens stood."""

    def __init__(self):
        self._texts: dict[str, tuple[np.ndarray, int]] = {}  # ids, with room for more, and how many of them are known

    def propose(self, requests: Sequence[Running], most: int) -> list[list[int]]:
        return [self._follow(self._text(request), most) for request in requests]

    def forget(self, id: str) -> None:
        self._texts.pop(id, None)

    def _text(self, request: Running) -> np.ndarray:
        array, n = self._texts.get(request.id, (request.prompt.tokens, len(request.prompt.tokens)))
        known = request.known
        if known > len(array):
            array = np.concatenate([array[:n], np.empty(known, np.int64)])
        array[n:known] = request.ids(n, known)
        self._texts[request.id] = array, known
        return array[:known]

    @staticmethod
    def _follow(text: np.ndarray, most: int) -> list[int]:
        ends, same = np.arange(len(text) - 1), 0  # places up to which the last `same` tokens are the text's last ones
        while same < LONGEST:
            further = ends[ends >= same]
            further = further[text[further - same] == text[-1 - same]]
            if not len(further):
                break
            ends, same = further, same + 1
        if same < SHORTEST:
            return []
        period = len(text) - 1 - int(ends[-1])  # after its end the text goes on with itself
        return [int(text[len(text) - period + i % period]) for i in range(most)]


class Draft:
    """A small model that guesses; it has a cache of its own, a row for each request.

    model: reads the same tokens and pictures as the engine's; put into evaluation mode. banned_V: as in `sample`. A
    request whose prompt it has not read yet gets no guesses: each step it reads one slice of one such prompt.
    """

    def __init__(self, model, config, rows: int, max_context: int, slice_tokens: int, banned_V: Tensor | None):
        own = model.config
        if own.vocab_size != config.vocab_size or own.max_context < max_context:
            raise PunaError(
                f"draft: has {own.vocab_size} tokens and a context of {own.max_context}, the model needs "
                f"{config.vocab_size} and {max_context}: use one of the same family"
            )
        if config.vision is not None and (
            own.vision is None
            or (own.patch_token, own.vision.image_size, own.vision.tokens_per_tile)
            != (config.patch_token, config.vision.image_size, config.vision.tokens_per_tile)
        ):
            raise PunaError("draft: does not see pictures as the model does: use one of the same family")
        self.model, self.slice_tokens, self.banned_V = model.eval(), slice_tokens, banned_V
        self.device = next(model.parameters()).device
        self.pages = Pages(page_size(own), rows * -(-max_context // page_size(own)))
        self.cache = HybridCache(own, rows, self.pages.total, model.dtype, self.device)
        self._free = list(range(rows))[::-1]
        self._places: dict[str, Place] = {}

    def forget(self, id: str) -> None:
        if (place := self._places.pop(id, None)) is not None:
            self.pages.give(place.pages)
            self._free.append(place.row)

    def propose(self, requests: Sequence[Running], most: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        ready, behind = {}, []
        for i, request in enumerate(requests):
            place = self._place(request, requests)
            place.fed = min(place.fed, request.known - 1)  # what it guessed wrongly is no longer valid
            unseen = len(request.patch_at) and request.patch_at[-1] >= place.fed
            if request.known - place.fed <= min(BEHIND, self._room(place)) and not unseen:
                ready[i] = place
                most = min(most, self._room(place) - (request.known - place.fed) + 1)
            else:
                behind.append(request)
        if behind:
            self._read(behind[0])
        if not ready:
            return drafts
        choosers = [requests[i].chooser for i in ready]
        fed = [requests[i].ids(place.fed, requests[i].known).tolist() for i, place in ready.items()]
        for ahead in range(most):
            logits_BV = self._forward(list(ready.values()), fed)
            guesses = [choice.token for choice in sample(logits_BV, choosers, self.banned_V, ahead)]
            for i, guess in zip(ready, guesses, strict=True):
                drafts[i].append(guess)
            fed = [[guess] for guess in guesses]
        return drafts

    def _place(self, request: Running, requests: Sequence[Running]) -> Place:
        if request.id not in self._places:
            if not self._free:  # somebody has to wait for a place in the batch again
                here = {other.id for other in requests}
                self.forget(next(id for id in self._places if id not in here))
            self._places[request.id] = Place(self._free.pop(), [])
        return self._places[request.id]

    def _room(self, place: Place) -> int:
        """Tokens up to the chunk's border."""
        return self.cache.config.chunk - place.fed % self.cache.config.chunk

    def _read(self, request: Running) -> None:
        """The next slice of what the request's text has and the draft's cache has not."""
        place = self._places[request.id]
        start = place.fed
        n = min(request.known - 1 - start, self._room(place), self.slice_tokens)
        first, last = np.searchsorted(request.patch_at, (start, start + n))
        features = None
        if last > first:
            per_tile = self.model.config.vision.tokens_per_tile
            tiles = request.prompt.tiles[first // per_tile : -(-last // per_tile)]
            features = self.model.image_features(tiles.to(self.device)).flatten(0, 1)
            features = features[first % per_tile :][: last - first]
        self._forward([place], [request.ids(start, start + n).tolist()], features)

    def _forward(self, places: list[Place], tokens: list[list[int]], features: Tensor | None = None) -> Tensor:
        """Feeds each these tokens; the logits [B, V] behind the last of each."""
        counts = [len(ids) for ids in tokens]
        width = max(counts)
        for place, n in zip(places, counts, strict=True):
            missing = self.pages.count(place.fed + n) - len(place.pages)
            place.pages += self.pages.take(missing) if missing > 0 else []
        tokens_BT = torch.tensor([ids + [ids[-1]] * (width - len(ids)) for ids in tokens], device=self.device)
        hidden_BTD = self.model.hidden(tokens_BT, features=features, cache=self.cache.view(places, counts))
        for place, n in zip(places, counts, strict=True):
            place.fed += n
        return self.model.head(hidden_BTD[range(len(places)), [n - 1 for n in counts]])
