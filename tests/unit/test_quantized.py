"""int8 and int4: the scheme written out number by number, its bounds, its products, and its place on the disk."""

import dataclasses
import json

import pytest
import torch
from training_helpers import CONFIG, lively_model, random_batch

import puna
from puna.cli.main import main
from puna.convert.puna import save
from puna.errors import PunaError
from puna.model import ops
from puna.model.weights import plain
from puna.precision import int4
from puna.precision.quantized import SCHEMES, Quantization, Quantized, attach

SHAPES = [(3, 256, 5), (2, 300, 4), (7, 64), (5, 130), (4, 24, 1)]


def numbers(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def literal_int4(w):
    """llama4-facts.md §5.3, a loop over groups of 128 along the input: (numbers -8..7, scales by group, values)."""
    w = w if w.dim() == 3 else w[..., None]
    whole, values = torch.empty(w.shape, dtype=torch.int64), torch.empty(w.shape)
    scales = {}
    for r in range(w.shape[0]):
        for o in range(w.shape[2]):
            for g in range(0, w.shape[1], 128):
                group = w[r, g : g + 128, o]
                scale = max(float(group.abs().max()), 1e-6) / 8
                scales[r, g // 128, o] = scale
                for i, x in enumerate(group.tolist()):
                    whole[r, g + i, o] = max(-8, min(7, round(x / scale)))
                    values[r, g + i, o] = whole[r, g + i, o] * scale
    return whole, scales, values


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_the_facts_scheme(shape):
    """Numbers, scales, bytes (the even input low) and values."""
    w = numbers(shape)
    q, scale = int4.quantize(w)
    whole, scales, values = literal_int4(w)
    assert (tuple(q.shape), tuple(scale.shape)) == int4.shapes(shape) and q.dtype == torch.uint8
    assert scale.dtype == torch.float32 and scale.numel() == len(scales)
    scale3 = scale if scale.dim() == 3 else scale[..., None]
    assert all(abs(float(scale3[place]) / s - 1) < 1e-6 for place, s in scales.items())
    q3 = q if q.dim() == 3 else q[..., None]
    for r, i, o in [(0, 0, 0), (1, 3, 0), (0, shape[1] // 2 - 1, 0), (1, shape[1] // 2 - 1, whole.shape[2] - 1)]:
        byte = int(q3[r, i, o])
        assert (byte & 15, byte >> 4) == (int(whole[r, 2 * i, o]) & 15, int(whole[r, 2 * i + 1, o]) & 15)
    torch.testing.assert_close(int4.dequantize(q, scale, torch.float32), values.view(shape), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bounds(scheme, shape):
    """Half a scale; a whole one where int4 clamps the largest positive number of a group."""
    module, w = SCHEMES[scheme], numbers(shape)
    q, scale = module.quantize(w)
    wide = scale.repeat_interleave(128, dim=1)[:, : shape[1]]
    off = (module.dequantize(q, scale, torch.float32) - w).abs() / wide
    clamped = (w / wide > 7.5) if scheme == "int4" else torch.zeros_like(w, dtype=torch.bool)
    assert float(off[~clamped].max()) <= 0.5 + 1e-4 and float(off.max()) <= 1 + 1e-4
    assert float(off.max()) > 0.4, "something is rounded"
    relative = float((module.dequantize(q, scale, torch.float32) - w).norm() / w.norm())
    assert {"int8": 0.002, "int4": 0.05}[scheme] < relative < {"int8": 0.01, "int4": 0.15}[scheme]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_zeros_and_rows(scheme):
    module = SCHEMES[scheme]
    q, scale = module.quantize(torch.zeros(2, 128, 3))
    assert float(module.dequantize(q, scale, torch.float32).abs().max()) == 0 and float(scale.min()) > 0
    w = numbers((6, 256))
    whole, part = module.quantize(w), module.quantize(w[2:4])
    assert all(torch.equal(a[2:4], b) for a, b in zip(whole, part, strict=True)), "a row depends on itself alone"
    with pytest.raises(PunaError, match="odd number"):
        int4.shapes((2, 3))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_values(scheme, dtype):
    """Forward and the gradient of x; linears with a bias; experts without a token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(10, 24, generator=generator).to(dtype).requires_grad_()
    for shape, counts in (((9, 24), None), ((4, 24, 6), (4, 0, 5, 1))):
        weight = Quantized(scheme, torch.Size(shape), torch.bfloat16)
        q, scale = SCHEMES[scheme].quantize(numbers(shape))
        weight.q.copy_(q), weight.scale.copy_(scale)
        values = weight.rows(0, shape[0]).to(dtype)
        bias = torch.randn(9, generator=generator)
        if counts is None:
            y, expected = ops.linear(x, weight, bias), ops.linear(x, values, bias)
        else:
            y, expected = (ops.expert_mm(x, w, torch.tensor(counts)) for w in (weight, values))
        close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, expected, **close)
        upstream = torch.randn(y.shape, generator=generator).to(dtype)
        ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, **close)
        assert not list(weight.parameters())
    with pytest.raises(ValueError, match="sum to 9"):
        ops.expert_mm(x, weight, torch.tensor((4, 0, 5, 0)))


def logits(model):
    batch = random_batch()
    with torch.no_grad():
        return model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)


def literal_model(model, scheme, patterns=(".moe.experts.", ".moe.shared.")):
    """The model whose targets are replaced by quantised values."""
    other = lively_model()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if any(pattern in name for pattern in patterns):
                p.copy_(SCHEMES[scheme].dequantize(*SCHEMES[scheme].quantize(p), torch.float32))
    return other.eval()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_written_and_read_back(tmp_path, scheme, capsys):
    """`puna quantize`: the same integers as on loading, half or a quarter of the bytes, hashes that are checked; plain
    numbers again on conversion."""
    model = lively_model().eval()
    save(model, None, tmp_path / "puna")
    assert main(["quantize", str(tmp_path / "puna"), str(tmp_path / "q"), "--to", scheme]) == 0
    assert f"{scheme}, 0.000 GB" in capsys.readouterr().out
    one, two = puna.load(tmp_path / "q")[0], puna.load(tmp_path / "puna", quantize=scheme)[0]
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, two.state_dict()[n]) for n, a in one.state_dict().items())
    record = json.loads((tmp_path / "q" / "run.json").read_text())
    assert record["quantized"]["scheme"] == scheme and record["hashes"].keys() == one.state_dict().keys()
    q = one.state_dict()["layers.1.moe.experts.w13.q"]
    assert q.numel() * (8 // SCHEMES[scheme].BITS) == CONFIG.n_experts * CONFIG.d_model * 2 * CONFIG.expert_width
    assert main(["convert", str(tmp_path / "q"), str(tmp_path / "plain"), "--to", "puna"]) == 0
    back, _ = puna.load(tmp_path / "plain")
    assert torch.equal(logits(back), logits(literal_model(model, scheme)))
    assert puna.load(tmp_path / "q", quantize=scheme)[0].state_dict().keys() == one.state_dict().keys()
    other = "int4" if scheme == "int8" else "int8"
    with pytest.raises(PunaError, match=f"stored as {scheme} already"):
        puna.load(tmp_path / "q", quantize=other)
    data = bytearray((tmp_path / "q" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "q" / "model.safetensors").write_bytes(data)
    with pytest.raises(PunaError, match="does not match its hash"):
        puna.load(tmp_path / "q")


def test_other_targets_and_wrong_ones(tmp_path, capsys):
    save(lively_model(), None, tmp_path / "puna")
    words = ("quantize", str(tmp_path / "puna"), str(tmp_path / "q"), "--to", "int4", "--targets")
    assert main([*words, "*atention*"]) == 1 and "no matrix of the model is called like" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main([*words, "*.attention.*,*.moe.experts.w2"]) == 0
    loaded, _ = puna.load(tmp_path / "q")
    names = {name for name, weight in plain(loaded).items() if isinstance(weight, Quantized)}
    assert names and all("attention" in name or name.endswith("experts.w2") for name in names)
    with pytest.raises(PunaError, match="no scheme 'int3'"):
        puna.load(tmp_path / "puna", quantize="int3")


def test_memory_of_a_quantised_model():
    """In bytes of what the model holds: 8 or 4 bits a number and 32 for each group's scale."""
    config = dataclasses.replace(CONFIG, d_model=256, expert_width=256, head_dim=32)
    sizes = {}
    for scheme in (None, "int8", "int4"):
        with torch.device("meta"):
            model = puna.Llama4(config).bfloat16()
            if scheme:
                attach(model, Quantization(scheme))
        parts = {n: t for n, t in model.state_dict().items() if ".moe.experts." in n or ".moe.shared." in n}
        sizes[scheme] = sum(t.numel() * t.element_size() for t in parts.values())
    assert sizes["int8"] / sizes[None] == (8 + 32 / 128) / 16 and sizes["int4"] / sizes[None] == (4 + 32 / 128) / 16
