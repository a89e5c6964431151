"""The vision tower: a ViT over square tiles, pixel shuffle, adapter, projector (llama4-facts.md §3.1-3.2).

One tile [3, S, S] becomes (S/p)^2 patches (channel-major: all of red, then green, then blue) plus a class token that
comes *last*. Learned positions are added and 2-D rotary positions turn queries and keys. After the last norm the
class token is dropped, each 2 x 2 square of patches is folded into one token (row offset outermost), and an adapter
MLP, GELU after its *last* layer too, and a projector bring it to the text model's width.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from puna.model import ops, rope
from puna.model.attend import attend
from puna.model.config import VisionConfig


class VisionAttention(nn.Module):
    """Full attention over the patches of one tile, with biases and 2-D rotary positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        for name in ("wq", "wk", "wv", "wo"):
            setattr(self, name, nn.Linear(config.width, config.width))

    def forward(self, x_NPW: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (
            ops.linear(x_NPW, w.weight, w.bias).unflatten(-1, (self.heads, self.head_dim))
            for w in (self.wq, self.wk, self.wv)
        )
        q, k = (rope.rotate(t, rotation).to(v.dtype) for t in (q, k))
        out_NPhd = attend(q, k, v, causal=False)
        return ops.linear(out_NPhd.flatten(2), self.wo.weight, self.wo.bias)


class VisionMLP(nn.Module):
    """fc2(gelu(fc1 x)); the adapter (`last_gelu`, no biases) applies GELU once more."""

    def __init__(self, inner: int, hidden: int, outer: int, bias: bool = True, last_gelu: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(inner, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, outer, bias=bias)
        self.last_gelu = last_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = ops.linear(F.gelu(ops.linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias)
        return F.gelu(x) if self.last_gelu else x


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose fp32 parameters follow the activations' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class VisionBlock(nn.Module):
    """Pre-norm transformer block of the encoder."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.width, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.norm2 = LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = VisionMLP(config.width, config.mlp_width, config.width)

    def forward(self, x_NPW: Tensor, rotation: Tensor) -> Tensor:
        x_NPW = x_NPW + self.attention(self.norm1(x_NPW), rotation)
        return x_NPW + self.mlp(self.norm2(x_NPW))


def patchify(tiles_NCSS: Tensor, patch: int) -> Tensor:
    """[N, 3, S, S] -> [N, (S/p)^2, 3 p^2], patches row-major, each channel-major (a convolution's unfold)."""
    N, C, S, _ = tiles_NCSS.shape
    g = S // patch
    x = tiles_NCSS.reshape(N, C, g, patch, g, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(N, g * g, C * patch * patch)


def pixel_shuffle(x_NPW: Tensor, side: int) -> Tensor:
    """Folds side x side squares of patches into channels: [N, g^2, W] -> [N, (g/side)^2, side^2 W]."""
    N, P, W = x_NPW.shape
    g = round(P**0.5)
    x = x_NPW.reshape(N, g // side, side, g // side, side, W).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, (g // side) ** 2, side * side * W)


class VisionTower(nn.Module):
    """Tiles [N, 3, S, S], normalised to [-1, 1], to features [N, tokens_per_tile, d_model]."""

    def __init__(self, config: VisionConfig, d_model: int):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.patches + 1, config.width))
        self.norm_pre = LayerNorm(config.width, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm_post = LayerNorm(config.width, eps=config.norm_eps)
        folded = config.width * config.shuffle**2
        self.adapter = VisionMLP(folded, config.adapter_width, config.adapter_width, bias=False, last_gelu=True)
        self.projector = nn.Linear(config.adapter_width, d_model, bias=False)

    def forward(self, tiles_NCSS: Tensor) -> Tensor:
        c = self.config
        if tuple(tiles_NCSS.shape[1:]) != (3, c.image_size, c.image_size):
            raise ValueError(
                f"tiles must be [N, 3, {c.image_size}, {c.image_size}], got {list(tiles_NCSS.shape)}: "
                "the processor's tile size and the model's vision.image_size differ"
            )
        x = ops.linear(patchify(tiles_NCSS, c.patch_size), self.patch_embedding.weight)
        x = torch.cat([x, self.class_embedding.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        x = self.norm_pre(x + self.positional_embedding.to(x.dtype))
        rotation = rope.rotation_2d(c.grid, c.head_dim, c.rope_theta, x.device)
        for layer in self.layers:
            x = layer(x, rotation)
        x = self.norm_post(x)[:, :-1]
        return ops.linear(self.adapter(pixel_shuffle(x, c.shuffle)), self.projector.weight)
