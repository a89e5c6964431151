"""Muon on sharded parameters: the same step as in one process."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from training_helpers import CONFIG, lively_model, random_batch  # noqa: E402

from puna.errors import PunaError  # noqa: E402
from puna.model.moe import moe_layers  # noqa: E402
from puna.optim import build_muon  # noqa: E402
from puna.optim.adamw import set_lr  # noqa: E402
from puna.parallel.apply import build_model  # noqa: E402
from puna.parallel.layout import Layout  # noqa: E402
from puna.parallel.mesh import Mesh  # noqa: E402
from puna.train import checkpoint  # noqa: E402
from puna.train.balance import BALANCING  # noqa: E402
from puna.train.step import train_step  # noqa: E402
from puna.train.terms import NextToken  # noqa: E402

UNEVEN = dataclasses.replace(CONFIG, n_experts=3, d_model=30, head_dim=10)  # two ranks divide hardly anything evenly


def optimizer(model):
    made = build_muon(model, 0.02, 0.3, (0.9, 0.99), 1e-8)
    set_lr(made, 1.0)
    return made


def gradient(name, shape, step):
    """The same on every rank; the second expert has none in the second step."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name) + step))
    if ".experts." in name and step == 1:
        whole[1] = 0
    return whole


def hash_of(name):
    return sum(map(ord, name)) * 10


def alone(config, steps=3):
    """Parameters after some steps in one process."""
    model = lively_model(config=config)
    made = optimizer(model)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, parameter.shape, step)
        made.step()
    return dict(model.named_parameters())


def shard(model, mesh, placements):
    """Every parameter as a DTensor; `placements(name, parameter)` says where it lies."""
    for name, parameter in list(model.named_parameters()):
        holder, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        placed = distribute_tensor(parameter.detach(), mesh, placements(name, parameter))
        setattr(holder, last, nn.Parameter(placed))


def by_hand(rank, uneven, shape, names, where):
    config = UNEVEN if uneven else CONFIG
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = lively_model(config=config)
    shard(model, mesh, where)
    made = optimizer(model)
    for step in range(3):
        for name, parameter in model.named_parameters():
            whole = gradient(name, parameter.shape, step)
            parameter.grad = distribute_tensor(whole, mesh, parameter.placements)
        made.step()
    for name, expected in alone(config).items():
        parameter = dict(model.named_parameters())[name]
        got = parameter.full_tensor()  # AdamW's last, incomplete vector is rounded otherwise where shards are uneven
        assert torch.equal(got, expected) or config is UNEVEN and float((got - expected).abs().max()) < 1e-6, name
        assert parameter.to_local().numel() < expected.numel() or Replicate() in parameter.placements, name
        for value in made.state[parameter].values():
            assert value.dim() == 0 or value.placements == parameter.placements, name


def rows(name, parameter):
    return [Shard(0)]


def columns(name, parameter):
    return [Shard(parameter.dim() - 1)]


def replicated_rows(name, parameter):
    return [Replicate(), Shard(0)]


@pytest.fixture(scope="module", autouse=True)
def fresh(pool):
    """Workers of its own: gathering a DTensor leaves caches that name process groups, which end with each run."""
    pool.close()
    yield
    pool.close()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("where", [rows, columns])
def test_two_ranks_make_the_step_of_one(pool, uneven, where):
    """Rows (FSDP; experts by expert) or columns (within every expert): bitwise the same parameters."""
    pool.run(by_hand, 2, uneven, (2,), ("shard",), where)


def test_two_copies_of_two_ranks(pool):
    pool.run(by_hand, 4, False, (2, 2), ("copies", "shards"), replicated_rows)


def under_fsdp(rank):
    model, twin = lively_model(), lively_model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    made, plain = optimizer(model), optimizer(twin)
    for step in range(3):
        batch = random_batch(step)  # the same on all ranks: FSDP's mean gradient is that of one
        for each, one in ((model, made), (twin, plain)):
            each(batch.tokens_BT, batch.tiles, batch.doc_ids_BT).logsumexp(-1).mean().backward()
            one.step()
            one.zero_grad()
    start = dict(lively_model().named_parameters())
    for name, parameter in model.named_parameters():
        expected = dict(twin.named_parameters())[name].detach()
        got = parameter.full_tensor().detach()
        assert float((got - expected).norm() / expected.norm()) < 1e-5, name
        assert not torch.equal(got, start[name]), name


def test_under_fsdp_a_model_trains_as_on_one_rank(pool):
    pool.run(under_fsdp, 2)


def runs_of(whole, runs):
    for dim, pairs in enumerate(runs):
        whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in pairs], dim)
    return whole


