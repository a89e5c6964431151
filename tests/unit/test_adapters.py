"""Adapters against their formula written out, on linears and experts, over every kind of base; what is trained and what
is kept."""

import copy
import dataclasses

import pytest
import torch
from training_helpers import CONFIG, lively_model, random_batch

from puna.errors import PunaError
from puna.model import Llama4, lora, ops
from puna.model.lora import LoRA, LoRAConfig
from puna.model.weights import matrices, plain
from puna.precision.quantized import Quantization, Quantized, attach
from puna.train.step import train_step
from puna.train.terms import NextToken

ALL = LoRAConfig(rank=3, alpha=6.0, targets=("*",))


def adapted(config=ALL, seed=0, lively=True, model=None):
    """A model with adapters; `lively` ones are not zero."""
    model = lively_model() if model is None else model
    lora.attach(model, config, seed)
    if lively:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in lora.adapters(model).items():
                if name.endswith(".B"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def literal(weight):
    """W + (alpha / r) A B, expert by expert, differentiable in A and B."""
    if len(weight.shape) == 2:
        return weight.base + weight.scale * (weight.B @ weight.A)
    return torch.stack([weight.base[e] + weight.scale * (weight.A[e] @ weight.B[e]) for e in range(weight.shape[0])])


def test_every_matrix_is_a_target_and_nothing_else():
    model = lively_model()
    names = set(matrices(model))
    assert names == {n for n, p in model.named_parameters() if p.dim() > 1 and "embedding" not in n} | {
        "vision.patch_embedding.weight"
    }
    adapted(model=model)
    assert {n for n, w in plain(model).items() if isinstance(w, LoRA)} == names
    assert list(plain(lively_model())) == list(dict(lively_model().named_parameters()))
    assert model.parameter_count() == lively_model().parameter_count()


@pytest.mark.parametrize("counts", [(4, 0, 5, 1), (0, 0, 10, 0), (1, 2, 3, 4)])
def test_experts_are_the_formula_and_so_are_their_gradients(counts):
    """Also of an expert without a token: no gradient, no NaN."""
    generator = torch.Generator().manual_seed(1)
    w, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in
               ((4, 6, 10), (4, 6, 2), (4, 2, 10)))  # fmt: skip
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = LoRA(w, A.clone(), B.clone(), 1.7)
    y = ops.expert_mm(x, weight, torch.tensor(counts))
    ends = torch.tensor(counts).cumsum(0).tolist()
    full = literal(weight)
    expected = torch.cat([x[end - n : end] @ full[e] for e, (n, end) in enumerate(zip(counts, ends, strict=True))])
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(y, (x, weight.A, weight.B), upstream)
    theirs = torch.autograd.grad(expected, (x, weight.A, weight.B), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert w.grad is None and all(float(ours[1][e].abs().sum()) == 0 for e, n in enumerate(counts) if not n)


def test_linears_are_the_formula_with_a_bias_too():
    x, w, b = torch.randn(2, 5, 6), torch.randn(4, 6), torch.randn(4)
    weight = LoRA(w, torch.randn(3, 6), torch.randn(4, 3), 0.5)
    torch.testing.assert_close(ops.linear(x, weight, b), x @ literal(weight).T + b)
    torch.testing.assert_close(weight.rows(1, 3), literal(weight)[1:3])


def logits(model, seed=0):
    batch = random_batch(seed)
    with torch.no_grad():
        return model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)


def test_the_first_output_is_the_bases_bitwise_and_a_trained_one_is_not():
    base = lively_model()
    assert torch.equal(logits(adapted(lively=False)), logits(base))
    assert not torch.allclose(logits(adapted()), logits(base), atol=1e-2)


@pytest.mark.parametrize("target", ["*.attention.*", "*.experts.w13", "*.experts.w2", "*.shared.*", "*router*",
                                    "vision.*", "output.weight", "*feed_forward*"])  # fmt: skip
