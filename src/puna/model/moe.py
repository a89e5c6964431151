"""Llama 4's mixture of experts: router, dispatcher and experts apart.

For a token x (llama4-facts.md §2.1):

    r = W_router x          raw logits, fp32
    e = argmax r            top-1, token choice, no capacity, no dropped token
    s = sigmoid(r_e)        not softmax
    y = Shared(x) + Expert_e(s * x)

The score scales the expert's *input*. A SwiGLU is not linear, so this is not the same as scaling its output, and it
is how gradient reaches the router. (Meta's inference code detaches it; we do not.)

**Balance** is training state, never model: the loop may set `selection_bias_E`, which moves the argmax in training
mode only, a `router_loss`, or a `choice` by which experts take tokens (train/balance.py). Evaluation, decoding and
export route by raw logits.

**Dispatch.** One sort brings each expert's tokens together, one inverse permutation brings the results back. The
layer owns a dispatcher object, which expert parallelism replaces with an all-to-all of the same two methods.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from puna.model import ops
from puna.model.config import ModelConfig


class LocalDispatcher:
    """All experts live here: dispatch is a sort by expert, combine its inverse. No parameters, no state."""

    def dispatch(self, x_TD: Tensor, expert_T: Tensor, counts_E: Tensor):
        """Returns (x sorted by expert, rows of each expert that lives here, a context for `combine`)."""
        if len(x_TD) == 1:  # a lone answer's next token: sorted as it is
            return x_TD, counts_E, None
        order_T = torch.argsort(expert_T, stable=True)
        inverse_T = torch.empty_like(order_T)
        inverse_T[order_T] = torch.arange(order_T.numel(), device=order_T.device)
        return ops.permute_rows(x_TD, order_T, inverse_T), counts_E, (order_T, inverse_T)

    def combine(self, y_TD: Tensor, context) -> Tensor:
        """Rows back in the tokens' order."""
        if context is None:
            return y_TD
        order_T, inverse_T = context
        return ops.permute_rows(y_TD, inverse_T, order_T)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), with w1 over w3 in one matrix. Dense layers and the shared expert."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.w13 = nn.Linear(d_model, 2 * width, bias=False)
        self.w2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(ops.swiglu(ops.linear(x, self.w13.weight)), self.w2.weight)


class Experts(nn.Module):
    """E SwiGLUs as two batched matrices, input-major: w13 [E, D, 2F] (gate beside up), w2 [E, F, D]."""

    def __init__(self, n_experts: int, d_model: int, width: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(n_experts, d_model, 2 * width))
        self.w2 = nn.Parameter(torch.empty(n_experts, width, d_model))

    def forward(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        """x_TD sorted by expert, counts_E rows each."""
        h_TF = ops.swiglu(ops.expert_mm(x_TD, self.w13, counts_E))
        return ops.expert_mm(h_TF, self.w2, counts_E)


class MoE(nn.Module):
    """Shared expert plus one routed expert per token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_experts = config.n_experts
        self.router = nn.Linear(config.d_model, config.n_experts, bias=False)
        self.experts = Experts(config.n_experts, config.d_model, config.expert_width)
        self.shared = FeedForward(config.d_model, config.expert_width)
        self.dispatcher = LocalDispatcher()
        self.selection_bias_E: Tensor | None = None  # training state, set by the loop
        self.counts_E: Tensor | None = None  # of this process's tokens, those of each expert in the last forward
        self.flips: Tensor | None = None  # tokens of the last training forward that balancing sent elsewhere
        self.router_loss: Callable[[Tensor], Tensor] | None = None  # logits [T, E] -> a loss of their own, in training
        self.choice: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # logits -> tokens, who takes them
        self.seen: dict[str, Tensor] = {}  # what the last two noted of the last forward
        self.record: list[Tensor] | None = None  # filled by record_routes

    def forward(self, x_BTD: Tensor, route_BT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `route_BT` forces the experts (a replay); -1 leaves a token to the router."""
        x_TD = x_BTD.flatten(0, -2)
        logits_TE = ops.linear(x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)), self.router.weight)
        if self.training and self.router_loss is not None:
            logits_TE = ops.with_loss(logits_TE, self.router_loss(logits_TE))
        expert_T = self.choose(logits_TE)
        if route_BT is not None:
            route_T = route_BT.flatten()
            expert_T = torch.where(route_T >= 0, route_T, expert_T)
        if self.record is not None:
            self.record.append(expert_T.view(x_BTD.shape[:-1]))
        self.counts_E = torch.bincount(expert_T, minlength=self.n_experts)
        if self.choice is not None and route_BT is None:
            routed_TD = self._taken(x_TD, logits_TE, expert_T)
        else:
            score_T1 = torch.sigmoid(logits_TE.gather(1, expert_T[:, None])).to(x_TD.dtype)
            routed_TD = self._run(x_TD * score_T1, expert_T, self.counts_E)
        return (self.shared(x_TD) + routed_TD).view_as(x_BTD)

    def _run(self, x_ND: Tensor, expert_N: Tensor, counts_E: Tensor) -> Tensor:
        """Expert outputs [N, D] of scaled rows, of which each expert has counts_E, in their order."""
        sorted_ND, here_E, context = self.dispatcher.dispatch(x_ND, expert_N, counts_E)
        return self.dispatcher.combine(self.experts(sorted_ND, here_E), context)

    def _taken(self, x_TD: Tensor, logits_TE: Tensor, expert_T: Tensor) -> Tensor:
        """The sum of what the experts that took a token make of it: none, one or several."""
        token_N, expert_N = self.choice(logits_TE.detach())
        score_N1 = torch.sigmoid(logits_TE[token_N, expert_N])[:, None].to(x_TD.dtype)
        taken_E = torch.bincount(expert_N, minlength=self.n_experts)
        routed_ND = self._run(x_TD.index_select(0, token_N) * score_N1, expert_N, taken_E)
        self.flips = len(expert_T) - (expert_T[token_N] == expert_N).sum()
        return torch.zeros_like(x_TD).index_add(0, token_N, routed_ND)

    def choose(self, logits_TE: Tensor) -> Tensor:
        """The expert of each token, int64 [T]: argmax of raw logits, plus the balancing bias while training."""
        raw_T = logits_TE.detach().argmax(dim=-1)
        if not self.training or self.selection_bias_E is None:
            self.flips = None
            return raw_T
        biased_T = (logits_TE.detach() + self.selection_bias_E).argmax(dim=-1)
        self.flips = (biased_T != raw_T).sum()
        return biased_T


def moe_layers(model: nn.Module) -> list[MoE]:
    """The model's MoE modules in layer order."""
    return [m for m in model.modules() if isinstance(m, MoE)]


@contextmanager
def record_routes(model: nn.Module):
    """Yields a list that the model's forwards fill with expert ids [B, T], one entry a MoE layer, in layer order."""
    routes: list[Tensor] = []
    layers = moe_layers(model)
    for layer in layers:
        layer.record = routes
    try:
        yield routes
    finally:
        for layer in layers:
            layer.record = None