def share_of(batch, rank, ranks):
    return batch.split(ranks)[rank]


def steps(model, made, balancer, batches, mesh=None):
    """Three optimizer steps; the balance metrics and the parameters after them."""
    told = []
    for step in range(3):
        mine = batches(step)
        balancer.apply(1.0, random_batch(step).tokens_BT.numel())
        result = train_step(model, made, [mine], NextToken(), 1.0, 64, mesh)
        balancer.adjust(result.counts, result.seen)
        told.append((result.loss, result.metrics["router/max_load"], balancer.measures()))
    return told


def in_parallel(rank, layout, kind):
    mesh = Mesh(Layout(**layout).resolve(2))
    start = dict(lively_model().named_parameters())
    model = build_model(CONFIG, mesh, lambda name, part: runs_of(start[name].detach(), part.runs)).train()
    balancer = BALANCING[kind](model, 0.05 if kind != "expert_choice" else None)
    told = steps(model, optimizer(model), balancer, lambda step: share_of(random_batch(step), rank, 2), mesh)
    plain, weights = dict(model.named_parameters()), {}
    for name, part in model.parts.items():
        weights[name] = (part.runs, plain[name].to_local().detach().clone())
    return told, weights, balancer.tensors()


@pytest.mark.parametrize("kind", ["bias", "auxiliary"])
@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"dp_replicate": 2}, {"ep": 2}], ids=["fsdp", "copies", "experts"])
def test_balance_and_muon_in_the_parallel_model(pool, layout, kind):
    """Two ranks with half of the rows each: weights, balance and its measures are those of one."""
    model = lively_model().train()
    balancer = BALANCING[kind](model, 0.05)
    told = steps(model, optimizer(model), balancer, random_batch)
    expected = dict(model.named_parameters())
    for theirs, weights, state in pool.run(in_parallel, 2, layout, kind):
        for (loss, load, measures), (a, b, c) in zip(told, theirs, strict=True):
            assert a == pytest.approx(loss, rel=1e-5) and b == pytest.approx(load)
            assert all(c[name] == pytest.approx(value, rel=1e-4) for name, value in measures.items()) and c.keys()
        for name, (runs, got) in weights.items():
            whole = runs_of(expected[name].detach(), runs)
            limit = 1e-4 if whole.dim() > 1 else 1e-3  # Adam on biases: a gradient near 0 over its own size
            assert float((got - whole).norm() / whole.norm()) < limit, name
        for name, value in balancer.tensors().items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
    assert len(moe_layers(model)) == 2


def saves(rank, folder):
    """Two steps on two processes, which then write one checkpoint together."""
    mesh = Mesh(Layout(dp_shard=2).resolve(2))
    start = dict(lively_model().named_parameters())
    model = build_model(CONFIG, mesh, lambda name, part: runs_of(start[name].detach(), part.runs)).train()
    made, balancer = optimizer(model), BALANCING["expert_choice"](model)
    for step in range(2):
        batch = share_of(random_batch(step), rank, 2)
        balancer.apply(1.0)
        result = train_step(model, made, [batch], NextToken(), 1.0, 64, mesh)
        balancer.adjust(result.counts, result.seen)
    checkpoint.save(folder, 2, False, {"model": CONFIG.to_dict()}, model, None, made, balancer, mesh)
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in made.state[parameter].items():
            moments[name, key] = value.full_tensor() if hasattr(value, "full_tensor") else value
    return moments, balancer.tensors()


@pytest.mark.filterwarnings("ignore:resuming")
def test_one_process_goes_on_from_two_processes_moments(pool, tmp_path):
    (moments, gates), (others, same) = pool.run(saves, 2, tmp_path, timeout=240)
    assert {key for _, key in moments} == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(others[at], value) for at, value in moments.items())
    model = lively_model()
    made, balancer = optimizer(model), BALANCING["expert_choice"](model)
    assert checkpoint.resume(tmp_path, model, made, balancer)["step"] == 2
    names = {id(p): name for name, p in model.named_parameters()}
    read = {(names[id(p)], key): value for p, state in made.state.items() for key, value in state.items()}
    assert read.keys() == moments.keys() and all(torch.equal(read[at], value) for at, value in moments.items())
    for name, value in balancer.tensors().items():
        assert torch.equal(value, gates[name]) and torch.equal(value, same[name]) and value[:, 2].min() > 0


def cut(rank):
    model = build_model(dataclasses.replace(CONFIG, n_kv_heads=2), Mesh(Layout(tp=2).resolve(2)), 0)
    with pytest.raises(PunaError, match="muon needs whole matrices, parallel.tp"):
        optimizer(model)


def test_tensor_parallelism_is_refused(pool):
    pool.run(cut, 2)
