"""Each parameter in its group, each group at its own pace, decay on matrices alone, and the schedule at its edges."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_helpers import CONFIG, changed, lively_model, random_batch, values

from puna.errors import PunaError
from puna.model import Llama4
from puna.optim import build_adamw, wsd
from puna.optim.adamw import GROUPS, group_of, set_lr
from puna.optim.schedule import anneal
from puna.train import TrainConfig
from puna.train.step import train_step
from puna.train.terms import NextToken

EXPECTED = {
    "tok_embeddings.weight": "embedding",
    "output.weight": "head",
    "norm.weight": "vector",
    "layers.0.attention_norm.weight": "vector",
    "layers.0.ffn_norm.weight": "vector",
    "layers.0.attention.wqkv.weight": "matrix",
    "layers.0.attention.wo.weight": "matrix",
    "layers.0.feed_forward.w13.weight": "ffn",
    "layers.0.feed_forward.w2.weight": "ffn",
    "layers.1.moe.router.weight": "router",
    "layers.1.moe.experts.w13": "ffn",
    "layers.1.moe.experts.w2": "ffn",
    "layers.1.moe.shared.w13.weight": "ffn",
    "layers.1.moe.shared.w2.weight": "ffn",
    "vision.patch_embedding.weight": "vision",
    "vision.class_embedding": "sight",
    "vision.positional_embedding": "sight",
    "vision.norm_pre.weight": "sight",
    "vision.norm_post.bias": "sight",
    "vision.layers.0.norm1.weight": "sight",
    "vision.layers.0.norm2.bias": "sight",
    "vision.layers.0.attention.wq.weight": "vision",
    "vision.layers.0.attention.wk.weight": "vision",
    "vision.layers.0.attention.wv.weight": "vision",
    "vision.layers.0.attention.wo.weight": "vision",
    "vision.layers.0.attention.wo.bias": "sight",
    "vision.layers.0.mlp.fc1.weight": "vision",
    "vision.layers.0.mlp.fc2.weight": "vision",
    "vision.layers.0.mlp.fc2.bias": "sight",
    "vision.adapter.fc1.weight": "adapter",
    "vision.adapter.fc2.weight": "adapter",
    "vision.projector.weight": "adapter",
}


def optimizer(model, decay=0.1, **multipliers):
    made = build_adamw(model, 1e-2, decay, (0.9, 0.99), 1e-8, multipliers)
    set_lr(made, 1.0)
    return made


def members(made, model):
    """Parameter names of each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in made.param_groups}


def test_every_parameter_is_in_one_group_and_the_right_one():
    model = Llama4(CONFIG)
    groups = members(optimizer(model), model)
    assert tuple(groups) == GROUPS, "a group of a model with everything is empty"
    placed = [name for names in groups.values() for name in names]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    for name, group in EXPECTED.items():
        assert name in groups[group], name
    for layer in (1, 2, 3):  # a parameter's group does not depend on its layer
        for group, names in groups.items():
            for name in names:
                twin = name.replace(f"layers.{layer}.", "layers.0.")
                assert EXPECTED.get(twin, group) == group, name


def test_all_kinds_of_parameters_are_covered_above():
    kinds = {"".join(c for c in name if not c.isdigit()) for name in EXPECTED}
    for name, _ in Llama4(CONFIG).named_parameters():
        kind = "".join(c for c in name if not c.isdigit())
        assert kind in kinds or name.endswith((".bias", "norm1.weight", "norm2.weight", "norm_post.weight")), name


def test_attention_norms_and_frozen_parameters():
    plain = Llama4(dataclasses.replace(CONFIG, tie_embeddings=True, vision=None))
    plain.tok_embeddings.weight.requires_grad_(False)
    groups = members(optimizer(plain), plain)
    assert set(groups) == {"matrix", "ffn", "vector", "router"}, "a frozen or missing parameter has a group"
    assert group_of("layers.0.attention_norm.weight", torch.zeros(3, 3)) == "vector"  # by name, whatever its rank


def step(model, made):
    result = train_step(model, made, random_batch().split(2), NextToken(), 1.0, 64)
    assert not result.skipped


@pytest.mark.parametrize("group", GROUPS)
def test_a_multiplier_reaches_its_group_and_no_other(group):
    model = lively_model()
    others = {name: 0.0 for name in GROUPS if name != group}
    made = optimizer(model, **others)
    before = values(model)
    step(model, made)
    assert changed(before, values(model)) == set(members(made, model)[group]) != set()
    for each in made.param_groups:
        assert each["lr"] == (1e-2 if each["name"] == group else 0)


def test_adams_first_step_is_the_groups_rate():
    """The first step moves each entry with a gradient by its group's learning rate, whatever the gradient's size."""
    model = lively_model()
    made = optimizer(model, decay=0.0, head=3.0, adapter=0.1, router=0.5)
    set_lr(made, 0.25)
    before = values(model)
    step(model, made)
    rates = {"head": 3.0, "adapter": 0.1, "router": 0.5}
    for group, names in members(made, model).items():
        for name in names:
            moved = (values(model)[name] - before[name]).abs().flatten()
            rate = 1e-2 * 0.25 * rates.get(group, 1.0)
            assert float(moved.quantile(0.99)) == pytest.approx(rate, rel=1e-2), name
            assert float(moved.max()) < 1.01 * rate, name


