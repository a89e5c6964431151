"""Makes a model parallel, in one order: cut by pp, ep and tp -> hooks -> FSDP2 -> storage -> values.

The model is built on the meta device, so no process ever holds more than its parts. Values come afterwards, parameter
by parameter: initial ones are a function of (seed, name, expert), a checkpoint is read in slices; so any number of
processes starts bitwise equal.

FSDP2 in four kinds of units, each with the mesh of what it holds (layout.py): attention; feed-forward or shared
expert; experts; a block's rest (norms, router), and at the root embedding, head and last norm. The first three gather
their weights in the compute dtype, the rest in float32, as `ops.linear` casts them on one process too. Gradients are
summed, never averaged: the loss is divided by the step's valid tokens of all processes (train/step.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from puna.errors import PunaError
from puna.model import Llama4, ModelConfig
from puna.model.init import initial_part
from puna.model.moe import MoE, moe_layers
from puna.parallel.collectives import all_gather, reduce_scatter
from puna.parallel.context import RowShare
from puna.parallel.expert import AllToAllDispatcher
from puna.parallel.layout import Part, is_expert, shard_bounds, tensor_parallel
from puna.parallel.mesh import Mesh
from puna.parallel.pipeline import Pipeline

Values = Callable[[str, Part], Tensor]  # the numbers of a part of a parameter


def build_model(config: ModelConfig, mesh: Mesh, values: Values | int, dtype: torch.dtype = torch.float32,
                compute: torch.dtype | None = None) -> Llama4:  # fmt: skip
    """A model of which this process has its parts, in `dtype`, filled by `values` or initialised from a seed.

    compute: the dtype of activations and gathered matrices (None: dtype). Errors: PunaError naming a setting that does
    not fit the model.
    """
    model = _empty(config, dtype)
    model.master_dtype = dtype
    if mesh.layout.pp > 1:
        model.pipeline = Pipeline(mesh, config.n_layers)
        _keep(model, model.pipeline.stages)
    parts = _cut(model, mesh)
    _hook(model, mesh)
    model.compute_dtype = compute
    model.share = RowShare(mesh, config.chunk, config.patch_token)
    _shard(model, mesh, model.dtype)
    model.to_empty(device=mesh.device)
    if isinstance(values, int):
        values = _drawn(config, values)
    model.parts = {name: _own(parts[name], parameter) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.to_local().copy_(values(name, model.parts[name]))
    return model


def whole_model(model: Llama4, mesh: Mesh) -> Llama4 | None:
    """A copy of the whole model on the main process's CPU, for what only one process does; None elsewhere. It has to
    fit there. All processes call it."""
    names = {name: tuple(p.shape) for name, p in _empty(model.config, torch.float32).named_parameters()}
    held, values = dict(model.named_parameters()), {}
    for name, shape in names.items():
        whole = torch.zeros(shape, dtype=model.master_dtype, device=mesh.device)
        if name in held and not mesh.at["dp_replicate"]:
            part, own = model.parts[name], held[name].detach().to_local()
            for where, here in part.blocks():
                whole[where] = own[here]
        dist.reduce(whole, 0)
        if mesh.is_main:
            values[name] = whole.cpu()
    if not mesh.is_main:
        return None
    copy = _empty(model.config, model.master_dtype)
    copy.load_state_dict(values, assign=True)
    copy.compute_dtype = model.compute_dtype
    return copy


def _drawn(config: ModelConfig, seed: int) -> Values:
    return lambda name, part: initial_part(name, part.shape, part.runs, config, seed)


def _empty(config: ModelConfig, dtype: torch.dtype) -> Llama4:
    with torch.device("meta"):
        return Llama4(config).to(dtype)


def parts_of(model: Llama4) -> dict[str, Part]:
    """What this process has of each of its parameters."""
    return model.parts


def _keep(model: Llama4, stages: list[range]) -> None:
    """Takes the parameters out of all modules whose work other stages do; the modules stay, and so do all names."""
    blocks = {i for stage in stages for i in stage}
    others = [block for i, block in enumerate(model.layers) if i not in blocks]
    if 0 not in blocks:
        others += [model.tok_embeddings, *([model.vision] if model.vision is not None else [])]
    if len(model.layers) - 1 not in blocks:
        others += [model.norm, model.output]
    for other in others:
        for module in other.modules():
            for name in list(module._parameters):
                module.register_parameter(name, None)


def _held(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _cut(model: Llama4, mesh: Mesh) -> dict[str, Part]:
    """Replaces parameters by this process's parts, still without storage, before FSDP shards them further."""
    config, layout = model.config, mesh.layout
    parts = {}
    for name, parameter in list(model.named_parameters()):
        part = Part.whole(tuple(parameter.shape))
        if is_expert(name):
            part = part.share(0, mesh.at["ep"], layout.ep)
        else:
            part = tensor_parallel(name, part, config, mesh.at["tp"], layout.tp)
        parts[name] = part
        owner, _, last = name.rpartition(".")
        local = torch.empty(part.local, dtype=parameter.dtype, device="meta")
        setattr(model.get_submodule(owner), last, nn.Parameter(local))
    return parts


