"""New weights for a running model, all or nothing: reinforcement learning changes them under the engine's hands.

The tensors are copied into those the model has. So the devices, the types and whatever points at the parameters stay,
and a trainer's float32 becomes the engine's bfloat16 on the way. All is checked before the first copy: a model of half
old and half new weights would answer without a sign of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from puna.errors import PunaError

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def load(model: nn.Module, weights: Weights) -> None:
    """Copies `weights` into the model's state dict, whose names must all be there and no others. Raises PunaError."""
    new, own = dict(weights), model.state_dict(keep_vars=True)
    for what, names in (("lack", own.keys() - new.keys()), ("have unknown", new.keys() - own.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise PunaError(f"the new weights {what} {some} ({len(names)} in all): give the model's whole state dict")
    for name, tensor in new.items():
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            raise PunaError(
                f"{name}: the new weights have {tensor.dtype} {list(tensor.shape)}, the model has {own[name].dtype} "
                f"{list(own[name].shape)}: give weights of the same model, quantised alike"
            )
    with torch.no_grad():
        for name, tensor in new.items():
            own[name].copy_(tensor)
