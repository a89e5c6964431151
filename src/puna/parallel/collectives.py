"""The few collectives of the forward pass, each with the backward that its mathematics asks for.

    all-to-all       backward: the all-to-all the other way
    all-gather       backward: reduce-scatter (what each process did with the whole is summed)
    reduce-scatter   backward: all-gather

A group of one process is left alone: the functions return their argument.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed them
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, taken: list[int], given: list[int], group) -> Tensor:
        ctx.taken, ctx.given, ctx.group = taken, given, group
        out = x.new_empty(sum(taken), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), taken, given, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllToAll.apply(grad, ctx.given, ctx.taken, ctx.group), None, None, None


def all_to_all(x: Tensor, taken: list[int], given: list[int], group) -> Tensor:
    """Rows of x [sum(given), ...], `given[r]` of them to process r; returns `taken[r]` rows from each, in its order."""
    return x if dist.get_world_size(group) == 1 else _AllToAll.apply(x, taken, given, group)


def _gather(x: Tensor, dim: int, group) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty(first.shape[0] * dist.get_world_size(group), *first.shape[1:])
    all_gather_single(out, first, group=group)
    return out.movedim(0, dim)


def _scatter(x: Tensor, dim: int, group) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty(first.shape[0] // dist.get_world_size(group), *first.shape[1:])
    reduce_scatter_single(out, first, group=group)
    return out if dim % x.dim() == 0 else out.movedim(0, dim).contiguous()  # no view: FSDP warns of hooks that make one


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _scatter(grad, ctx.dim, ctx.group), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _gather(grad, ctx.dim, ctx.group), None, None


def all_gather(x: Tensor, dim: int, group) -> Tensor:
    """The processes' tensors behind each other in `dim`."""
    return x if dist.get_world_size(group) == 1 else _Gather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group) -> Tensor:
    """The sum of the processes' tensors, and of it this process's equal part of `dim`."""
    return x if dist.get_world_size(group) == 1 else _Scatter.apply(x, dim, group)
