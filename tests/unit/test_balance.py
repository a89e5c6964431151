"""Auxiliary loss and expert choice against literal loops, their state in checkpoints, and what is counted of a step.
The bias has its own file (test_balancer.py)."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import CONFIG, changed, job, lively_model, random_batch, values

from puna.data import Batch
from puna.errors import PunaError
from puna.model.moe import moe_layers
from puna.train import TrainConfig, checkpoint, metrics, train
from puna.train.balance import BALANCING, Auxiliary, Bias, ExpertChoice, thresholds
from puna.train.step import train_step
from puna.train.terms import NextToken

E, T = CONFIG.n_experts, 4 * 24  # tokens of `random_batch`


def wide(batch: Batch) -> Batch:
    return batch if batch.tiles is None else dataclasses.replace(batch, tiles=batch.tiles.double())


def descend(model, batches, balancer=None, scale=1.0):
    """(gradient by name, StepResult) of one step of plain gradient descent with learning rate 1."""
    before = values(model)
    if balancer is not None:
        balancer.apply(scale, sum(b.tokens_BT.numel() for b in batches))
    result = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batches, NextToken(), 1e9, 16)
    after = values(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return {name: before[name] - after[name] for name in before}, result


def router_logits(model, batch):
    """Raw logits [T, E] of every MoE layer, with their graph."""
    found = []
    for layer in moe_layers(model):
        layer.router_loss = lambda logits_TE: (found.append(logits_TE), 0.0 * logits_TE.sum())[1]
    model.hidden(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
    for layer in moe_layers(model):
        layer.router_loss = None
    return found


def switch_loss(logits, shares):
    """E sum_e f_e P_e over all layers, token by token."""
    total = 0
    for logits_TE, f_E in zip(logits, shares, strict=True):
        for r_E in logits_TE:
            gates = [torch.sigmoid(r) for r in r_E]
            total = total + E * sum(f * g / sum(gates) for f, g in zip(f_E, gates, strict=True)) / len(logits_TE)
    return total


@pytest.fixture
def biased():
    """A model in double precision whose routers prefer some experts."""
    model = lively_model(dtype=torch.float64)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight *= 3
            layer.router.weight[0] += 0.05
    return model


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_auxiliary_loss_has_the_gradient_of_switchs(biased, parts):
    """With the last step's shares, however the step is cut in micro-batches."""
    batch = wide(random_batch(1))
    balancer = Auxiliary(biased, 0.5)
    _, first = descend(biased, [wide(random_batch(0))], balancer)
    balancer.adjust(first.counts, first.seen)
    shares = [(count / count.sum()).double() for count in first.counts]
    balancer.detach()
    plain, _ = descend(biased, batch.split(parts))
    pulled, result = descend(biased, batch.split(parts), balancer)
    balancer.detach()
    loss = 0.5 * switch_loss(router_logits(biased, batch), shares)
    expected = dict(zip(plain, torch.autograd.grad(loss, list(biased.parameters()), allow_unused=True), strict=True))
    assert expected["layers.1.moe.router.weight"].norm() > 1e-3 and expected["tok_embeddings.weight"].norm() > 1e-4
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(pulled[name] - plain[name], gradient, rtol=1e-5, atol=1e-9)
    balancer.adjust(result.counts, result.seen)
    own = [(count / count.sum()).double() for count in result.counts]
    with torch.no_grad():
        each = [float(switch_loss([r], [f])) for r, f in zip(router_logits(biased, batch), own, strict=True)]
    assert balancer.measures()["auxiliary"] == pytest.approx(each, rel=1e-6) and min(each) > 1.001


def test_the_first_step_has_no_auxiliary_loss(biased):
    """No load is known yet; not even rounding may reach parameters whose gradient is exactly 0."""
    batch = wide(random_batch())
    plain, _ = descend(biased, [batch])
    pulled, _ = descend(biased, [batch], Auxiliary(biased, 0.5))
    assert not changed(plain, pulled)


def test_the_auxiliary_loss_evens_the_load():
    loads = {}
    for strength in (0.0, 1.0):
        model, batch = lively_model(), random_batch(rows=16)
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.router.weight *= 3
        balancer = Auxiliary(model, strength)
        optimizer = torch.optim.SGD([layer.router.weight for layer in moe_layers(model)], lr=0.3)
        seen = []
        for _ in range(60):
            balancer.apply(1.0, batch.tokens_BT.numel())
            result = train_step(model, optimizer, [batch], NextToken(), 1e9, 512)
            balancer.adjust(result.counts, result.seen)
            seen.append(result.metrics["router/max_load"])
        loads[strength] = (seen[0], sum(seen[-10:]) / 10)
    assert loads[1.0][0] == loads[0.0][0] > 1.3
    assert loads[1.0][1] < loads[0.0][1] - 0.1 and loads[1.0][1] < 1.3, loads


