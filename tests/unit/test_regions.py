"""Regions: who compiles what where, and that a compiled one computes the same."""

import pytest
import torch

from puna.errors import PunaError
from puna.model import Llama4, ModelConfig, ops, regions
from puna.model.attention import rotated
from puna.model.init import initialise
from puna.model.regions import compiling, region
from puna.model.rope import rotation

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, expert_width=32, dense_width=32,
    n_experts=4, chunk=16,
)  # fmt: skip


def test_it_is_compiled_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(regions, "compiled", lambda function: lambda *x: "compiled")

    @region
    def double(x):
        return x * 2

    one = torch.ones(1)
    assert double(one) == 2 and regions.compiled_on == {"cuda"}
    with compiling("on", "cpu"):
        assert double(one) == "compiled"
        with compiling("off", "cpu"):
            assert double(one) == 2
        with compiling("auto", "cpu"):
            assert double(one) == "compiled"
    assert double(one) == 2 and regions.compiled_on == {"cuda"}
    with compiling("off", "cuda"):
        assert not regions.compiled_on


def test_without_a_compiler_it_is_a_clear_error(monkeypatch):
    def broken(*_):
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(regions, "compiled", lambda function: broken)
    with pytest.raises(PunaError, match=r"train.compile on: .*\(no working C\+\+ compiler\); install g\+\+"):  # noqa: SIM117
        with compiling("on", "cpu"):
            raise AssertionError
    assert regions.compiled_on == {"cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_compiled_regions_compute_the_same(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    turn = rotation(torch.arange(12)[None], torch.rand(4, generator=generator))
    cases = [
        (ops.rms_norm, (3, 16), (torch.rand(16, generator=generator), 1e-5)),
        (ops.rms_norm, (3, 16), (None, 1e-5)),
        (ops.swiglu, (3, 16), ()),
        (rotated, (2, 12, 3, 8), (turn, 1e-5)),
        (rotated, (2, 12, 3, 8), (turn, None)),
    ]
    for function, shape, rest in cases:
        x = torch.randn(shape, generator=generator).to(dtype)
        found = []
        for how in ("off", "on"):
            leaf = x.clone().requires_grad_()
            with compiling(how, "cpu"):
                y = function(leaf, *rest)
                (y.float() ** 2).sum().backward()
            found.append((y.detach(), leaf.grad))
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_model_with_compiled_regions_has_the_same_loss_and_gradients():
    model = Llama4(CONFIG)
    initialise(model, 0)
    found = []
    for how in ("off", "on"):
        for length in (32, 48, 20):  # one compilation for all lengths
            tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))
            model.zero_grad()
            with compiling(how, "cpu"):
                loss = model(tokens).logsumexp(-1).mean()
                loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
