"""Loss-free load balancing: the bias moves the choice of experts while training, and nothing else ever."""

import pytest
import torch
from training_helpers import lively_model, random_batch, values

from puna.model.moe import moe_layers, record_routes
from puna.optim.schedule import anneal
from puna.train.balance import Bias


def routes(model, batch):
    """Chosen experts [layers, B, T]."""
    with torch.no_grad(), record_routes(model) as found:
        model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
    return torch.stack(found)


def adjust(balancer, *counts):
    balancer.adjust([torch.tensor(some) for some in counts])


def test_the_bias_rises_for_experts_with_too_little_work():
    balancer = Bias(lively_model(), 0.01)
    adjust(balancer, [10, 0, 1, 1], [3, 3, 3, 3])
    # signs -1 +1 +1 +1, re-centred by their mean 1/2
    assert balancer.bias[0].tolist() == pytest.approx([-0.015, 0.005, 0.005, 0.005])
    assert balancer.bias[1].tolist() == [0, 0, 0, 0]
    adjust(balancer, [0, 12, 0, 0], [6, 6, 0, 0])
    assert balancer.bias[0].tolist() == pytest.approx([-0.01, -0.01, 0.01, 0.01])
    assert balancer.bias[1].tolist() == pytest.approx([-0.01, -0.01, 0.01, 0.01])


def test_the_bias_stays_centred():
    balancer = Bias(lively_model(), 0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        adjust(balancer, *(torch.randint(0, 9, (4,), generator=generator).tolist() for _ in balancer.layers))
    assert all(bias.abs().max() > 0.05 and abs(float(bias.mean())) < 1e-6 for bias in balancer.bias)


def test_adjusting_evens_the_load():
    model, batch = lively_model(), random_batch(rows=16)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight *= 3
    balancer = Bias(model, 0.02)
    loads = []
    for _ in range(200):
        balancer.apply(1.0)
        routes(model, batch)
        loads.append([float(layer.counts_E.max() / layer.counts_E.float().mean()) for layer in balancer.layers])
        balancer.adjust([layer.counts_E for layer in balancer.layers])
    first, last = torch.tensor(loads[0]), torch.tensor(loads[-20:]).mean(0)
    assert (first > 1.2).all() and (last < 1.1).all(), (first, last)


def test_the_bias_fades_out_before_a_stage_ends():
    model, batch = lively_model(), random_batch()
    raw = routes(model, batch)
    balancer = Bias(model, 0.01)
    for bias in balancer.bias:
        bias.copy_(torch.tensor([-1.0, -1.0, -1.0, 3.0]))
    shares, applied = [], []
    for step in range(15, 20):
        balancer.apply(anneal(step, 20))
        applied.append(float(balancer.layers[0].selection_bias_E[3]))
        shares.append(float((routes(model, batch) == 3).double().mean()))
    assert applied == pytest.approx([3, 3, 2, 1, 0])
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] == float((raw == 3).double().mean())
    assert torch.equal(routes(model, batch), raw)  # after the last step
    assert all(float(bias[3]) == 3 for bias in balancer.bias), "fading must not forget the bias itself"


def test_the_bias_moves_the_choice_in_training_alone():
    model, batch = lively_model(), random_batch()
    raw = routes(model, batch)
    assert len(raw.unique()) > 1
    balancer = Bias(model, 0.01)
    for bias in balancer.bias:
        bias.copy_(torch.tensor([0.0, 0.0, 1e4, 0.0]))
    balancer.apply(1.0)
    assert (routes(model, batch) == 2).all()
    assert int(balancer.layers[0].flips) == int((raw[0] != 2).sum()) > 0
    model.eval()
    assert torch.equal(routes(model, batch), raw)
    assert all(layer.flips is None for layer in balancer.layers)
    model.train()
    balancer.detach()
    assert torch.equal(routes(model, batch), raw)


def test_the_bias_is_no_part_of_what_an_expert_reads():
    """Where it does not change the choice it changes no bit of the output, nor of the gradient."""
    model, batch = lively_model(), random_batch()
    balancer = Bias(model, 0.01)

    def run():
        loss = model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT).logsumexp(-1).sum()
        return float(loss.detach()), torch.autograd.grad(loss, model.layers[1].moe.router.weight)[0]

    plain = run()
    assert plain[1].abs().max() > 0, "the score must carry gradient to the router"
    for bias in balancer.bias:
        bias.fill_(5.0)  # the same for all experts
    balancer.apply(1.0)
    same = run()
    assert same[0] == plain[0] and torch.equal(same[1], plain[1])
    for bias in balancer.bias:
        bias.copy_(torch.tensor([5.0, -5.0, 0.0, 0.0]))
    balancer.apply(1.0)
    assert run()[0] != plain[0]


def test_the_bias_is_no_part_of_the_model():
    model = lively_model()
    names, parameters = set(model.state_dict()), values(model)
    balancer = Bias(model, 0.01)
    adjust(balancer, [9, 0, 0, 0], [9, 0, 0, 0])
    balancer.apply(1.0)
    assert set(model.state_dict()) == names == set(parameters) and not list(model.buffers())


def test_without_an_update_there_is_no_bias():
    model, batch = lively_model(), random_batch()
    raw = routes(model, batch)
    balancer = Bias(model, 0.0)
    balancer.bias[0].copy_(torch.tensor([0.0, 0.0, 1e4, 0.0]))
    balancer.apply(1.0)
    assert torch.equal(routes(model, batch), raw)
    before = [bias.clone() for bias in balancer.bias]
    adjust(balancer, *([9, 0, 0, 0] for _ in balancer.bias))
    assert all(torch.equal(a, b) for a, b in zip(before, balancer.bias, strict=True))
