"""Losses as *terms*, so that logits never exist whole.

A term maps (hidden slice [n, D], head, batch slice) to (sum of losses, metrics). The step calls it slice by slice and
divides by the count of valid tokens of the *whole* optimizer step, over all micro-batches: every token weighs the
same however the batch was cut. Next-token prediction is one term; DPO, RL and distillation are others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Term(Protocol):
    """A loss over a slice of valid positions."""

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        """Returns (scalar sum over the n positions, dict of scalar sums to be logged per valid token)."""


class _CrossEntropy(torch.autograd.Function):
    """Sum of -ln softmax(x)[target]; its gradient softmax(x) - onehot(target) is written over the saved ln softmax.

    The composed operators keep four arrays of [n, V] and fill one with zeros; this keeps one. It can be differentiated
    once.
    """

    @staticmethod
    def forward(ctx, logits_nV: Tensor, targets_n: Tensor) -> Tensor:
        log_p_nV = torch.log_softmax(logits_nV, dim=-1)
        ctx.log_p_nV, ctx.targets_n = log_p_nV, targets_n
        return -log_p_nV.gather(1, targets_n[:, None]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.log_p_nV is None:
            raise RuntimeError("the cross-entropy's gradient was taken before: its memory is used again")
        gradient_nV, ctx.log_p_nV = ctx.log_p_nV.exp_(), None
        rows_n = torch.arange(len(gradient_nV), device=gradient_nV.device)
        gradient_nV[rows_n, ctx.targets_n] -= 1
        return gradient_nV.mul_(grad), None


def cross_entropy(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Scalar sum over n of -ln softmax(logits)[target], in nats; logits in the dtype the sum shall have."""
    return _CrossEntropy.apply(logits_nV, targets_n)


class NextToken:
    """Cross-entropy with the next token: sum over positions of -ln p(target), natural units."""

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        logits_nV = head(hidden_nD)
        targets_n = batch["targets"]
        loss = cross_entropy(logits_nV, targets_n)
        with torch.no_grad():
            right = (logits_nV.argmax(-1) == targets_n).sum()
        return loss, {"accuracy": right}
