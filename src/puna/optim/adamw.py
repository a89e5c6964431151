"""AdamW (arXiv 1711.05101), fused, with the parameter groups a Llama 4 wants.

Matrices decay; embeddings, norms, biases and position tables do not. A group's learning rate is the peak times its
own multiplier times the schedule, so one number is tuned:

    lr(group, step) = peak * multiplier(group) * wsd(step)

Adam moves every entry by about its learning rate a step, whatever the gradient's size, so a group's rate decides how
soon it learns against the others. The head may run ahead (it learns how often each token occurs), the adapter must
not: pushed early, all pictures become one constant vector, and what tells them apart is lost before it was worth
anything to the loss (docs/LOG.md). Nor may the feed-forward matrices, where attention has to find something first:
while they change, so does all that it looks for.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

GROUPS = ("matrix", "ffn", "embedding", "head", "vector", "router", "vision", "sight", "adapter")
DECAYING = ("matrix", "ffn", "vision", "adapter")


def group_of(name: str, parameter: torch.Tensor) -> str:
    """The group a parameter belongs to, by its plain name and rank."""
    if name.startswith("vision.") and not name.startswith(("vision.adapter.", "vision.projector.")):
        return "vision" if parameter.dim() == 2 and "positional" not in name else "sight"
    if name.endswith(".bias") or "norm" in name or parameter.dim() < 2:
        return "vector"
    if "embedding" in name:
        return "embedding"
    if name == "output.weight":
        return "head"
    if name.endswith("router.weight"):
        return "router"
    if name.startswith(("vision.adapter.", "vision.projector.")):
        return "adapter"
    if ".moe." in name or ".feed_forward." in name:
        return "ffn"
    return "matrix"


def build_adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
                multipliers: Mapping[str, float] | None = None) -> torch.optim.AdamW:  # fmt: skip
    """A fused AdamW over the trainable parameters; each group carries `peak`, which the loop scales by the schedule.

    Parameters that are sharded over different meshes (experts apart from the rest) can't share a fused step, so they
    are groups of the same name.
    """
    members: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (GROUPS.index(group_of(name, parameter)), getattr(parameter, "device_mesh", None))
            members.setdefault(key, []).append(parameter)
    groups = []
    for number, mesh in sorted(members, key=lambda key: key[0]):
        group, parameters = GROUPS[number], members[number, mesh]
        if parameters:
            groups.append({
                "params": parameters,
                "name": group,
                "peak": lr * (multipliers or {}).get(group, 1.0),
                "weight_decay": weight_decay if group in DECAYING else 0.0,
            })  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float, head: float | None = None) -> None:
    """Sets every group's learning rate to its peak times the schedule's multiplier; `head`: the head's own."""
    for group in optimizer.param_groups:
        own = head is not None and group["name"] == "head"
        group["lr"] = group["peak"] * (head if own else multiplier)