def _hook(model: Llama4, mesh: Mesh) -> None:
    """Dispatchers, and around what tp cuts: the row's tokens are gathered before it, its sum is scattered behind it."""
    layout = mesh.layout
    if layout.ep > 1:
        for moe in moe_layers(model):
            moe.dispatcher = AllToAllDispatcher(mesh.ep)
    if layout.tp == 1:
        return
    for block in model.layers:
        attention = block.attention
        attention.config = replace(attention.config, n_heads=attention.config.n_heads // layout.tp,
                                   n_kv_heads=attention.config.n_kv_heads // layout.tp)  # fmt: skip
        _around(attention, 1, mesh.tp)
        _around(block.moe.shared if hasattr(block, "moe") else block.feed_forward, -2, mesh.tp)


def _around(module: nn.Module, dim: int, group) -> None:
    module.register_forward_pre_hook(lambda _, given: (all_gather(given[0], dim, group), *given[1:]))
    module.register_forward_hook(lambda _, __, out: reduce_scatter(out, dim, group))


def _shard(model: Llama4, mesh: Mesh, compute: torch.dtype) -> None:
    mixed = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.promote_types(compute, torch.float32),
                                 cast_forward_inputs=False)  # fmt: skip
    units = []

    def unit(module: nn.Module, over, policy: MixedPrecisionPolicy | None = None, **options) -> None:
        policy = policy or MixedPrecisionPolicy(cast_forward_inputs=False)
        options = {"reshard_after_forward": mesh.layout.pp == 1} | options
        fully_shard(module, mesh=over, mp_policy=policy, **options)
        units.append(module)

    for block in filter(_held, model.layers):
        unit(block.attention, mesh.dense, mixed)
        if hasattr(block, "moe"):
            unit(block.moe.shared, mesh.dense, mixed)
            unit(block.moe.experts, mesh.expert, mixed, shard_placement_fn=_expert_placement(block.moe, mesh))
        else:
            unit(block.feed_forward, mesh.dense, mixed)
        unit(block, mesh.full)
    if model.vision is not None and _held(model.vision):
        for block in model.vision.layers:
            unit(block, mesh.full)
        unit(model.vision, mesh.full)
    unit(model, mesh.full, reshard_after_forward=False)
    for module in units:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")


def _expert_placement(moe: MoE, mesh: Mesh) -> Callable[[nn.Parameter], Shard]:
    """Experts are sharded whole where there are enough of them, else by their input dimension."""
    shards = mesh.expert.size(1)

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(0 if len(parameter) % shards == 0 or parameter.shape[1] % shards else 1)

    return placement


def _own(part: Part, parameter: nn.Parameter) -> Part:
    """The part that is left of a part when FSDP has sharded it."""
    if not isinstance(parameter, DTensor):
        raise PunaError("a parameter was left out of FSDP")
    index, of = parameter.device_mesh.get_coordinate()[-1], parameter.device_mesh.size(-1)
    dim = parameter.placements[-1].dim
    return part.window(dim, *shard_bounds(part.local[dim], index, of))
