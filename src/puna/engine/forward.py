"""One forward pass for several sequences: their next tokens in, hidden states out; prompts and answers alike.

**Batch invariance.** Matrix products add up in an order that depends on their shape: a token's numbers change in the
last bits with the number of tokens that go through the model beside it, and with them, now and then, an answer. That is
harmless, except to who must know that nothing else changed (RL compares probabilities of generation and training; a bug
is hunted). With `invariant`, a token's bits depend on the tokens before it alone, not on the batch, the slices of its
prompt, the prefix cache or a preemption, since every operation has the same shape always:

* BLOCK tokens go through the model at once, as BLOCK rows of one token each; where there are fewer, rows that stand for
  nobody. Prompts are no different from answers. An expert's product has BLOCK rows too (ops.same_shapes).
* Each query attends alone, to its keys in one piece (cache.Apart).
* Tiles are encoded and tokens sampled one by one.

What is left is that a product's row must not depend on *where* it stands in the block. Kernels keep that, but don't
promise it, so it is tested when the engine is made: BLOCK times the same token must give BLOCK times the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.engine.cache import Apart, HybridCache, Place
from puna.engine.request import Running
from puna.errors import PunaError
from puna.model import ops

BLOCK = 16
TILES_AT_ONCE = 16  # most tiles of one pass through the vision tower


class Forward:
    """The model over its cache."""

    def __init__(self, model, cache: HybridCache, invariant: bool):
        self.model, self.cache, self.invariant = model, cache, invariant
        self.device = cache.device
        self._pad = 1 if model.config.patch_token == 0 else 0
        if invariant:
            self._check_rows()

    def __call__(self, group: Sequence[Running], lengths: Sequence[int]) -> Tensor:
        """Feeds each its next lengths[i] tokens: the last hidden states [B, T, D], padded on the right."""
        slices = [(request, request.fed, request.fed + n) for request, n in zip(group, lengths, strict=True)]
        ids = [request.ids(start, stop) for request, start, stop in slices]
        features = [self._features(*part) for part in slices]
        if self.invariant:
            return self._blocks(group, lengths, ids, features)
        tokens_BT = torch.full((len(group), max(lengths)), self._pad)
        for row_T, own in zip(tokens_BT, ids, strict=True):
            row_T[: len(own)] = torch.from_numpy(own)
        return self._hidden(tokens_BT, features, self.cache.view(group, lengths))

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]."""
        if not self.invariant:
            return self.model.head(hidden_ND)
        return torch.cat([self.model.head(_padded(part))[: len(part)] for part in hidden_ND.split(BLOCK)])

    def _hidden(self, tokens_BT: Tensor, features: Sequence[Tensor | None], view) -> Tensor:
        some = [part for part in features if part is not None]
        return self.model.hidden(tokens_BT.to(self.device), features=torch.cat(some) if some else None, cache=view)

    def _blocks(self, group, lengths, ids, features) -> Tensor:
        places, parts = [], []
        for request, n in zip(group, lengths, strict=True):
            places += [Place(request.row, request.pages, request.fed + i) for i in range(n)]
        tokens_N = torch.from_numpy(np.concatenate(ids))
        some = [part for part in features if part is not None]
        at, features_nD = 0, torch.cat(some) if some else None
        patch_N = tokens_N == (self.model.config.patch_token if some else -1)
        for begin in range(0, len(places), BLOCK):
            own = slice(begin, begin + BLOCK)
            n, patches = len(places[own]), int(patch_N[own].sum())
            tokens_B1 = F.pad(tokens_N[own], (0, BLOCK - n), value=self._pad)[:, None]
            view = Apart(self.cache, places[own], [1] * n, BLOCK)
            with ops.same_shapes():
                hidden_B1D = self._hidden(tokens_B1, [features_nD[at : at + patches]] if patches else [], view)
            parts.append(hidden_B1D[:n, 0])
            at += patches
        rows = torch.cat(parts).split(list(lengths))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _features(self, request: Running, start: int, stop: int) -> Tensor | None:
        """Features [n, D] of the patch tokens at positions start … stop-1; a tile may be cut anywhere. What the prefix
        cache knows is not encoded."""
        first, last = np.searchsorted(request.patch_at, (start, stop))
        if first == last:
            return None
        each = self.model.config.vision.tokens_per_tile
        if request.features is None or first < request.features_from:
            request.features_from = first // each * each
            tiles = request.prompt.tiles[first // each :].split(1 if self.invariant else TILES_AT_ONCE)
            parts = [self.model.image_features(some.to(self.device)).flatten(0, 1) for some in tiles]
            request.features = torch.cat(parts)
        return request.features[first - request.features_from : last - request.features_from]

    @torch.inference_mode()
    def _check_rows(self) -> None:
        training = self.model.training
        self.model.eval()
        tokens_B1 = torch.full((BLOCK, 1), self._pad, device=self.device)
        with ops.same_shapes():
            logits_BV = self.model.head(self.model.hidden(tokens_B1)[:, 0])
        self.model.train(training)
        if not torch.equal(logits_BV, logits_BV[:1].expand_as(logits_BV)):
            raise PunaError(
                "batch_invariant: on this machine a row of a matrix product depends on where it stands, so equal bits "
                "cannot be promised; leave the option off, or try another number of threads"
            )


def _padded(hidden_nD: Tensor) -> Tensor:
    return F.pad(hidden_nD, (0, 0, 0, BLOCK - len(hidden_nD)))
