"""Attention's kernels against the formula, one query at a time."""

import math

import pytest
import torch

from puna.model import attend as kernels
from puna.model.attend import BLOCK, BLOCKS_UP_TO, attend


def literal(q_BTHd, k_BTKd, v_BTKd, visible_BTT):
    """Softmax over the visible keys, query by query and head by head."""
    B, T, H, d = q_BTHd.shape
    group = H // k_BTKd.shape[2]
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = visible_BTT[b, t].nonzero().squeeze(-1)
                scores = k_BTKd[b, seen, h // group] @ q_BTHd[b, t, h] / math.sqrt(d)
                rows.append(scores.softmax(0) @ v_BTKd[b, seen, h // group])
    return torch.stack(rows).view(B, T, H, d)


def results(function, tensors, seed):
    """Output and the three gradients."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.backward(seed)
    return [out.detach(), *(t.grad for t in leaves)]


def case(T, H, K, dtype=torch.float64, B=2, d=4):
    generator = torch.Generator().manual_seed(T)
    tensors = [torch.randn(B, T, n, d, generator=generator).to(dtype) for n in (H, K, K)]
    return tensors, torch.randn(B, T, H, d, generator=generator).to(dtype)


def close(found, wanted, tolerance):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours.double() - theirs.double()).norm()) <= tolerance * float(theirs.double().norm())


@pytest.mark.parametrize("T", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("H, K", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["causal", "everything", "packed"])
def test_blocks_are_the_formula(T, H, K, kind):
    tensors, seed = case(T, H, K)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(2, T, T)
    if kind == "packed":
        document = torch.stack([torch.arange(T) // 7, torch.arange(T) // 50])
        visible = causal & (document[:, :, None] == document[:, None, :])
        mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, float("-inf"))[:, None]
        ours = results(lambda *x: attend(*x, mask), tensors, seed)
        assert T < 8 or not torch.allclose(ours[0], attend(*tensors)), "the mask changes nothing"
    else:
        visible = causal if kind == "causal" else torch.ones_like(causal)
        ours = results(lambda *x: attend(*x, causal=kind == "causal"), tensors, seed)
    close(ours, results(lambda *x: literal(*x, visible), tensors, seed), 1e-12)


@pytest.mark.parametrize("T", [BLOCKS_UP_TO, BLOCKS_UP_TO + 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_kernels_are_one_function(T, dtype, tolerance, monkeypatch):
    """Where one ends and the other begins: the same values and gradients."""
    tensors, seed = case(T, 4, 2, dtype, d=16)
    mask = torch.full((T, T), float("-inf"), dtype=dtype).triu_(1)
    mask[T // 2 :, : T // 2] = float("-inf")
    for given in (None, mask.expand(2, 1, T, T)):
        found = results(lambda *x, m=given: attend(*x, m), tensors, seed)
        monkeypatch.setattr(kernels, "BLOCKS_UP_TO", 0 if T <= BLOCKS_UP_TO else 1 << 20)
        close(found, results(lambda *x, m=given: attend(*x, m), tensors, seed), tolerance)
        monkeypatch.undo()


def test_a_later_key_is_never_multiplied(monkeypatch):
    """What makes it fast: products of a causal row stop at the block's end."""
    seen, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **out: (seen.append(b.shape[-1]), real(a, b, **out))[1])
    tensors, _ = case(3 * BLOCK, 2, 1)
    attend(*tensors)
    assert seen[::2] == [BLOCK, 2 * BLOCK, 3 * BLOCK]
