"""Muon against a literal float64 reference with singular vectors, against torch's own, and in the loop."""

import math

import pytest
import torch
from training_helpers import CONFIG, changed, job, lively_model, random_batch, values

from puna.errors import PunaError
from puna.model import Llama4
from puna.optim import OPTIMIZERS, build_adamw, build_muon
from puna.optim.adamw import group_of, set_lr
from puna.optim.muon import COEFFICIENTS, MOMENTUM, cut_of, orthogonalise
from puna.train import TrainConfig, checkpoint, metrics, train
from puna.train.step import train_step
from puna.train.terms import NextToken


def until(step):
    """A source that stands for a process that dies before `step`."""

    def source(s):
        if s == step:
            raise RuntimeError("died")
        return random_batch(s)

    return source


HIDDEN = ("wqkv.weight", "wo.weight", "w13", "w2", "w13.weight", "w2.weight", "wq.weight", "wk.weight", "wv.weight",
          "fc1.weight", "fc2.weight")  # fmt: skip


def build(model, lr=1e-2, decay=0.1, **multipliers):
    made = build_muon(model, lr, decay, (0.9, 0.99), 1e-8, multipliers)
    set_lr(made, 1.0)
    return made


def gradients(model, seed):
    """Random gradients of very different sizes in the parts of fused matrices."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad *= torch.logspace(-3, 0, parameter.shape[-1]) if parameter.dim() > 1 else 1


def polynomial(s):
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


def by_svd(matrix):
    """Newton-Schulz written down: the polynomial moves the singular values and nothing else."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U @ torch.diag(polynomial(s / s.square().sum().sqrt())) @ Vh


def logical(name, tensor):
    """Every single matrix that a parameter holds, as views."""
    if ".experts." in name:
        return [part for e in tensor for part in (e.chunk(2, dim=1) if name.endswith("w13") else [e])]
    if name.endswith("w13.weight"):
        return list(tensor.chunk(2))
    if name.endswith("wqkv.weight"):
        d = CONFIG.head_dim
        return list(tensor.split([CONFIG.n_heads * d, CONFIG.n_kv_heads * d, CONFIG.n_kv_heads * d]))
    return [tensor]


def reference_step(weights, moments, grads, lr, decay):
    """One Muon step, matrix by matrix, in float64."""
    for name, weight in weights.items():
        for w, m, g in zip(*(logical(name, each) for each in (weight, moments[name], grads[name])), strict=True):
            m.copy_(MOMENTUM * m + (1 - MOMENTUM) * g)
            mixed = (1 - MOMENTUM) * g + MOMENTUM * m
            w.copy_((1 - lr * decay) * w - lr * 0.2 * math.sqrt(max(w.shape)) * by_svd(mixed))


def is_hidden(name):
    inside = name.startswith("layers.") or name.startswith("vision.layers.")
    return inside and name.endswith(HIDDEN) and "router" not in name


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (1, 9), (9, 1)])
def test_orthogonalise_moves_singular_values_alone(shape):
    update = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonalise(update, torch.float64)
    for one, each in zip(got, update, strict=True):
        torch.testing.assert_close(one, by_svd(each))
        torch.testing.assert_close(orthogonalise(each, torch.float64), one)
        assert ((torch.linalg.svdvals(one) > 0.65) & (torch.linalg.svdvals(one) < 1.25)).all() or min(shape) == 16
    assert distance(got, update) > 0.1
    assert distance(orthogonalise(update, torch.bfloat16), got) < 0.03
    torch.testing.assert_close(orthogonalise(1e-3 * update, torch.float64), got)
    assert not orthogonalise(torch.zeros(2, 4, 6), torch.float32).any()


def test_three_steps_are_the_reference_matrix_by_matrix():
    model = lively_model(dtype=torch.float64)
    made = build(model, lr=0.02, decay=0.3)
    hidden = [name for name in values(model) if is_hidden(name)]
    weights = {name: values(model)[name] for name in hidden}
    moments = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    before = values(model)
    for step in range(3):
        gradients(model, step)
        reference_step(weights, moments, {n: p.grad for n, p in model.named_parameters() if n in weights}, 0.02, 0.3)
        made.step()
    after = values(model)
    for name in hidden:
        torch.testing.assert_close(after[name], weights[name])
        assert distance(after[name], before[name]) > 0.01, name


@pytest.mark.parametrize("kind", ["muon", "muon_attention"])
def test_the_rest_is_adamw(kind):
    """Everything that is no hidden matrix moves bitwise as `build_adamw` would move it, and hidden matrices do not;
    `muon_attention` counts all but attention's matrices to the rest."""

    def is_muons(name):
        return is_hidden(name) and (kind == "muon" or name.startswith("layers.") and ".attention." in name)

    ours, theirs = lively_model(), lively_model()
    plain = build_adamw(theirs, 1e-2, 0.1, (0.9, 0.99), 1e-8, {"head": 2.0})
    made = OPTIMIZERS[kind](ours, 1e-2, 0.1, (0.9, 0.99), 1e-8, {"head": 2.0})
    set_lr(made, 1.0)
    set_lr(plain, 1.0)
    for step in range(3):
        for model, optimizer in ((ours, made), (theirs, plain)):
            gradients(model, step)
            optimizer.step()
    assert changed(values(ours), values(theirs)) == {name for name in values(ours) if is_muons(name)}
    state = {name: set(made.state[p]) for name, p in ours.named_parameters()}
    for name, keys in state.items():
        assert keys == ({"momentum_buffer"} if is_muons(name) else {"step", "exp_avg", "exp_avg_sq"}), name


