"""Attention's kernels against the formula, one query at a time."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from puna.model import attend as kernels
from puna.model.attend import BLOCK, BLOCKS_UP_TO, attend
from puna.model.span import FLEX_BLOCK, Span


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


def matrices(q_BTHd, k_BSKd, v_BSKd, visible_BTS):
    """The same with whole matrices, for lengths at which `literal` takes too long."""
    k, v = (t.repeat_interleave(q_BTHd.shape[2] // t.shape[2], dim=2) for t in (k_BSKd, v_BSKd))
    scores = torch.einsum("bthd,bshd->bhts", q_BTHd, k) / math.sqrt(q_BTHd.shape[3])
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible_BTS[:, None], float("-inf")).softmax(-1), v)


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
        span = Span(visible.to(torch.int8).argmax(-1), torch.arange(T), T)
        ours = results(lambda *x: attend(*x, span), tensors, seed)
        assert T < 8 or not torch.allclose(ours[0], attend(*tensors)), "the span changes nothing"
    else:
        visible = causal if kind == "causal" else torch.ones_like(causal)
        ours = results(lambda *x: attend(*x, causal=kind == "causal"), tensors, seed)
    close(ours, results(lambda *x: literal(*x, visible), tensors, seed), 1e-12)


@pytest.mark.parametrize("T", [BLOCKS_UP_TO, BLOCKS_UP_TO + 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_kernels_are_one_function(T, dtype, tolerance, monkeypatch):
    """Where one ends and the other begins: the same values and gradients."""
    tensors, seed = case(T, 4, 2, dtype, d=16)
    first = torch.where(torch.arange(T) < T // 2, 0, T // 2).expand(2, T)
    for given in (None, Span(first, torch.arange(T), T)):
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


def spans(T=300, S=400):
    """Spans of all shapes: documents, later keys that nobody sees, and queries from both ends of a shared row."""
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(T)
    starts = (torch.rand(2, T, generator=generator) < 0.02).int()
    documents = torch.where(starts > 0, place, 0).cummax(-1).values
    yield "documents", Span(documents, place, T)
    yield "one document", Span(torch.zeros(2, T, dtype=torch.int64), place, T)
    row = torch.arange(S)
    whole = Span(torch.where(row < 256, 0, 256).expand(2, S), row, S)
    yield "head and tail of a row", whole.cut(torch.cat([row[:100], row[-100:]]))


@pytest.mark.parametrize("name, span", list(spans()))
def test_a_span_is_the_formula_in_every_kernel(name, span, monkeypatch):
    T, S = len(span.last_T), span.keys
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    seed = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    place = torch.arange(S)
    visible = torch.stack([(place >= first[:, None]) & (place <= span.last_T[:, None]) for first in span.first_BT])
    wanted = results(lambda *x: matrices(*x, visible), tensors, seed)
    for limit, block in ((1 << 20, 1), (0, 64), (0, 512), (0, 7)):
        monkeypatch.setattr(kernels, "BLOCKS_UP_TO", limit)
        monkeypatch.setattr(kernels, "LONG", block)
        close(results(lambda *x: attend(*x, span, causal=False), tensors, seed), wanted, 1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name, span", list(spans()))
def test_flex_blocks_are_those_that_somebody_sees(name, span):
    """Seen whole, in part, not at all; and FlexAttention's own forward with them (on a CPU it has no backward)."""
    mask, visible, n = span.blocks(), span.visible(0, len(span.last_T)), FLEX_BLOCK
    for b in range(visible.shape[0]):
        for i in range(0, visible.shape[1], n):
            row = [visible[b, i : i + n, j : j + n] for j in range(0, visible.shape[2], n)]
            at = (b, 0, i // n)
            fully = set(mask.full_kv_indices[at][: mask.full_kv_num_blocks[at]].tolist())
            partly = set(mask.kv_indices[at][: mask.kv_num_blocks[at]].tolist())
            assert fully == {j for j, cell in enumerate(row) if cell.all() and cell.shape[1] == n}
            assert not fully & partly and {j for j, cell in enumerate(row) if cell.any()} <= fully | partly
    T, S = visible.shape[1:]
    q, k, v = (torch.randn(2, heads, length, 16) for heads, length in ((4, T), (2, S), (2, S)))
    with torch.no_grad():
        found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible[:, None], enable_gqa=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
