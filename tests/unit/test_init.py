"""Initial values are what `model/init.py` promises: a scale by kind, a function of seed, name and expert alone."""

import dataclasses
import math

import pytest
import torch
from training_helpers import CONFIG, changed, random_batch, values

from puna.errors import PunaError
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.model.init import initial_value, std_of

# Wide enough that a sample's standard deviation is within two percent, deep enough that branch ends shrink.
EYE = VisionConfig(image_size=16, patch_size=4, width=128, layers=3, heads=4, mlp_width=256, adapter_width=192)
WIDE = ModelConfig(
    vocab_size=512, d_model=128, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=48, expert_width=160, dense_width=224,
    n_experts=8, moe_step=2, patch_token=7, vision=EYE,
)  # fmt: skip
END, EYE_END = math.sqrt(4 / 8), 1 / math.sqrt(2 * 3)
TRUNCATED = 0.98658  # standard deviation of a unit normal cut off at 3

EXPECTED = {  # standard deviations before the cut
    "tok_embeddings.weight": 0.2,
    "layers.0.attention.wqkv.weight": 128**-0.5,
    "layers.0.attention.wo.weight": 192**-0.5 * END,
    "layers.0.feed_forward.w13.weight": 128**-0.5,
    "layers.0.feed_forward.w2.weight": 224**-0.5 * END,
    "layers.7.moe.experts.w13": 128**-0.5,
    "layers.7.moe.experts.w2": 160**-0.5 * END,
    "layers.7.moe.shared.w13.weight": 128**-0.5,
    "layers.7.moe.shared.w2.weight": 160**-0.5 * END,
    "layers.7.moe.router.weight": 128**-0.5 / 2,
    "vision.patch_embedding.weight": 48**-0.5,
    "vision.positional_embedding": 0.5,
    "vision.layers.0.attention.wq.weight": 128**-0.5,
    "vision.layers.0.attention.wo.weight": 128**-0.5 * EYE_END,
    "vision.layers.0.mlp.fc1.weight": 128**-0.5,
    "vision.layers.0.mlp.fc2.weight": 256**-0.5 * EYE_END,
    "vision.adapter.fc1.weight": 512**-0.5,
    "vision.adapter.fc2.weight": 192**-0.5,
    "vision.projector.weight": 192**-0.5,
}


@pytest.fixture(scope="module")
def wide():
    return values(Llama4(WIDE, seed=3))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_scale_of_each_kind(wide, name):
    value, std = wide[name], EXPECTED[name]
    assert std_of(name, tuple(value.shape), WIDE) == pytest.approx(std)
    n = value.numel()
    assert float(value.std()) == pytest.approx(TRUNCATED * std, rel=4 / math.sqrt(2 * n))
    assert abs(float(value.mean())) < 5 * std / math.sqrt(n)
    assert float(value.abs().max()) <= 3 * std * (1 + 1e-6)
    if n > 10_000:
        assert float(value.abs().max()) > 2.7 * std, "cut off too early"


def test_constants(wide):
    assert not wide["output.weight"].any()
    constant = {name for name, value in wide.items() if value.unique().numel() == 1}
    assert constant == {"output.weight"} | {n for n in wide if n.endswith(".bias") or "norm" in n}
    for name in constant - {"output.weight"}:
        assert float(wide[name].flatten()[0]) == (0 if name.endswith(".bias") else 1), name
    positions = wide["vision.class_embedding"]
    assert float(positions.std()) == pytest.approx(128**-0.5, rel=0.2)


def test_every_parameter_is_one_of_these(wide):
    kinds = {"".join(c for c in name if not c.isdigit()) for name in EXPECTED}
    for name, value in wide.items():
        kind = "".join(c for c in name if not c.isdigit())
        assert kind in kinds or value.dim() == 1 or name in ("output.weight",) or ".attention.w" in name, name
        std = std_of(name, tuple(value.shape), WIDE)
        assert (std is None) == (value.unique().numel() == 1), name


@pytest.mark.parametrize("layers", [1, 4, 8, 32])
def test_branch_ends_shrink_with_depth_beyond_four_layers(layers):
    config = dataclasses.replace(WIDE, n_layers=layers, moe_layers=None, nope_layers=None)
    for name, shape in (("layers.0.attention.wo.weight", (128, 192)), ("layers.0.moe.experts.w2", (8, 160, 128))):
        plain = shape[1] ** -0.5
        assert std_of(name, shape, config) == pytest.approx(plain * min(1, math.sqrt(4 / layers)))
        slow = dataclasses.replace(config, ffn_init=0.1)
        share = 0.1 if "experts" in name else 1.0
        assert std_of(name, shape, slow) == pytest.approx(share * std_of(name, shape, config))
    assert std_of("layers.0.attention.wqkv.weight", (384, 128), config) == 128**-0.5