def test_where_shapes_allow_it_is_torchs_muon():
    model = lively_model()
    made = build(model, lr=0.02, decay=0.3)
    single = [name for name in values(model) if is_hidden(name) and len(logical(name, values(model)[name])) == 1]
    single = [name for name in single if values(model)[name].dim() == 2]
    assert len(single) > 8
    twins = {name: torch.nn.Parameter(values(model)[name]) for name in single}
    theirs = torch.optim.Muon(twins.values(), lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    before = values(model)
    for step in range(3):
        gradients(model, step)
        for name, twin in twins.items():
            twin.grad = dict(model.named_parameters())[name].grad.clone()
        made.step()
        theirs.step()
    for name, twin in twins.items():  # torch's products are in bfloat16
        ours, moved = values(model)[name] - before[name], twin.detach() - before[name]
        assert distance(ours, moved) < 0.05, name


def test_groups_keep_their_rate_their_decay_and_their_cut():
    model = Llama4(CONFIG)
    made = build(model, lr=1e-2, vision=0.5, adapter=0.2)
    plain = build_adamw(model, 1e-2, 0.1, (0.9, 0.99), 1e-8, {"vision": 0.5, "adapter": 0.2})
    of_plain = {id(p): (g["name"], g["peak"], g["weight_decay"]) for g in plain.param_groups for p in g["params"]}
    of_made = {id(p): (g["name"], g["peak"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    assert of_made == of_plain
    names = {id(p): name for name, p in model.named_parameters()}
    moved = {names[id(p)] for g in made.param_groups if "cut" in g for p in g["params"]}
    assert moved == set(filter(is_hidden, names.values()))
    assert group_of("vision.patch_embedding.weight", torch.zeros(2, 2)) == "vision"  # and yet AdamW's: an input layer
    set_lr(made, 0.5)
    assert {g["lr"] for g in made.param_groups if g["name"] == "matrix"} == {5e-3}


def test_fused_matrices_are_cut_where_their_parts_meet():
    shapes = {name: p.shape for name, p in Llama4(CONFIG).named_parameters()}
    cuts = {name: cut_of(name, shape, CONFIG) for name, shape in shapes.items()}
    assert cuts["layers.0.attention.wqkv.weight"] == (0, (32, 16, 16))
    assert cuts["layers.1.moe.experts.w13"] == (2, (24, 24)) and cuts["layers.1.moe.shared.w13.weight"] == (0, (24, 24))
    assert cuts["layers.0.feed_forward.w13.weight"] == (0, (48, 48))
    for name, cut in cuts.items():
        parts = logical(name, torch.empty(shapes[name]))
        assert (cut is not None) == (len(parts) > shapes[name][0] if ".experts." in name else len(parts) > 1), name
        if cut is not None:
            assert sum(cut[1]) == shapes[name][cut[0]]


def test_updates_have_adams_size():
    """Root mean square of an update over the learning rate: near 0.2, whatever the shape and the gradient's size."""
    model = lively_model()
    made = build(model, lr=1.0, decay=0.0)
    before = values(model)
    gradients(model, 0)
    made.step()
    for name, value in values(model).items():
        for new, old in zip(logical(name, value), logical(name, before[name]), strict=True) if is_hidden(name) else ():
            assert 0.1 < float((new - old).square().mean().sqrt()) < 0.25, name


def test_an_expert_without_a_token_stays_but_for_its_decay():
    model = lively_model()
    made = build(model, lr=0.1, decay=0.1)
    gradients(model, 0)
    made.step()
    before = values(model)
    gradients(model, 1)
    for layer in (1, 3):
        model.layers[layer].moe.experts.w13.grad[2] = 0
    made.step()
    after, name = values(model), "layers.1.moe.experts.w13"
    torch.testing.assert_close(after[name][2], before[name][2] * (1 - 0.1 * 0.1))
    assert all(distance(after[name][e], before[name][e]) > 0.05 for e in (0, 1, 3))


def test_a_tower_without_a_picture_stays():
    model = lively_model()
    made = build(model)
    before = values(model)
    train_step(model, made, [random_batch(pictures=False)], NextToken(), 1.0, 64)
    moved = changed(before, values(model))
    assert "layers.0.attention.wo.weight" in moved and not any(name.startswith("vision.") for name in moved)


def test_it_learns_and_the_rate_is_adamws(tmp_path):
    losses = {}
    for name in ("adamw", "muon"):
        run = job(tmp_path / name, steps=25, source=lambda step: random_batch(0), checkpoint_every=100, optimizer=name)
        train(run)
        losses[name] = [line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in line]
    assert losses["muon"][0] == losses["adamw"][0] and losses["muon"][-1] != losses["adamw"][-1]
    assert losses["muon"][-1] < 0.6 * losses["muon"][0]


def test_a_run_with_muon_goes_on_bitwise(tmp_path):
    whole = values(train(job(tmp_path / "whole", optimizer="muon")))
    assert changed(whole, values(train(job(tmp_path / "adamw"))))
    with pytest.raises(RuntimeError, match="died"):
        train(job(tmp_path / "run", source=until(5), optimizer="muon"))
    assert checkpoint.newest(tmp_path / "run")["step"] == 4
    assert not changed(whole, values(train(job(tmp_path / "run", seed=9, optimizer="muon"))))


def test_another_optimizer_cannot_go_on(tmp_path):
    with pytest.raises(RuntimeError, match="died"):
        train(job(tmp_path, source=until(5), optimizer="muon"))
    with pytest.raises(PunaError, match="train.optimizer.*muon.*adamw"):
        train(job(tmp_path, optimizer="adamw"))
    with pytest.raises(PunaError, match="train.optimizer must be adamw, muon, muon_attention, not 'sgd'"):
        TrainConfig(optimizer="sgd")
