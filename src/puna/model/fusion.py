"""Early fusion: where a token is `<|patch|>`, its embedding is replaced by the next image feature.

From the first layer on, text and image tokens are the same kind of thing: same causal attention, same experts
(llama4-facts.md §3.2). Features fill the patch positions in order, row by row of the batch.
"""

from __future__ import annotations

from torch import Tensor


def fuse(x_BTD: Tensor, tokens_BT: Tensor, features: Tensor | None, patch_token: int | None) -> Tensor:
    """x_BTD with the patch positions replaced by `features` [..., D].

    Errors: as many features as there are patch tokens, or a ValueError with both numbers; nothing is dropped or padded.
    """
    found = 0 if features is None else features.numel() // features.shape[-1]
    if patch_token is None:
        if found:
            raise ValueError("pictures were given, but the model's patch_token is not set (from the processor)")
        return x_BTD
    place = (tokens_BT.flatten() == patch_token).nonzero().squeeze(-1)
    if place.numel() != found:
        raise ValueError(f"{place.numel()} <|patch|> tokens, but {found} image features: pictures and tokens differ")
    if not found:  # features of no token still belong to the graph: every process's tower takes part in the backward
        return x_BTD if features is None else x_BTD + features.sum().to(x_BTD.dtype)
    flat = features.reshape(found, -1).to(x_BTD.dtype)
    return x_BTD.flatten(0, 1).index_copy(0, place, flat).view_as(x_BTD)