@pytest.mark.parametrize("share", [-0.1, math.nan, math.inf])
def test_an_impossible_share_is_named(share):
    with pytest.raises(PunaError, match="ffn_init"):
        dataclasses.replace(WIDE, ffn_init=share)


def test_the_residual_stays_as_in_four_layers():
    """What the scale of branch ends is for: the depth of a new model does not show in its last hidden state's size."""

    def growth(layers, scaled=True):
        config = dataclasses.replace(WIDE, n_layers=layers, moe_layers=None, nope_layers=None, vision=None)
        model = Llama4(config, seed=1).eval()
        with torch.no_grad():
            if not scaled:
                for name, p in model.named_parameters():
                    if name.endswith(("wo.weight", "w2.weight", "w2")):
                        p /= min(1, math.sqrt(4 / layers))
            x = []
            model.norm.register_forward_hook(lambda module, inputs, output: x.append(inputs[0]))
            model.hidden(torch.randint(8, 512, (2, 64), generator=torch.Generator().manual_seed(0)))
        return float(x[0].square().mean().sqrt())

    assert growth(16) == pytest.approx(growth(4), rel=0.2)
    assert growth(16, scaled=False) > 1.5 * growth(4)


def test_values_depend_on_the_seed_and_nothing_else():
    torch.manual_seed(0)
    first = values(Llama4(CONFIG, seed=3))
    torch.manual_seed(1)
    assert not changed(first, values(Llama4(CONFIG, seed=3)))
    random = {name for name, value in first.items() if value.unique().numel() > 1}
    assert changed(first, values(Llama4(CONFIG, seed=4))) == random and "layers.1.moe.experts.w2" in random


def test_values_depend_on_no_order_of_construction():
    """One parameter alone, or one of a model with other parts, starts the same; other names start otherwise."""
    model = values(Llama4(CONFIG, seed=3))
    for name in reversed(model):
        assert torch.equal(initial_value(name, tuple(model[name].shape), CONFIG, 3), model[name]), name
    text = values(Llama4(dataclasses.replace(CONFIG, vision=None), seed=3))
    assert not changed({n: v for n, v in model.items() if not n.startswith("vision.")}, text)
    assert not torch.equal(model["layers.0.attention.wqkv.weight"], model["layers.1.attention.wqkv.weight"])


def test_an_expert_is_the_same_among_more_experts():
    """Sharding by experts, or adding some, changes none of the others."""
    shape = (4, 32, 48)
    few = initial_value("layers.1.moe.experts.w13", shape, CONFIG, 3)
    many = initial_value("layers.1.moe.experts.w13", (16, 32, 48), CONFIG, 3)
    assert torch.equal(many[:4], few)
    assert len({tuple(expert.flatten().tolist()) for expert in many}) == 16, "two experts start equal"


@pytest.mark.parametrize("vocabulary", [96, 300])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary(vocabulary):
    model, batch = Llama4(dataclasses.replace(CONFIG, vocab_size=vocabulary), seed=1), random_batch()
    logits = model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
    assert not logits.any()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(vocabulary), rel=1e-6)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"output.weight"}, "the head must learn something before it asks the body"


def test_a_tied_head_is_the_embedding():
    model = Llama4(dataclasses.replace(CONFIG, tie_embeddings=True), seed=1)
    assert "output.weight" not in values(model)
    assert float(model.head_weight.detach().std()) == pytest.approx(0.2 * TRUNCATED, rel=0.05)


def test_experts_are_chosen_about_evenly_at_first():
    """The router's half scale: scores near one half, and no expert without work."""
    model, logits = Llama4(dataclasses.replace(WIDE, vision=None), seed=1).eval(), []
    layers = [model.layers[i].moe for i in (1, 3, 5, 7)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda moe, inputs: logits.append(inputs[0] @ moe.router.weight.T))
    with torch.no_grad():
        model.hidden(torch.randint(8, 512, (8, 64), generator=torch.Generator().manual_seed(0)))
    for layer, raw in zip(layers, logits, strict=True):
        assert float(raw.std()) == pytest.approx(0.5, rel=0.1) and float(raw.sigmoid().std()) < 0.15
        assert layer.counts_E.min() > 0 and layer.counts_E.max() < 2.5 * layer.counts_E.float().mean()
