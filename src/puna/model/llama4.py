"""Llama 4, top to bottom: embed, fuse pictures in, 48 (or 4) blocks of attention and experts, norm, head.

Read this file first; each line that is special to Llama 4 lives in the module it names: `attention` (iRoPE: local
chunks and global NoPE layers), `moe` (top-1 sigmoid-on-input routing), `vision` and `fusion` (native multimodality).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puna.errors import PunaError
from puna.model import ops, rope
from puna.model.attention import Attention, Cache, Layout, make_layout
from puna.model.config import ModelConfig, ParameterCount, count_parameters
from puna.model.fusion import fuse
from puna.model.init import initialise
from puna.model.moe import FeedForward, MoE
from puna.model.vision import VisionTower
from puna.model.weights import plain


class Share(Protocol):
    """What the model needs where each process has a part of every row's tokens (`parallel/context.py`)."""

    def features(self, model: Llama4, tiles: Tensor | None) -> Tensor | None:
        """[n, D]: features of the whole rows' tiles, or None where no process has any."""

    def cut(self, tokens_BT: Tensor, features: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor | None, Layout]:
        """This process's part of all three."""


class RMSNorm(nn.Module):
    """RMS norm with a learned scale (eps 1e-5 in the released models)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """x + Attention(norm x), then x + (MoE or dense FFN)(norm x)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        if config.is_moe(layer):
            self.moe = MoE(config)
        else:
            self.feed_forward = FeedForward(config.d_model, config.dense_width)

    def forward(self, x_BTD: Tensor, layout: Layout, cache: Cache | None, route_BT: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), layout, cache)
        h_BTD = self.ffn_norm(x_BTD)
        if hasattr(self, "moe"):
            return x_BTD + self.moe(h_BTD, route_BT)
        return x_BTD + self.feed_forward(h_BTD)


class Llama4(nn.Module):
    """A natively multimodal mixture of experts.

    Built on the meta device, parameters have shapes but no storage (planning, streaming loads); otherwise they are
    initialised from `seed` (see `init.py`). `compute_dtype` is the dtype of activations; None follows the parameters.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model, _weight=torch.empty(
            config.vocab_size, config.d_model))  # fmt: skip
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.vision = VisionTower(config.vision, config.d_model) if config.vision else None
        self.share: Share | None = None  # of every row's tokens, where several processes share its work
        self.pipeline = None  # where processes have different blocks (parallel/pipeline.py)
        self.parts: dict[str, Any] = {}  # what of each parameter this process has, where several share them
        self.recompute = 0  # every n-th block's activations are computed again in the backward; 0: none
        self._freqs: Tensor | None = None
        if self.norm.weight.device.type != "meta":
            initialise(self, seed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output matrix, or the embedding when tied."""
        return self.tok_embeddings.weight if self.config.tie_embeddings else self.output.weight

    def forward(self, tokens_BT: Tensor, tiles: Tensor | None = None, doc_ids_BT: Tensor | None = None,
                routes=None, cache: Cache | None = None, features: Tensor | None = None) -> Tensor:  # fmt: skip
        """float32 logits [B, T, V]; arguments as in `hidden`."""
        return self.head(self.hidden(tokens_BT, tiles, doc_ids_BT, routes, cache, features))

    def hidden(self, tokens_BT: Tensor, tiles: Tensor | None = None, doc_ids_BT: Tensor | None = None,
               routes=None, cache: Cache | None = None, features: Tensor | None = None,
               x_BTD: Tensor | None = None, layers: range | None = None) -> Tensor:  # fmt: skip
        """The last hidden state after the final norm, [B, T, D].

        tokens_BT: int64 ids. tiles: normalised [N, 3, S, S] in reading order, or `features` [n, D] already encoded;
        either fills the `<|patch|>` positions in order. doc_ids_BT: packed documents, -1 for padding; attention never
        crosses documents and positions restart. routes: a [B, T] int64 tensor for each MoE layer (a sequence), -1 for
        tokens left to the router. cache: decode with keys and values of earlier tokens (no doc_ids then). layers: only
        these blocks, from the stream x_BTD on that comes out of those before them, as a pipeline's stages go on; the
        norm comes behind the last block.
        """
        c = self.config
        if cache is not None and doc_ids_BT is not None:
            raise PunaError("cache and doc_ids_BT cannot be combined: a cache holds one document per sequence")
        if tiles is not None and features is not None:
            raise PunaError("give tiles or features, not both")
        if self.share is not None and x_BTD is None:
            features = self.share.features(self, tiles)
        elif tiles is not None and len(tiles):
            features = self.image_features(tiles)
        layout = self.layout(tokens_BT, doc_ids_BT, cache)
        if self.share is not None:
            tokens_BT, features, layout = self.share.cut(tokens_BT, features, layout)
        if x_BTD is None:
            x_BTD = nn.functional.embedding(tokens_BT, self.tok_embeddings.weight).to(self.dtype)
            x_BTD = fuse(x_BTD, tokens_BT, features, c.patch_token)
        layers = range(c.n_layers) if layers is None else layers
        x_BTD = self.run(x_BTD, layers, layout, cache, routes)
        return self.norm(x_BTD) if layers.stop == c.n_layers else x_BTD

    def layout(self, tokens_BT: Tensor, doc_ids_BT: Tensor | None = None, cache: Cache | None = None) -> Layout:
        """Positions and visibility of whole rows."""
        if self._freqs is None or self._freqs.device != tokens_BT.device:
            self._freqs = rope.frequencies(self.config, tokens_BT.device)
        return make_layout(self.config, tokens_BT, doc_ids_BT, cache, self._freqs, self.dtype)

    def run(self, x_BTD: Tensor, layers: range, layout: Layout, cache: Cache | None = None, routes=None) -> Tensor:
        """[B, T, D] through some of the blocks."""
        route = iter(routes) if routes is not None else None
        for i in layers:
            layer = self.layers[i]
            route_BT = next(route) if route is not None and self.config.is_moe(i) else None
            if self.recompute and self.training and i % self.recompute == 0:
                x_BTD = checkpoint(layer, x_BTD, layout, cache, route_BT, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, layout, cache, route_BT)
        return x_BTD

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] to float32 logits [..., V]."""
        logits = ops.linear(hidden, self.head_weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def image_features(self, tiles: Tensor) -> Tensor:
        """Tiles [N, 3, S, S] to features [N, tokens_per_tile, D]."""
        if self.vision is None:
            raise PunaError("this model has no vision tower (config.vision is None), but pictures were given")
        return self.vision(tiles.to(self.dtype))

    def parameter_count(self) -> ParameterCount:
        """Parameters by part, and active per token; works on the meta device."""
        return count_parameters(self.config, {n: tuple(p.shape) for n, p in plain(self).items()})
