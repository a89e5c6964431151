"""A small Llama 4 of each kind, a batch with pictures, and a step on one process or many."""

import socket
from functools import cache

import torch

from puna.data import Batch
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.parallel.apply import build_model, parts_of
from puna.parallel.layout import Layout
from puna.parallel.mesh import Mesh
from puna.precision.fp8_training import attach
from puna.train.step import train_step
from puna.train.terms import NextToken

CHUNK, T, ROWS, PATCH, TILE_TOKENS = 16, 64, 4, 3, 4
KINDS = {
    "scout": dict(n_experts=4, moe_step=1, qk_norm=True),
    "maverick": dict(n_experts=8, moe_step=2, qk_norm=False),
    "sixteens": dict(n_experts=4, moe_step=2, qk_norm=True, expert_width=32, dense_width=64),  # sizes that FP8 needs
}


def config(kind: str, vision: bool = True) -> ModelConfig:
    return ModelConfig(
        vocab_size=64, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=8,
        chunk=CHUNK, floor_scale=16, attn_scale=0.3, max_context=4 * T, patch_token=PATCH if vision else None,
        vision=VisionConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=24, adapter_width=20)
        if vision else None, **(dict(expert_width=24, dense_width=40) | KINDS[kind]),
    )  # fmt: skip


def batch(seed: int = 0, packed: bool = True, pictures: bool = True) -> Batch:
    """Rows of two long documents or of one, padding at the end of the last, pictures in some rows and not in others."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 64, (ROWS, T), generator=random)
    docs = torch.zeros(ROWS, T, dtype=torch.int64)
    if packed:
        docs[:, T // 2 :] = 1
        docs[1, 8:16], docs[1, 16:32] = 2, 3
        docs[-1, -5:] = -1
    tiles_B = [0] * ROWS
    if pictures:
        tiles_B[1], tiles_B[2] = 1, 2
        tokens[1, 33 : 33 + TILE_TOKENS] = PATCH
        tokens[2, 14 : 14 + 2 * TILE_TOKENS] = PATCH
    valid = torch.zeros(ROWS, T, dtype=torch.bool)
    valid[:, :-1] = (docs[:, 1:] == docs[:, :-1]) & (docs[:, 1:] >= 0) & (tokens[:, 1:] != PATCH)
    targets = torch.roll(tokens, -1, 1).masked_fill(~valid, 0)
    tiles = torch.rand(sum(tiles_B), 3, 16, 16, generator=random) * 2 - 1 if pictures else None
    return Batch(tokens, targets, valid, docs, tiles, tuple(tiles_B), ("x",) * ROWS, tuple(range(ROWS)))


@cache
def awake(config: ModelConfig, dtype) -> dict[str, torch.Tensor]:
    """Weights of which none is zero or special: heads, biases and norms too."""
    model = Llama4(config, seed=1)
    random = torch.Generator().manual_seed(7)
    return {n: (p.detach() + 0.1 * torch.randn(p.shape, generator=random)).to(dtype)
            for n, p in model.named_parameters()}  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Remember(torch.optim.SGD):
    """Keeps the gradients it was asked to apply."""

    def step(self, closure=None):
        self.seen = {id(p): p.grad.clone() for group in self.param_groups for p in group["params"]}
        return super().step(closure)


def one_step(model, batches, mesh=None, clip=1e9, slice_size=7, fp8="off"):
    optimizer = Remember(model.parameters(), lr=0.1)
    attach(model, fp8)
    model.train()
    result = train_step(model, optimizer, batches, NextToken(), clip, slice_size, mesh)
    return result, {name: optimizer.seen[id(p)] for name, p in model.named_parameters()}


@cache
def alone(kind, dtype=torch.float64, accumulate=1, clip=1e9, fp8="off", **options):
    """(result, gradients, weights after it) of a step on one process."""
    c = config(kind, options.get("pictures", True))
    model = Llama4(c).to(dtype)
    model.load_state_dict(awake(c, dtype))
    result, gradients = one_step(model, batch(**options).split(accumulate), clip=clip, fp8=fp8)
    return result, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}


def parallel_step(rank, kind, layout, dtype, accumulate, clip, recompute, options, fp8="off"):
    """The same on this process of several: (result, this process's gradients and weights with their parts)."""
    import torch.distributed as dist

    mesh = Mesh(Layout(**layout).resolve(dist.get_world_size()))
    c = config(kind, options.get("pictures", True))
    weights = awake(c, dtype)
    model = build_model(c, mesh, lambda name, part: part.cut(weights[name]), dtype)
    model.recompute = recompute
    mine = batch(**options).split(mesh.layout.rows)[mesh.rows_index]
    result, gradients = one_step(model, mine.split(accumulate), mesh, clip, fp8=fp8)
    parts = parts_of(model)
    return result, {
        name: (parts[name], gradients[name].to_local(), p.detach().to_local().clone())
        for name, p in model.named_parameters()
    }