def test_weight_decay_shrinks_matrices_and_nothing_else():
    """With a gradient of zero a step is the decay alone: lr * decay of the value."""
    model = lively_model()
    made = optimizer(model, decay=0.1)
    before = values(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    after = values(model)
    moved = changed(before, after)
    groups = members(made, model)
    decaying = {name for group in ("matrix", "ffn", "vision", "adapter") for name in groups[group]}
    assert moved == decaying
    for name in decaying:
        torch.testing.assert_close(after[name], before[name] * (1 - 1e-2 * 0.1))
    assert {g["name"]: g["weight_decay"] for g in made.param_groups} == {
        group: 0.1 if group in ("matrix", "ffn", "vision", "adapter") else 0.0 for group in GROUPS
    }


def test_the_rates_of_a_configuration_are_those_of_the_groups():
    config = TrainConfig(lr_head=2.0, lr_vision=0.5)
    assert config.multipliers.keys() == set(GROUPS) - {"matrix"}
    made = optimizer(Llama4(CONFIG), **config.multipliers)
    peaks = {g["name"]: g["peak"] for g in made.param_groups}
    assert peaks == {group: 1e-2 * {"head": 2.0, "vision": 0.5}.get(group, 1.0) for group in GROUPS}
    for field, value in (("lr_head", -1.0), ("lr", 0.0), ("decay", 1.5), ("steps", 0), ("compute_dtype", "float16")):
        with pytest.raises(PunaError, match=f"train.{field}"):
            TrainConfig(**{field: value})
    with pytest.raises(PunaError, match="divide"):
        TrainConfig(rows=6, accumulate=4)
    TrainConfig(lr_head=0.0)  # frozen


# ------------------------------------------------------------------------------------------------------------ schedules


def test_wsd_by_hand():
    got = [wsd(step, 20, warmup=4, decay=0.25, floor=0.1) for step in range(20)]
    warmup, flat = [0.25, 0.5, 0.75, 1.0], [1.0] * 11
    decay = [0.1 + 0.9 * left / 6 for left in (5, 4, 3, 2, 1)]
    assert got == pytest.approx(warmup + flat + decay)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 100, 0, 0.0), 1.0),  # neither warm-up nor decay
        ((99, 100, 0, 0.0), 1.0),
        ((0, 1, 20, 0.2), 1.0),  # one step is a whole run
        ((0, 10, 100, 0.0), 1 / 5),  # a warm-up longer than half the run ends there
        ((4, 10, 100, 0.0), 1.0),
        ((5, 10, 100, 0.0), 1.0),
        ((5, 10, 100, 0.5, 0.0), 5 / 6),
        ((9, 10, 100, 0.5, 0.0), 1 / 6),  # the last step still moves
        ((0, 10, 0, 1.0), 10 / 11),  # decay alone
    ],
)
def test_wsd_at_its_edges(arguments, expected):
    assert wsd(*arguments) == pytest.approx(expected)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.floats(0, 1))
def test_wsd_rises_stays_and_falls(steps, warmup, decay, floor):
    got = [wsd(step, steps, warmup, decay, floor) for step in range(steps)]
    assert all(0 < value <= 1 for value in got)
    up = min(warmup, steps // 2)
    down = max(up, steps - round(decay * steps))
    assert got[:up] == sorted(got[:up]) and (not up or got[up - 1] == 1)
    assert all(value == 1 for value in got[up:down])
    assert got[down:] == sorted(got[down:], reverse=True)
    assert all(value >= floor for value in got[down:])


def test_a_longer_run_is_the_same_until_it_decays():
    """The flat part needs no horizon."""
    short, long = ([wsd(step, steps, 10, 0.2) for step in range(80)] for steps in (100, 1000))
    assert short == long and wsd(95, 100, 10, 0.2) < wsd(95, 1000, 10, 0.2)


def test_anneal_by_hand():
    assert [anneal(step, 10, 0.5) for step in range(10)] == pytest.approx([1] * 5 + [1, 0.75, 0.5, 0.25, 0])
    assert anneal(0, 1) == 0 and anneal(0, 2) == 1 and anneal(1, 2) == 0


@given(st.integers(2, 300), st.floats(0, 1))
def test_anneal_ends_at_zero(steps, fraction):
    got = [anneal(step, steps, fraction) for step in range(steps)]
    assert got[-1] == 0 and got[0] == 1 and got == sorted(got, reverse=True)
    whole = steps - max(1, round(fraction * steps))
    assert all(value == 1 for value in got[:whole]) and math.isclose(sum(v < 1 for v in got), steps - whole, abs_tol=1)
