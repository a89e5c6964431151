"""Losses as *terms*, so that logits never exist whole.

A term maps (hidden slice [n, D], head, batch slice) to (sum of losses, metrics). The step calls it slice by slice and
divides by the count of valid tokens of the *whole* optimizer step, over all micro-batches: every token weighs the
same however the batch was cut. Next-token prediction is one term; DPO, RL and distillation are others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Term(Protocol):
    """A loss over a slice of valid positions."""

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        """Returns (scalar sum over the n positions, dict of scalar sums to be logged per valid token)."""


class NextToken:
    """Cross-entropy with the next token: sum over positions of -ln p(target), natural units."""

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        logits_nV = head(hidden_nD)
        targets_n = batch["targets"]
        loss = F.cross_entropy(logits_nV, targets_n, reduction="sum")
        with torch.no_grad():
            right = (logits_nV.argmax(-1) == targets_n).sum()
        return loss, {"accuracy": right}
