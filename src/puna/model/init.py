"""Initial values: a function of (seed, parameter name, expert index) alone.

Any number of ranks, any order of construction and any sharding start bitwise equal, because every tensor (and every
expert of a batched one) draws from a generator keyed by its own name.

    embedding              N(0, 0.2^2): small, so that a few layers can rewrite a token (RMSNorm makes it 1 for them)
    matrices               N(0, 1/fan_in), truncated at 3 sigma
    wo, w2 (branch ends)   the same, times sqrt(4 / layers) beyond 4 layers, so that the residual's variance stays what
                           it is in four layers; in the vision tower, divided by sqrt(2 * layers). w2 also times
                           `ffn_init`: below 1, attention finds things before the experts have changed them
    router                 N(0, 1/fan_in) / 2: sigmoid scores near 1/2, experts chosen evenly
    head                   0: the first loss is ln(vocabulary), and no gradient reaches the body before the head has
                           learnt something to ask it for (arXiv 2203.03466, Appendix D.2)
    norms 1, biases 0; class token N(0, 1/width); vision positions N(0, 0.5^2), not much below the patches' own 1: where
    a thing is has to be read from a feature as well as what it is
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from puna.model.config import ModelConfig


def generator(seed: int, name: str, expert: int | None) -> torch.Generator:
    """The random source of one parameter (or one expert of it), keyed by its name."""
    key = hashlib.sha256(f"{seed}/{name}/{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def std_of(name: str, shape: tuple[int, ...], config: ModelConfig) -> float | None:
    """Standard deviation of a parameter's initial values; None: a constant, 1 for norms, else 0."""
    last = name.rsplit(".", 2)
    if name.endswith(".bias") or "norm" in last[-2] or name == "output.weight":
        return None
    if name == "tok_embeddings.weight":
        return 0.2
    if name == "vision.positional_embedding":
        return 0.5
    if name.startswith("vision.") and name.endswith("_embedding"):
        return config.vision.width**-0.5
    fan_in = shape[1]  # Linear [out, in] and input-major experts [E, in, out] alike
    std = fan_in**-0.5
    if name.endswith(("attention.wo.weight", "w2.weight", "experts.w2", "mlp.fc2.weight")):
        if name.startswith("vision."):
            return std / math.sqrt(2 * config.vision.layers)
        scale = 1.0 if name.endswith("attention.wo.weight") else config.ffn_init
        return scale * std * math.sqrt(min(1.0, 4 / config.n_layers))
    if name.endswith("router.weight"):
        return std / 2
    return std


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The fp32 initial value of one parameter (or one expert at a time inside a batched one)."""
    std = std_of(name, shape, config)
    if std is None:
        return torch.zeros(shape) if name.endswith(".bias") or name == "output.weight" else torch.ones(shape)
    if ".experts." in name:
        return torch.stack([_draw(shape[1:], std, seed, name, e) for e in range(shape[0])])
    return _draw(shape, std, seed, name, None)


def initial_part(name: str, shape: tuple[int, ...], runs, config: ModelConfig, seed: int) -> Tensor:
    """The part of `initial_value` that lies in `runs` of each dimension ([start, stop) pairs, one after the other); of
    experts no others are drawn."""
    std = std_of(name, shape, config)
    if ".experts." in name and std is not None:
        experts = [e for start, stop in runs[0] for e in range(start, stop)]
        drawn = [_runs(_draw(shape[1:], std, seed, name, e), runs[1:]) for e in experts]
        return torch.stack(drawn) if drawn else torch.empty(0, *(sum(b - a for a, b in r) for r in runs[1:]))
    return _runs(initial_value(name, shape, config, seed), runs)


def _runs(value: Tensor, runs) -> Tensor:
    for dim, pairs in enumerate(runs):
        value = torch.cat([value.narrow(dim, a, b - a) for a, b in pairs] or [value.narrow(dim, 0, 0)], dim)
    return value


def _draw(shape: tuple[int, ...], std: float, seed: int, name: str, expert: int | None) -> Tensor:
    value = torch.empty(shape)
    return torch.nn.init.trunc_normal_(value, 0.0, std, -3 * std, 3 * std, generator=generator(seed, name, expert))


@torch.no_grad()
def initialise(model, seed: int) -> None:
    """Fills every parameter of a (materialised) model in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed))
