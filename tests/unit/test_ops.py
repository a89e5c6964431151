"""The operations with a fast path of their own, against what they mean."""

import pytest
import torch

from puna.model import ops

COUNTS = ([64, 0, 1, 15, 16, 17, 40, 7], [0, 0, 159, 1, 0, 0, 0, 0], [1, 158, 0, 0, 0, 0, 0, 1], [0] * 7 + [160])


def literal(x_TD, w_EDF, counts):
    """One expert after the other, with autograd's own products."""
    parts = x_TD.split(counts)
    return torch.cat([part @ w for part, w in zip(parts, w_EDF, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_expert_mm_is_one_product_an_expert(counts, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 24, generator=generator).to(dtype)
    w = torch.randn(8, 24, 40, generator=generator).to(dtype)
    seed = torch.randn(160, 40, generator=generator).to(dtype)
    found = []
    for function in (lambda a, b: ops.expert_mm(a, b, torch.tensor(counts)), lambda a, b: literal(a, b, counts)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = function(a, b)
        y.backward(seed)
        found.append((y.detach(), a.grad, b.grad))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).double().norm()) <= tolerance * float(theirs.double().norm())
    empty = [e for e, n in enumerate(counts) if not n]
    assert not found[0][2][empty].any(), "an expert without tokens has no gradient"


def test_products_of_a_training_step_have_few_shapes(monkeypatch):
    """oneDNN keeps 1,024 kernels; every number of rows is another one."""
    seen, real = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: (seen.add((*a.shape, *b.shape)), real(a, b, **out))[1])
    w = torch.randn(4, 8, 12, requires_grad=True)
    for step in range(40):
        cut = sorted(torch.randint(0, 257, (3,), generator=torch.Generator().manual_seed(step)).tolist())
        counts = torch.tensor([b - a for a, b in zip([0, *cut], [*cut, 256], strict=True)])
        x = torch.randn(256, 8, dtype=torch.bfloat16, requires_grad=True)
        ops.expert_mm(x, w, counts).float().sum().backward()
    rows = {shape[0] for shape in seen if shape[1] == 8} | {shape[1] for shape in seen if shape[0] == 8}
    assert len(seen) <= 3 * 16 and all(n % ops.ROUND == 0 for n in rows)


def test_decoding_multiplies_no_row_too_many(monkeypatch):
    seen, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: (seen.append(len(a)), real(a, b, **out))[1])
    x, w = torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(3, 8, 12, dtype=torch.bfloat16)
    ops.expert_mm(x, w, torch.tensor([1, 0, 4]))
    assert seen == [1, 4]


def test_master_weights_are_multiplied_in_the_activations_precision():
    """float32 weights under bfloat16 activations: as if cast first, and the gradient comes back in float32."""
    generator, counts = torch.Generator().manual_seed(0), [90, 0, 70]
    x = torch.randn(160, 24, generator=generator).bfloat16()
    w = torch.randn(3, 24, 40, generator=generator)
    seed = torch.randn(160, 40, generator=generator).bfloat16()
    found = []
    for cast in (False, True):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = ops.expert_mm(a, b.bfloat16() if cast else b, torch.tensor(counts))
        y.backward(seed)
        found.append((y.detach(), a.grad, b.grad))
    assert found[0][2].dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0][0].float(), literal(x.float(), w, counts)), "nothing was rounded"