def literal_expert_choice(moe, x_TD, share=1.0):
    """Expert by expert; returns (output, gates of taken tokens by expert, how many experts took each token)."""
    logits_TE = x_TD @ moe.router.weight.T
    out, gates, taken = [moe.shared(x) for x in x_TD], [], torch.zeros(len(x_TD), dtype=torch.int64)
    for e in range(E):
        best = sorted(range(len(x_TD)), key=lambda t: -logits_TE[t, e].item())[: round(share * len(x_TD) / E)]
        gates.append([torch.sigmoid(logits_TE[t, e]).item() for t in best])
        for t in best:
            scaled = x_TD[t] * torch.sigmoid(logits_TE[t, e])
            gate, up = (scaled @ moe.experts.w13[e]).chunk(2)
            out[t] = out[t] + (torch.nn.functional.silu(gate) * up) @ moe.experts.w2[e]
            taken[t] += 1
    return torch.stack(out), gates, taken


@pytest.mark.parametrize("share", [1.0, 2.0])
def test_expert_choice_is_the_loop_written_down(biased, share):
    moe = moe_layers(biased)[0]
    balancer = ExpertChoice(biased, share)
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    probe_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [x_TD, *moe.parameters()]
    balancer.apply(1.0)
    got = moe(x_TD[None])[0]
    expected, gates, taken = literal_expert_choice(moe, x_TD, share)
    torch.testing.assert_close(got, expected)
    for one, two in zip(*(torch.autograd.grad((y * probe_TD).sum(), inputs) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, two)
        assert two.abs().max() > 0
    assert int((taken == 0).sum()) > 2 - share and int((taken > 1).sum()) > 2
    assert all(len(each) == 10 * share for each in gates)
    assert int(moe.seen["untaken"]) == int((taken == 0).sum())
    argmax_T = (x_TD @ moe.router.weight.T).argmax(-1)
    assert torch.equal(moe.counts_E, argmax_T.bincount(minlength=E)), "the load is the one evaluation will see"
    balancer.detach()
    assert not torch.allclose(moe(x_TD[None])[0], got)


def test_gate_statistics_are_those_of_all_taken_tokens(biased):
    moe, balancer = moe_layers(biased)[0], ExpertChoice(biased)
    running, everything = None, [[] for _ in range(E)]
    for step in range(3):
        x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        balancer.apply(1.0)
        moe(x_TD[None])
        balancer.adjust([moe.counts_E, moe.counts_E], [moe.seen, {}])
        gates = torch.tensor(literal_expert_choice(moe, x_TD)[1])
        now = torch.stack([gates.mean(1), (gates - gates.mean(1, keepdim=True)).square().sum(1), torch.full((E,), 10)])
        running = now if running is None else 0.99 * running + 0.01 * now
        everything = [old + new.tolist() for old, new in zip(everything, gates, strict=True)]
    whole = torch.tensor(everything)
    spread = (whole - whole.mean(1, keepdim=True)).square().sum(1)
    expected = torch.stack([running, torch.stack([whole.mean(1), spread, torch.full((E,), 30)])])
    torch.testing.assert_close(balancer.gates[0], expected.double(), rtol=1e-5, atol=1e-7)
    assert not balancer.gates[1].any()
    assert balancer.measures()["untaken"][0] > 0


def changed_by_a_later_token(model):
    """Whether an earlier token's hidden state hears of the last one."""
    batch = random_batch(rows=1, pictures=False)
    other = batch.tokens_BT.clone()
    other[0, -4] = 90
    with torch.no_grad():
        one, two = (model.hidden(tokens)[0, :12] for tokens in (batch.tokens_BT, other))
    return not torch.allclose(one, two, atol=1e-6)


def test_expert_choice_looks_into_the_future_and_nothing_after_it_does():
    model = lively_model()
    balancer = ExpertChoice(model)
    assert not changed_by_a_later_token(model)
    balancer.apply(1.0)
    assert changed_by_a_later_token(model)
    balancer.apply(0.99)  # the stage's last fifth
    assert not changed_by_a_later_token(model)
    balancer.apply(1.0)
    balancer.detach()
    assert not changed_by_a_later_token(model.eval())


def test_thresholds_run_an_expert_for_every_token_above_its_mean():
    model = lively_model(dtype=torch.float64).eval()
    moe = moe_layers(model)[0]
    x_TD = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_TE = x_TD @ moe.router.weight.T
    gates = torch.zeros(2, 3, E, dtype=torch.float64)
    gates[0, 0] = torch.sigmoid(logits_TE).sort(dim=0).values[-13]  # of each expert 13 tokens
    gates[0, 0, 2] = 2.0  # of this one none
    expected = [moe.shared(x) for x in x_TD]
    times = 0
    for t, x in enumerate(x_TD):
        for e in range(E):
            score = torch.sigmoid(logits_TE[t, e])
            if score >= gates[0, 0, e]:
                gate, up = ((x * score) @ moe.experts.w13[e]).chunk(2)
                expected[t] = expected[t] + (torch.nn.functional.silu(gate) * up) @ moe.experts.w2[e]
                times += 1
    assert times == 39
    plain = moe(x_TD[None])[0]
    with thresholds(model, [gates, gates]):
        torch.testing.assert_close(moe(x_TD[None])[0], torch.stack(expected))
        assert not changed_by_a_later_token(model)
    assert torch.equal(moe(x_TD[None])[0], plain) and not torch.allclose(plain, torch.stack(expected))


@pytest.mark.parametrize("kind", BALANCING)
def test_a_strength_of_zero_and_frozen_routers_do_nothing(kind):
    batch = random_batch()
    plain, _ = descend(lively_model(), [batch])
    for frozen in (False, True):
        model = lively_model()
        for layer in moe_layers(model) if frozen else ():
            layer.router.weight.requires_grad_(False)
        balancer = BALANCING[kind](model, 1.0 if frozen else 0.0)
        for _ in range(2):
            got, result = descend(model, [batch], balancer)
            balancer.adjust(result.counts, result.seen)
        routers = {name for name in plain if "router" in name and frozen}
        assert changed(plain, got) == routers and not balancer.measures()


@pytest.mark.parametrize("kind", BALANCING)
def test_the_loop_balances_and_goes_on_bitwise(tmp_path, kind):
    """Killed after step 5 and gone on in another model: weights, balance and measures as without the kill."""
    settings = {"balancing": kind, "balance": 0.3 if kind != "expert_choice" else None, "steps": 10}
    final = {name: values(train(job(tmp_path / name, **settings))) for name in ("whole", "twice")}
    assert not changed(final["whole"], final["twice"])
    assert changed(final["whole"], values(train(job(tmp_path / "without", **settings | {"balance": 0.0}))))

    def dying(step):
        if step == 5:
            raise RuntimeError("died")
        return random_batch(step)

    with pytest.raises(RuntimeError, match="died"):
        train(job(tmp_path / "run", source=dying, **settings))
    model = train(job(tmp_path / "run", seed=9, **settings))
    assert not changed(final["whole"], values(model))
    states = [load_file(checkpoint.steps(tmp_path / name)[0] / "optimizer.safetensors") for name in ("whole", "run")]
    kept = {"bias": "balance/", "auxiliary": "share/", "expert_choice": "gates/"}
    assert changed(*states) <= {"random_state"}
    assert {name.split("/")[0] + "/" for name in states[0]} & set(kept.values()) == {kept[kind]}
    assert all(states[0][name].any() for name in states[0] if name.startswith(kept[kind]))
    lines = [line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    measure = {"bias": "bias", "auxiliary": "auxiliary", "expert_choice": "untaken"}[kind]
    assert all(len(line["router/layers"][measure]) == 2 for line in lines[1:8])
    assert lines[-1]["router/flip_share"] == 0, "the last step routes as evaluation does"
    assert all(layer.choice is None and layer.router_loss is None for layer in moe_layers(model))


def test_the_state_of_the_auxiliary_loss_matters(tmp_path):
    """Resumed as a run that was balanced otherwise, it begins without the last step's shares and ends elsewhere."""
    settings = {"balancing": "auxiliary", "balance": 5.0, "lr_router": 3.0}
    whole = values(train(job(tmp_path / "whole", **settings)))

    def dying(step):
        if step == 5:
            raise RuntimeError("died")
        return random_batch(step)

    with pytest.raises(RuntimeError):
        train(job(tmp_path / "run", source=dying, **settings))
    restore = Auxiliary.tensors
    try:
        Auxiliary.tensors = lambda self: {}
        assert changed(whole, values(train(job(tmp_path / "run", **settings))))
    finally:
        Auxiliary.tensors = restore


def test_the_bias_is_measured_as_it_was_used():
    model = lively_model()
    balancer = Bias(model, 0.01)
    balancer.bias[0].copy_(torch.tensor([0.3, -0.1, 0.0, -0.2]))
    balancer.apply(0.5)
    balancer.adjust([torch.tensor([9, 0, 0, 0])] * 2)
    assert balancer.measures() == {"bias": [pytest.approx(0.25), 0.0]}


def test_a_step_without_the_text_model_counts_no_routes():
    """Whatever an evaluation left on the layers."""

    class TowerAlone(NextToken):
        def hidden(self, model, batch):
            return model.image_features(batch.tiles).sum() + torch.zeros(*batch.tokens_BT.shape, CONFIG.d_model)

    model = lively_model()
    model(random_batch().tokens_BT, random_batch().tiles)
    assert all(layer.counts_E is not None for layer in moe_layers(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = train_step(model, optimizer, [random_batch()], TowerAlone(), 1.0, 64)
    assert not any(name.startswith("router/") for name in result.metrics) and not any(map(torch.any, result.counts))


def test_settings():
    assert [BALANCING[TrainConfig(balancing=kind).balancing].usual for kind in BALANCING] == [3e-4, 1e-2, 1.0]
    assert ExpertChoice(lively_model()).strength == 1.0 and Bias(lively_model(), 0.5).strength == 0.5
    with pytest.raises(PunaError, match="train.balancing must be bias, auxiliary, expert_choice, not 'sinkhorn'"):
        TrainConfig(balancing="sinkhorn")
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PunaError, match="train.balance must be 0"):
            TrainConfig(balance=value)
