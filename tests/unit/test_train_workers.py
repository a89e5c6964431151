"""Workers against the same micro-batches one after the other; gradients, notes, errors, and a run that goes on."""

import dataclasses
import threading

import pytest
import torch
from training_helpers import CONFIG, changed, job, lively_model, random_batch, values

from puna.errors import PunaError
from puna.model import Llama4
from puna.model.moe import moe_layers
from puna.optim import build_adamw
from puna.optim.adamw import set_lr
from puna.train import TrainConfig, checkpoint, train
from puna.train.balance import Bias
from puna.train.step import train_step
from puna.train.terms import NextToken
from puna.train.workers import Workers, twin


@pytest.fixture
def pair():
    """(model, its two workers)."""
    model = lively_model()
    workers = Workers(model, 2)
    yield model, workers
    workers.close()


def steps(model, workers, count=3, parts=2, slice_size=1000):
    """Results of some steps, with the router's bias moving."""
    optimizer, balancer = build_adamw(model, 1e-2, 0.1, (0.9, 0.99), 1e-8), Bias(model, 0.05)
    set_lr(optimizer, 1.0)
    results = []
    for step in range(count):
        balancer.apply(1.0, 96)
        batches = random_batch(step).split(parts)
        results.append(train_step(model, optimizer, batches, NextToken(), 1.0, slice_size, workers=workers))
        balancer.adjust(results[-1].counts, results[-1].seen)
    return results


def test_side_by_side_is_one_after_the_other_bit_for_bit(pair):
    model, workers = pair
    other = lively_model()
    for mine, theirs in zip(steps(model, workers), steps(other, None), strict=True):
        assert (mine.loss, mine.grad_norm, mine.tokens, mine.valid) == (
            theirs.loss, theirs.grad_norm, theirs.tokens, theirs.valid)  # fmt: skip
        assert mine.metrics == theirs.metrics and mine.metrics["router/flip_share"] >= 0
        assert all(map(torch.equal, mine.counts, theirs.counts)) and sum(int(c.sum()) for c in mine.counts) > 0
    assert not changed(values(model), values(other))
    assert changed(values(model), values(lively_model())) == set(values(model))  # and it moved


def test_more_micro_batches_than_workers_and_several_slices(pair):
    """Sums in another order, so not bit for bit; but the same again and again."""
    model, workers = pair
    other, third = lively_model(), lively_model()
    steps(model, workers, parts=4, slice_size=7)
    steps(other, None, parts=4, slice_size=7)
    for name, value in values(model).items():
        torch.testing.assert_close(value, values(other)[name], atol=2e-4, rtol=0)
    again = Workers(third, 2)
    steps(third, again, parts=4, slice_size=7)
    again.close()
    assert not changed(values(model), values(third))


def test_each_worker_has_its_own_thread_model_and_gradients(pair):
    model, workers = pair
    barrier = threading.Barrier(2, timeout=30)  # passes only if two are at work at once

    def work(own, part):
        barrier.wait()
        own.head(own.hidden(random_batch(part).tokens_BT.clamp(min=8))).sum().backward()
        return part, threading.get_ident(), own, own.output.weight.grad.clone()

    (first, one, a, ga), (second, two, b, gb) = workers.run(work, [0, 1])
    assert (first, second) == (0, 1) and one != two and a is model and b is not model
    torch.testing.assert_close(model.output.weight.grad, ga + gb, rtol=0, atol=0)
    assert not torch.equal(ga, gb) and all(p.grad is None for p in b.parameters())
    assert moe_layers(a)[0].counts_E is not moe_layers(b)[0].counts_E


def test_a_twin_is_the_same_memory_and_the_same_function():
    model = lively_model()
    other = twin(model)
    batch = random_batch()
    with torch.no_grad():
        before = model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
        assert torch.equal(before, other(batch.tokens_BT, batch.tiles, batch.doc_ids_BT))
        model.layers[0].attention.wo.weight.mul_(2)
        after = other(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
        assert torch.equal(after, model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT))
        assert not torch.equal(after, before)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    model.layers[0].attention.wo.weight.requires_grad_(False)
    assert not twin(model).layers[0].attention.wo.weight.requires_grad


def test_what_a_worker_raises_is_raised(pair):
    def work(own, part):
        if part == 1:
            raise PunaError("part 1 is bad")
        return part

    with pytest.raises(PunaError, match="part 1 is bad"):
        pair[1].run(work, [0, 1, 2, 3])
    assert pair[1].run(lambda own, part: part, [0, 2]) == [0, 2]  # and they still work


def test_a_run_with_workers_is_the_run_without_and_goes_on_bitwise(tmp_path):
    settings = dict(slice=1000)
    alone = values(train(job(tmp_path / "alone", **settings)))
    whole = values(train(job(tmp_path / "whole", workers=2, **settings)))
    assert not changed(alone, whole)

    def source(step):
        if step == 5:
            raise RuntimeError("died")
        return random_batch(step)

    with pytest.raises(RuntimeError, match="died"):
        train(job(tmp_path / "run", workers=2, source=source, **settings))
    assert checkpoint.newest(tmp_path / "run")["step"] == 4
    assert not changed(whole, values(train(job(tmp_path / "run", seed=9, workers=2, **settings))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(workers=0), "train.workers must be at least 1"),
        (dict(workers=3), "train.accumulate 2 must divide by train.workers 3"),
        (dict(workers=2, balancing="auxiliary"), "train.workers.*balancing bias"),
        (dict(workers=2, fp8="rowwise"), "train.workers.*fp8 off"),
        (dict(workers=2, compile="on"), "train.workers.*compile"),
    ],
)
def test_what_workers_cannot_do_is_said(settings, message):
    with pytest.raises(PunaError, match=message):
        TrainConfig(rows=4, accumulate=2, **settings)


def test_a_model_without_a_tower_has_twins_too():
    assert twin(Llama4(dataclasses.replace(CONFIG, vision=None))).vision is None