def test_each_target_changes_the_output_and_alone_has_gradients(target):
    model = adapted(dataclasses.replace(ALL, targets=(target,)))
    base, before = lively_model(), logits(model)
    assert not torch.equal(before, logits(base))
    batch = random_batch()
    model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT).square().mean().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(lora.adapters(model))
    lora.merge(model)
    assert torch.allclose(logits(model), before, atol=1e-4)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in base.named_parameters()}


def test_the_model_is_the_one_of_merged_weights():
    """Forward and gradients of every A and B, text and pictures, against the model whose weights are written out."""
    model = adapted(model=lively_model(dtype=torch.float64))
    model.double()
    batch = random_batch()
    tiles = batch.tiles.double()
    upstream = torch.randn(*batch.tokens_BT.shape, CONFIG.vocab_size, dtype=torch.float64)
    out = model(batch.tokens_BT, tiles, batch.doc_ids_BT)
    ours = torch.autograd.grad(out, list(lora.adapters(model).values()), upstream)
    full = {name: literal(w) if isinstance(w, LoRA) else w for name, w in plain(model).items()}
    plain_model = lively_model(dtype=torch.float64)
    expected = torch.func.functional_call(plain_model, full, (batch.tokens_BT, tiles, batch.doc_ids_BT))
    torch.testing.assert_close(out, expected)
    theirs = torch.autograd.grad(expected, list(lora.adapters(model).values()), upstream)
    for name, a, b in zip(lora.adapters(model), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_ranks_and_alpha_by_pattern():
    config = LoRAConfig(
        4, 8.0, ("*.attention.*", "*.experts.*"), {"*.experts.*": 2, "*.experts.w2": 1, "layers.0.*": 0}
    )
    weights = {n: w for n, w in plain(adapted(config)).items() if isinstance(w, LoRA)}
    assert not any(name.startswith("layers.0.") for name in weights)
    assert {tuple(w.A.shape) for n, w in weights.items() if n.endswith("experts.w2")} == {(4, CONFIG.expert_width, 1)}
    assert {w.scale for n, w in weights.items() if "attention" in n} == {2.0}
    assert {w.scale for n, w in weights.items() if n.endswith("w13")} == {4.0}
    assert {w.B.shape[1] for n, w in weights.items() if "attention" in n} == {4}


def test_the_default_is_the_text_model_without_routers():
    model = adapted(LoRAConfig(2))
    names = {n for n, w in plain(model).items() if isinstance(w, LoRA)}
    assert names == {n for n in matrices(model) if n.startswith("layers.") and "router" not in n}
    adapted(LoRAConfig(2), model=Llama4(dataclasses.replace(CONFIG, moe_layers=(), vision=None, patch_token=None)))


def test_the_first_A_depends_on_seed_and_name_alone():
    one, two, other = (lora.adapters(adapted(lively=False, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one if n.endswith(".A"))
    few = lora.adapters(adapted(dataclasses.replace(ALL, targets=("*.experts.w2",)), lively=False))
    assert all(torch.equal(one[n], few[n]) for n in few)
    first = [a for n, a in one.items() if n.endswith("experts.w13.A")][0]
    assert not torch.equal(first[0], first[1]) and 0.7 < float(first.detach().std() * CONFIG.d_model**0.5) < 1.3


WRONG = [
    (dict(rank=-1), "lora.rank must be a whole number"),
    (dict(rank=2, alpha=0.0), "lora.alpha must be positive"),
    (dict(rank=2, base="int3"), "lora.base must be"),
    (dict(rank=2, targets=()), "lora.targets is empty"),
    (dict(rank=2, targets=("*wqk",)), "no matrix of the model is called like '\\*wqk'; there are"),
    (dict(rank=2, targets=("tok_embeddings*",)), "no matrix"),
    (dict(rank=2, ranks={"*wqk": 1}), "no matrix of the model is called like"),
    (dict(rank=0), "rank 0: set lora.rank"),
]


@pytest.mark.parametrize(("settings", "match"), WRONG)
def test_wrong_settings_say_what_they_may_be(settings, match):
    with pytest.raises(PunaError, match=match):
        lora.attach(lively_model(), LoRAConfig(**settings))


def test_adapters_of_another_model_are_refused():
    A, B = torch.zeros(2, 9), torch.zeros(5, 2)  # noqa: N806
    with pytest.raises(PunaError, match="the adapter of output.weight is"):
        lora.put(lively_model(), {"output.weight": (A, B, 1.0)})
    with pytest.raises(PunaError, match="which the base has not"):
        lora.put(lively_model(), {"layers.9.attention.wo.weight": (A, B, 1.0)})


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_over_integers(scheme):
    """The base stays what it is; the output is that of its numbers with the adapters added; gradients reach all."""
    model = lively_model()
    numbers = copy.deepcopy(model)
    attach(model, Quantization(scheme))
    quantized = {n: w for n, w in plain(model).items() if isinstance(w, Quantized)}
    with torch.no_grad():
        for name, weight in quantized.items():
            q, scale = weight.scheme.quantize(dict(numbers.named_parameters())[name])
            weight.q.copy_(q), weight.scale.copy_(scale)
            dict(numbers.named_parameters())[name].copy_(weight.rows(0, weight.shape[0]))
    assert torch.allclose(logits(model), logits(numbers), atol=1e-5)
    adapted(model=model), adapted(model=numbers)
    assert torch.allclose(logits(model), logits(numbers), atol=1e-4)
    batch = random_batch()
    for m in (model, numbers):
        m(batch.tokens_BT, batch.tiles, batch.doc_ids_BT).square().mean().backward()
    ours, theirs = lora.adapters(model), lora.adapters(numbers)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-6, rtol=1e-3, msg=name)


def test_over_bfloat16():
    """A step over a bfloat16 base moves the adapters, which are float32 and so are their gradients, and nothing else;
    each product is the formula with every factor rounded to bfloat16 and every sum not."""
    model = adapted(model=lively_model(dtype=torch.bfloat16))
    assert {w.dtype for n, w in plain(model).items()} == {torch.bfloat16}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(lora.adapters(model).values(), lr=1e-2, weight_decay=0.0)
    result = train_step(model, optimizer, [random_batch()], NextToken(), 1.0, 64)
    assert not result.skipped and result.grad_norm > 0
    for name, p in model.named_parameters():
        is_adapter = name.endswith((".A", ".B"))
        assert p.dtype == (torch.float32 if is_adapter else torch.bfloat16), name
        assert torch.equal(p, before[name]) != is_adapter, name
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())

    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([2, 0, 3, 1])
    weights = plain(model)
    for weight in (weights["layers.0.attention.wo.weight"], next(w for n, w in weights.items() if "experts" in n)):
        x = torch.randn(6, weight.shape[1], generator=generator, dtype=torch.bfloat16)
        y = ops.linear(x, weight) if len(weight.shape) == 2 else ops.expert_mm(x, weight, counts)
        assert y.dtype == torch.bfloat16
        W, A, B = (t.detach().to(torch.bfloat16).double() for t in (weight.base, weight.A, weight.B))  # noqa: N806
        rows, wide = torch.arange(4).repeat_interleave(counts), x.double()
        if len(weight.shape) == 2:
            own, change = wide @ W.T, wide @ A.T @ B.T
        else:
            own = torch.stack([wide[i] @ W[e] for i, e in enumerate(rows)])
            change = torch.stack([wide[i] @ A[e] @ B[e] for i, e in enumerate(rows)])
        scale = float(own.abs().max() + (weight.scale * change).abs().max())
        torch.testing.assert_close(y.double(), own + weight.scale * change, atol=scale * 2**-7, rtol=0)
        assert float((weight.scale * change).abs().max()) > scale * 2**-4  # or the adapter would not show
