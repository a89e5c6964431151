"""Losses as *terms*, so that logits never exist whole.

A term says which hidden states it needs, and maps (hidden slice [n, D], head, batch slice) to (sum of losses, metrics).
The step calls it slice by slice and divides by the count of valid tokens of the *whole* optimizer step, over all
micro-batches: every token weighs the same however the batch was cut. Next-token prediction is one term, names for what
a picture's tokens show another; DPO, RL and distillation are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model import Llama4
from puna.model.fusion import fuse

if TYPE_CHECKING:
    from puna.data import Batch


class Term(Protocol):
    """A loss over a slice of valid positions."""

    def hidden(self, model: Llama4, batch: Batch) -> Tensor:
        """[B, T, D]: the states that the valid positions are taken from."""

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

    def hidden(self, model: Llama4, batch: Batch) -> Tensor:
        return model.hidden(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        logits_nV = head(hidden_nD)
        targets_n = batch["targets"]
        loss = cross_entropy(logits_nV, targets_n)
        with torch.no_grad():
            right = (logits_nV.argmax(-1) == targets_n).sum()
        return loss, {"accuracy": right}


class Names:
    """What does a picture's token show, and where is it? The vision tower's loss where it learns apart.

    Sum over patch tokens of -ln softmax(cos(feature, names) / temperature)[target], in nats: the names in captions are
    the classes, without a text encoder ("SuperClass", arXiv 2411.03313), and the model's own embeddings, held fixed,
    are the classifier (a name is the mean direction of its tokens), so that a feature comes to lie where the words for
    what it shows lie. A token that shows nothing has the patch token's own embedding to be near, and weighs `nothing`
    of one that shows something. A feature's length costs too (0.1 (|feature| / |embedding| - 1)^2): features enter the
    residual stream as embeddings do.

    Where the edges of the thing are known (extra "edges" [B, T, 4]: left, top, right, bottom as shares of the tile's
    side, else NaN), the feature has to tell them as well, along four fixed directions, 1/2 + 2 cos(feature, direction):
    1.5 times the sum of the four errors, and 1.8 (1 - IoU), to which small things matter as much as large ones.

    names: each class's tokens; the last class is nothing. Targets are indices of it.
    """

    temperature = 1 / 15
    nothing = 0.1

    def __init__(self, model: Llama4, names: Sequence[Sequence[int]]):
        weight_VD = model.tok_embeddings.weight.detach().float()
        self.length = float(weight_VD.norm(dim=-1).mean())
        mean_CD = torch.stack([F.normalize(weight_VD[list(tokens)], dim=-1).sum(0) for tokens in names])
        self.classes_CD = F.normalize(mean_CD, dim=-1)
        basis_DD = torch.linalg.qr(torch.randn(2 * [weight_VD.shape[1]], generator=torch.Generator().manual_seed(4)))[0]
        self.directions_4D = basis_DD[:4].to(weight_VD)

    def hidden(self, model: Llama4, batch: Batch) -> Tensor:
        """Features at the patch tokens, zeros elsewhere; nothing but the tower runs."""
        empty_BTD = torch.zeros(*batch.tokens_BT.shape, model.config.d_model, device=batch.tokens_BT.device)
        if batch.tiles is None:
            return empty_BTD
        return fuse(empty_BTD, batch.tokens_BT, model.image_features(batch.tiles), model.config.patch_token)

    def __call__(self, hidden_nD: Tensor, head: Callable[[Tensor], Tensor], batch: dict[str, Tensor]):
        targets_n, length_n = batch["targets"], hidden_nD.norm(dim=-1)
        something_n = targets_n < len(self.classes_CD) - 1
        unit_nD = F.normalize(hidden_nD, dim=-1)
        logits_nC = unit_nD @ self.classes_CD.T / self.temperature
        parts = [(logits_nC[something_n], targets_n[something_n], 1.0),
                 (logits_nC[~something_n], targets_n[~something_n], self.nothing)]  # fmt: skip
        loss = sum(weight * cross_entropy(logits, targets) for logits, targets, weight in parts)
        loss = loss + 0.1 * (length_n / self.length - 1).square().sum()
        known_n = batch["edges"].isfinite().all(-1)
        edges_m4, true_m4 = self.edges(unit_nD[known_n]), batch["edges"][known_n]
        error_m4, iou_m = edges_m4 - true_m4, iou(edges_m4, true_m4)
        loss = loss + 1.5 * error_m4.abs().sum() + 1.8 * (1 - iou_m).sum()
        with torch.no_grad():
            right = (logits_nC.argmax(-1) == targets_n)[something_n].sum()
        sums = {"something": something_n.sum(), "named": right, "edges": known_n.sum(),
                "edge_error": error_m4.detach().abs().mean(1).sum(), "iou": iou_m.detach().sum()}  # fmt: skip
        return loss, sums

    def edges(self, unit_nD: Tensor) -> Tensor:
        """[n, 4]: the edges that features of length 1 tell, shares of the tile's side."""
        return 0.5 + 2 * unit_nD @ self.directions_4D.T


def iou(a_n4: Tensor, b_n4: Tensor) -> Tensor:
    """[n]: intersection over union of boxes (left, top, right, bottom); 0 where they share nothing. b has an area."""
    shared_n = (torch.minimum(a_n4[:, 2:], b_n4[:, 2:]) - torch.maximum(a_n4[:, :2], b_n4[:, :2])).clamp(min=0).prod(1)
    area_n, b_area_n = ((box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (a_n4, b_n4))
    return shared_n / (area_n + b_area_n - shared_n)
