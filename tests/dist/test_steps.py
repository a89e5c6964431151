"""Steps of many processes beyond the plain one: pipelines, balancing, bfloat16, tied embeddings, a gradient that is not
finite on one process, micro-batches that hold nothing. Each against one process."""

import dataclasses
import time
import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from dist_helpers import ROWS, Remember, T, awake, batch, config

from puna.model import Llama4
from puna.optim import build_muon
from puna.optim.adamw import set_lr
from puna.parallel.apply import build_model, parts_of
from puna.parallel.layout import Layout
from puna.parallel.mesh import Mesh
from puna.train import Evaluation
from puna.train.balance import BALANCING
from puna.train.loop import _evaluate
from puna.train.metrics import NoMetrics
from puna.train.step import local, train_step
from puna.train.terms import NextToken


def messages(rank, layout, micro):
    """Most of this process's messages that were in memory at once, of each kind; loss of the step."""
    mesh = Mesh(Layout(**layout).resolve(dist.get_world_size()))
    c, alive, most = config("scout"), {True: [], False: []}, {True: 0, False: 0}
    weights = awake(c, torch.float32)
    model = build_model(c, mesh, lambda name, part: part.cut(weights[name])).train()
    kinds, isend = {id(group): forward for (_, forward), group in model.pipeline.links.items()}, dist.isend

    def watched(x, to, group):
        forward = kinds[id(group)]
        alive[forward] = [each for each in alive[forward] if each() is not None] + [weakref.ref(x)]
        most[forward] = max(most[forward], len(alive[forward]))
        return isend(x, to, group=group)

    dist.isend = watched
    try:
        batches = batch().split(4) * (micro // 4)
        result = train_step(model, Remember(model.parameters(), lr=0.1), batches, NextToken(), 1e9, 7, mesh)
    finally:
        dist.isend = isend
    return most, result.loss


@pytest.mark.parametrize("layout", [dict(pp=2), dict(pp=4), dict(pp=2, pp_chunks=2)], ids=str)
def test_messages_do_not_gather_in_memory(pool, layout):
    bound = layout["pp"] * (layout.get("pp_chunks", 1) + 1) + 1
    found = pool.run(messages, layout["pp"], layout, 16)
    assert len({loss for _, loss in found}) == 1
    assert all(0 <= count <= bound for most, _ in found for count in most.values()) and found[0][0][True]


class Poison(NextToken):
    """The gradient of the hidden states is NaN on one process; the loss says nothing of it."""

    def __call__(self, hidden_nD, head, given):
        if dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
            hidden_nD.register_hook(lambda gradient: gradient * float("nan"))
        return super().__call__(hidden_nD, head, given)


def run(rank, layout, changes, steps=1, accumulate=1, balancing="bias", strength=0.0, compute=None, muon=False,
        poisoned=False, silent=False):  # fmt: skip
    """Steps on this process: (last result, {name: (part, weight)}, balancer's tensors, measures, the optimizer's
    state is empty); layout None: alone. silent: the last row's tokens don't count."""
    dtype = torch.float32 if compute or muon else torch.float64
    c = dataclasses.replace(config("scout"), **changes)
    weights, whole, mesh = awake(c, dtype), batch(), None
    if layout is None:
        model = Llama4(c).to(dtype)
        model.load_state_dict(weights)
        model.compute_dtype = compute
    else:
        mesh = Mesh(Layout(**layout).resolve(dist.get_world_size()))
        model = build_model(c, mesh, lambda name, part: part.cut(weights[name]), dtype, compute)
        whole = whole.split(mesh.layout.rows)[mesh.rows_index]
    if silent and (mesh is None or mesh.rows_index == mesh.layout.rows - 1):
        whole.valid_BT[-1] = False
    if muon:
        optimizer = build_muon(model, 0.02, 0.1, (0.9, 0.99), 1e-8)
        set_lr(optimizer, 1.0)
    else:
        optimizer = Remember(model.parameters(), lr=0.1, momentum=0.9)
    balancer = BALANCING[balancing](model, strength)
    model.train()
    for _ in range(steps):
        balancer.apply(1.0, ROWS * T)
        term = Poison() if poisoned else NextToken()
        result = train_step(model, optimizer, whole.split(accumulate), term, 1e9, 7, mesh)
        balancer.adjust(result.counts, result.seen)
    parts = parts_of(model)
    held = {n: (parts.get(n), local(p.detach()).clone()) for n, p in model.named_parameters()}
    return result, held, balancer.tensors(), balancer.measures(), not optimizer.state


@cache
def alone(*options, tied=False, **named):
    """`run` on one process, once for all layouts it is compared with."""
    return run(0, None, {"tie_embeddings": tied}, *options, **named)


def assert_same(one, many, tolerance=1e-10):
    """Loss, weights and what the balancer keeps and measures."""
    expected, weights, tensors, measures, _ = one
    for result, held, kept, measured, _ in many:
        assert result.loss == pytest.approx(expected.loss, rel=tolerance)
        for name, (part, weight) in held.items():
            whole = weights[name][1]
            assert (part.cut(whole) - weight).norm() <= tolerance * whole.norm(), name
        assert kept.keys() == tensors.keys() and measured.keys() == measures.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(kept[name].double(), tensor.double(), rtol=1e-6, atol=1e-9), name
        for name, values in measures.items():
            assert measured[name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.parametrize("layout, accumulate", [
    (dict(ep=2), 1), (dict(tp=2), 1), (dict(cp=2), 1), (dict(pp=2), 2), (dict(dp_replicate=2), 2),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("balancing", ["auxiliary", "bias"])
def test_balancing_is_that_of_one_process(pool, balancing, layout, accumulate):
    options = (2, accumulate, balancing, 0.5)
    one, plain = alone(*options), alone(*options[:3], 0.0)
    name = "layers.1.moe.router.weight"
    assert (one[1][name][1] - plain[1][name][1]).norm() > 1e-6, "balancing changes the step"
    assert_same(one, pool.run(run, 2, layout, {}, *options))


@pytest.mark.parametrize("layout, accumulate", [({}, 1), (dict(ep=2), 1), (dict(pp=2), 2)], ids=str)
def test_experts_choose_among_a_processs_tokens_as_among_a_micro_batchs(pool, layout, accumulate):
    """Two processes of two rows each take what one process takes of two micro-batches of two rows."""
    one = alone(2, 2, "expert_choice", 1.0)
    assert one[2]["gates/0"][0, 2].sum() == ROWS * T and any(one[3]["untaken"])
    assert_same(one, pool.run(run, 2, layout, {}, 2, accumulate, "expert_choice", 1.0))


@pytest.mark.parametrize("layout", [dict(tp=2), dict(cp=2)], ids=str)
def test_experts_choose_among_parts_of_rows(pool, layout):
    many = pool.run(run, 2, layout, {}, 1, 1, "expert_choice", 1.0)
    for _, _, kept, _, _ in many:
        assert kept["gates/0"][0, 2].sum() == ROWS * T
        assert all(torch.equal(kept[name], many[0][2][name]) for name in kept)


@pytest.mark.parametrize("layout, accumulate", [({}, 1), (dict(ep=2), 1), (dict(tp=2), 1), (dict(pp=2), 2)], ids=str)
def test_a_gradient_that_is_not_finite_on_one_process_changes_nothing_on_any(pool, layout, accumulate):
    before = alone(1, accumulate)  # a step that counts moves every weight
    for result, held, _, _, empty in pool.run(run, 2, layout, {}, 1, accumulate, "bias", 0.1, None, False, True):
        assert result.skipped and result.loss == pytest.approx(before[0].loss) and result.grad_norm != result.grad_norm
        assert empty
        start = awake(config("scout"), torch.float64)
        assert all(torch.equal(part.cut(start[name]), weight) for name, (part, weight) in held.items())
        assert not all(torch.equal(part.cut(before[1][name][1]), weight) for name, (part, weight) in held.items())


@pytest.mark.parametrize("layout, accumulate", [
    ({}, 1), (dict(ep=2), 1), (dict(tp=2), 1), (dict(cp=2), 1), (dict(pp=2), 2)], ids=str)  # fmt: skip
def test_bfloat16_activations(pool, layout, accumulate):
    one, exact = (alone(2, accumulate, "bias", 0.0, compute) for compute in (torch.bfloat16, torch.float32))
    assert one[0].loss != exact[0].loss
    for result, held, *_ in pool.run(run, 2, layout, {}, 2, accumulate, "bias", 0.0, torch.bfloat16):
        assert result.loss == pytest.approx(one[0].loss, rel=1e-2)
        for name, (part, weight) in held.items():
            assert weight.dtype == torch.float32
            assert (part.cut(one[1][name][1]) - weight).norm() <= 0.02 * one[1][name][1].norm(), name


@pytest.mark.parametrize("layout", [{}, dict(tp=2), dict(cp=2)], ids=str)
def test_a_tied_head(pool, layout):
    assert_same(alone(2, tied=True), pool.run(run, 2, layout, dict(tie_embeddings=True), 2))


def test_muon_in_a_pipeline(pool):
    one = alone(2, 2, muon=True)
    assert_same(one, pool.run(run, 2, dict(pp=2), {}, 2, 2, "bias", 0.0, None, True), 1e-4)


@pytest.mark.parametrize("layout, accumulate", [({}, 2), (dict(tp=2), 4), (dict(pp=2), 4)], ids=str)
def test_a_micro_batch_in_which_no_token_counts(pool, layout, accumulate):
    options = (2, 4, "bias", 0.0, None, False, False, True)
    assert_same(alone(*options), pool.run(run, 2, layout, {}, 2, accumulate, *options[2:]))


def slow_main(rank):
    """The main process works alone for longer than a collective may take; (what the block saw, evaluations run)."""
    mesh, seen = Mesh(Layout().resolve(dist.get_world_size())), []
    with mesh.main_first():
        if mesh.is_main:
            time.sleep(5)
    c = config("scout")
    weights = awake(c, torch.float32)
    model = build_model(c, mesh, lambda name, part: part.cut(weights[name]))

    def evaluate(model):
        time.sleep(5)
        seen.append(all(torch.equal(p, weights[name]) for name, p in model.named_parameters()))
        return {"x": 1.0}

    job = SimpleNamespace(name="x", model=model, mesh=mesh, evaluations=(Evaluation("slow", 1, evaluate),))
    show = SimpleNamespace(note=lambda text: None)
    _evaluate(job, BALANCING["bias"](model), 1, True, NoMetrics(), show)
    return seen, mesh.any(rank == 1)


def test_what_one_process_does_alone_may_take_longer_than_a_collective(pool):
    assert pool.run(slow_main, 2, timeout=4.0) == [([True], True), ([], True)]
