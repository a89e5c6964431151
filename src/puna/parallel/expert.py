"""Expert parallelism: tokens go to their experts and come back (all-to-all), uneven as the router made them.

    sort by expert -> counts to everybody -> rows to the processes whose experts they chose -> sort what came by expert
    experts        -> unsort              -> rows back                                      -> unsort

Process r of the group holds experts r E/ep .. (r+1) E/ep - 1, so rows sorted by expert are sorted by process too. What
comes is ordered by sender, then expert; one more sort brings each expert's rows together. Nothing is dropped or padded.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from puna.model import ops
from puna.model.moe import LocalDispatcher
from puna.parallel.collectives import all_to_all


class AllToAllDispatcher(LocalDispatcher):
    """`LocalDispatcher`'s two methods with experts on several processes."""

    def __init__(self, group):
        self.group, self.size = group, dist.get_world_size(group)

    def dispatch(self, x_TD: Tensor, expert_T: Tensor, counts_E: Tensor):
        """As LocalDispatcher: (rows sorted by the experts of this process, how many each has, a context)."""
        sorted_TD, _, own = super().dispatch(x_TD, expert_T, counts_E)
        came_E = torch.empty_like(counts_E)  # [sender, expert of mine], flat
        dist.all_to_all_single(came_E, counts_E, group=self.group)
        given = counts_E.view(self.size, -1).sum(1).tolist()
        came_RE = came_E.view(self.size, -1)
        taken = came_RE.sum(1).tolist()
        came_SD = all_to_all(sorted_TD, taken, given, self.group)
        experts = torch.arange(came_RE.shape[1], device=x_TD.device).repeat(self.size)
        order_S = torch.argsort(torch.repeat_interleave(experts, came_E), stable=True)
        inverse_S = torch.empty_like(order_S)
        inverse_S[order_S] = torch.arange(len(order_S), device=x_TD.device)
        context = (own, order_S, inverse_S, taken, given)
        return ops.permute_rows(came_SD, order_S, inverse_S), came_RE.sum(0), context

    def combine(self, y_SD: Tensor, context) -> Tensor:
        """Rows back where and in the order they came from."""
        own, order_S, inverse_S, taken, given = context
        back_TD = all_to_all(ops.permute_rows(y_SD, inverse_S, order_S), given, taken, self.group)
        return super().combine(back_TD, own)
