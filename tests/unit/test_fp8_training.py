"""FP8 training: every product against float64 arithmetic on the quantised numbers, the seam, and whole trainings."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_helpers import CONFIG, PATCH, changed, job, lively_model, random_batch, values

from puna.errors import PunaError
from puna.model import ops
from puna.model.lora import LoRAConfig
from puna.model.lora import attach as attach_lora
from puna.precision import fp8, fp8_training
from puna.precision.fp8_training import attach, detach
from puna.train import TrainConfig, train
from puna.train.loop import Stopped
from puna.train.step import train_step
from puna.train.terms import NextToken

SHAPE = dataclasses.replace(CONFIG, expert_width=32)  # w13 64 wide
OWN = ("rowwise", "tensorwise")
COUNTS = ([40, 0, 1, 15, 16, 17], [0, 0, 89, 0, 0, 0], [0, 1, 0, 0, 0, 88])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(rows, width, seed=0, groups=None):
    """Numbers in 28..448 times a power of two a row, 448 among them in every row (and every group of 16 rows a column):
    scales are powers of two, quantised products and their sums are whole numbers below 2^24, so nothing that comes
    after rounding to FP8 is rounded, whatever the order."""
    x = torch.randint(28, 449, (rows, width), generator=generator(seed)).float()
    x *= torch.randint(0, 2, x.shape, generator=generator(seed + 1)) * 2 - 1
    x[:, seed % width] = 448
    x[groups or slice(0, 1)] = 448
    return x


def emulated(a_MK, b_NK, recipe, a_type=fp8.E4M3):
    """a @ b^T in float64 from the values of the quantised numbers, scales by their definition."""
    def value(x, dtype):
        largest = x.double().abs().amax(-1, keepdim=True) if recipe == "rowwise" else x.double().abs().max()
        scale = (largest.clamp(min=1e-30) / torch.finfo(dtype).max).float()
        return (x.float() / scale).to(dtype).double() * scale.double()  # |x| / scale <= top: nothing to clamp

    return value(a_MK, a_type) @ value(b_NK, fp8.E4M3).t()


def near(found, expected, tolerance):
    found, expected = found.detach().double(), expected.detach().double()
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("shape", [(33, 64, 48), (16, 32, 16), (1, 64, 32)])
def test_mm_is_the_float64_product_of_the_quantised_numbers(recipe, shape):
    M, K, N = shape
    a, b = exact(M, K) * 2.0**-20, exact(N, K, 5) * 2.0**9
    expected = emulated(a, b, recipe)
    assert torch.equal(fp8_training.mm(a, b, recipe).double(), expected), "float32, bit for bit"
    bfloat = fp8_training.mm(a.bfloat16(), b.bfloat16(), recipe)
    assert torch.equal(bfloat, emulated(a.bfloat16(), b.bfloat16(), recipe).bfloat16()), "bfloat16, bit for bit"
    assert not torch.equal(expected, a.double() @ b.double().t()), "it is another product than without FP8"


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2])
@pytest.mark.parametrize("tokens", [48, 41, 9])  # summed along tokens: not always a multiple of 16
def test_mm_of_any_numbers(recipe, kind, tokens):
    """General scales: the float32 sum's own error (K 2^-24) and no more; FP8's own is 500 times that."""
    a, b = torch.randn(32, tokens, generator=generator(1)), torch.randn(16, tokens, generator=generator(2))
    a[3] *= 1000
    a[4] = 0
    y = fp8_training.mm(a, b, recipe, kind)
    near(y, emulated(a, b, recipe, kind), 1e-6)
    assert 0.01 < float((y - a @ b.t()).norm() / (a @ b.t()).norm()) < 0.15 and not y[4].any()


def test_an_outlier_spoils_its_row_or_the_matrix():
    a, b = torch.randn(32, 64, generator=generator(1)), torch.randn(16, 64, generator=generator(2))
    a[0, 0] = 1e6
    errors = {r: float((fp8_training.mm(a, b, r)[1:] - a[1:] @ b.t()).norm() / (a[1:] @ b.t()).norm()) for r in OWN}
    assert errors["rowwise"] < 0.06 and errors["tensorwise"] > 0.5


@pytest.mark.parametrize("recipe", OWN)
def test_what_is_not_finite_stays_so(recipe):
    """A step sees its loss and skips."""
    for bad in (float("nan"), float("inf")):
        x, w = torch.ones(16, 32), torch.ones(2, 32, 16)
        x[1, 2] = bad
        counts = torch.tensor([7, 9])
        assert not fp8_training.mm(x, w[0].t(), recipe)[1].isfinite().any()
        assert not fp8_training.grouped_mm(x, w.transpose(1, 2), counts, recipe)[1].isfinite().any()
        assert not fp8_training.grouped_outer(x, torch.ones(16, 16), counts, recipe)[0, 2].isfinite().any()


@pytest.mark.parametrize("counts", COUNTS)
def test_alignment(counts):
    """Against a loop: order kept, every expert on multiples of 16, none empty, all inside the room."""
    place_T, ends_E, expert_b = fp8_training.align(torch.tensor(counts), sum(counts))
    begin, places, owners = 0, [], []
    for e, n in enumerate(counts):
        places += range(begin, begin + n)
        begin += max(16, -(-n // 16) * 16)
        owners += [e] * (begin // 16 - len(owners))
        assert int(ends_E[e]) == begin
    assert place_T.tolist() == places and expert_b.tolist()[: len(owners)] == owners
    assert len(expert_b) * 16 >= begin and set(expert_b.tolist()[len(owners) :]) <= {len(counts)}


@pytest.mark.parametrize("recipe", OWN)
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_are_products_of_their_rows(recipe, counts):
    """Forward, both gradients, experts without a token among them; exact numbers, so bit for bit where row-wise."""
    T, E, D, N = sum(counts), len(counts), 32, 48
    x, dy = exact(T, D) * 2.0**-3, exact(T, N, 3) * 2.0**-12
    w = torch.stack([exact(D, N, 7 + e, groups=slice(e % D, e % D + 1)) for e in range(E)])
    x.requires_grad_(), w.requires_grad_()
    y = fp8_training.Float8(w, recipe).expert_mm(x, torch.tensor(counts))
    y.backward(dy)
    largest = {"x": x.abs().max(), "dy": dy.abs().max()}
    start, different = 0, 0
    for e, n in enumerate(counts):
        s, we = slice(start, start + n), w[e].detach()
        start += n
        if not n:
            assert not w.grad[e].any()
            continue
        xe, dye = x[s].detach(), dy[s]
        if recipe == "tensorwise":  # rows share the scale of all experts' rows
            xe, dye = torch.cat([xe, largest["x"].expand(1, D)]), torch.cat([dye, largest["dy"].expand(1, N)])
        expected = emulated(xe, we.t(), recipe)[:n], emulated(dye, we, recipe)[:n]
        if recipe == "rowwise":
            assert torch.equal(y[s].double(), expected[0]) and torch.equal(x.grad[s].double(), expected[1])
            near(w.grad[e], emulated(xe.t(), dye.t(), recipe), 1e-6)
        else:
            near(y[s], expected[0], 1e-6)
            near(x.grad[s], expected[1], 1e-6)
            qx, qdy = (fp8.quantize(v, None) for v in (x.detach(), dy))
            outer = (qx[0][s].double() * qx[1]).t() @ (qdy[0][s].double() * qdy[1])
            near(w.grad[e], outer, 1e-6)
        different += not torch.equal(y[s], xe[:n] @ we)
    assert different


def test_tensorwise_gradients_of_linears_are_e5m2():
    x = torch.randn(32, 64, generator=generator(), requires_grad=True)
    w = torch.randn(48, 64, generator=generator(1), requires_grad=True)
    dy = torch.randn(32, 48, generator=generator(2))
    for recipe, kind in (("tensorwise", fp8.E5M2), ("rowwise", fp8.E4M3)):
        x.grad = w.grad = None
        y = fp8_training.Float8(w, recipe).linear(x.view(4, 8, 64))
        assert y.shape == (4, 8, 48)
        y.backward(dy.view(4, 8, 48))
        near(y.flatten(0, 1), emulated(x.detach(), w.detach(), recipe), 1e-6)
        near(x.grad, emulated(dy, w.detach().t(), recipe, kind), 1e-6)
        near(w.grad, emulated(dy.t(), x.detach().t(), recipe, kind), 1e-6)


@pytest.mark.parametrize("recipe", OWN)
def test_no_token_at_all(recipe):
    """A process may get none (expert parallelism), a batch no picture."""
    x, w = torch.zeros(0, 32, requires_grad=True), torch.randn(3, 32, 16, requires_grad=True)
    y = fp8_training.Float8(w, recipe).expert_mm(x, torch.tensor([0, 0, 0]))
    y.sum().backward()
    assert y.shape == (0, 16) and not w.grad.any()
    w = torch.randn(16, 32, requires_grad=True)
    fp8_training.Float8(w, recipe).linear(torch.zeros(0, 32)).sum().backward()
    assert not w.grad.any()
    with pytest.raises(ValueError, match="sum to 2"):
        fp8_training.Float8(torch.randn(3, 32, 16), recipe).expert_mm(torch.zeros(5, 32), torch.tensor([1, 1, 0]))


def test_the_seam_changes_products_and_nothing_else():
    model = lively_model(config=SHAPE)
    names, before = [n for n, _ in model.named_parameters()], values(model)
    tokens = random_batch(pictures=False).tokens_BT
    plain = model(tokens)
    seen, linear = [], fp8_training.Float8.linear
    for recipe in OWN:
        attach(model, recipe)
        assert [n for n, _ in model.named_parameters()] == names and not changed(before, values(model))
        assert list(model.state_dict()) == names
        quantised = model(tokens)
        assert 1e-3 < float((quantised - plain).norm() / plain.norm()) < 0.3
        model.eval()
        assert torch.equal(model(tokens), plain), "an evaluation multiplies as without"
        model.train()
    fp8_training.Float8.linear = lambda self, x, bias=None: seen.append(self.parameter) or linear(self, x, bias)
    try:
        model(tokens)
    finally:
        fp8_training.Float8.linear = linear
    named = {id(p): n for n, p in model.named_parameters()}
    assert {named[id(p)].split(".", 2)[2] for p in seen} == {
        "attention.wqkv.weight", "attention.wo.weight", "feed_forward.w13.weight", "feed_forward.w2.weight",
        "moe.shared.w13.weight", "moe.shared.w2.weight",
    }  # fmt: skip
    assert isinstance(model.layers[1].moe.experts.w13, fp8_training.Float8)
    assert isinstance(model.layers[1].moe.router.weight, torch.nn.Parameter)
    model.load_state_dict(model.state_dict(), assign=True)
    attach(model, "off")
    assert torch.equal(model(tokens), plain) and isinstance(model.layers[1].moe.experts.w13, torch.nn.Parameter)
    detach(model)  # twice is once


def test_gradients_reach_everything_and_are_near():
    found = {}
    for recipe in ("off", *OWN):
        model = lively_model(config=SHAPE)
        before = values(model)
        attach(model, recipe)
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [random_batch()], NextToken(), 1e9, 1000)
        found[recipe] = {name: before[name] - value for name, value in values(model).items()}
    for recipe in OWN:
        for name, exact_gradient in found["off"].items():
            gradient = found[recipe][name]
            assert gradient.any() == exact_gradient.any(), name
        flat = {r: torch.cat([g.flatten() for g in found[r].values()]) for r in ("off", recipe)}
        cosine = torch.nn.functional.cosine_similarity(flat["off"], flat[recipe], dim=0)
        assert 0.95 < float(cosine) < 0.9999


def test_refusals():
    model = lively_model(config=SHAPE)
    with pytest.raises(PunaError, match="train.fp8 must be off, rowwise"):
        attach(model, "e4m3")
    with pytest.raises(PunaError, match="train.fp8 must be off, rowwise"):
        TrainConfig(fp8="fast")
    with pytest.raises(PunaError, match="multiples of 16: leave train.fp8 off"):
        attach(lively_model(), "rowwise")
    attach_lora(model, LoRAConfig(2))
    with pytest.raises(PunaError, match="has an adapter"):
        attach(model, "rowwise")
    with pytest.raises(PunaError, match="no FP8 on mps"):
        fp8_training._check_device("rowwise", torch.device("mps"), torch.bfloat16)


@pytest.mark.parametrize("capability, dtype, recipe, message", [
    ((8, 0), torch.bfloat16, "rowwise", "this GPU is 8.0"),
    ((9, 0), torch.float32, "tensorwise", "set train.compute_dtype bfloat16"),
    ((9, 0), torch.bfloat16, "rowwise", None),
    ((10, 0), torch.bfloat16, "tensorwise", None),
])  # fmt: skip
def test_gpus_that_can(monkeypatch, capability, dtype, recipe, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        fp8_training._check_device(recipe, torch.device("cuda"), dtype)
    else:
        with pytest.raises(PunaError, match=message):
            fp8_training._check_device(recipe, torch.device("cuda"), dtype)


def test_mxfp8_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    for name in [n for n in sys.modules if n.startswith("torchao.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PunaError, match=r"needs torchao .*puna\[fp8\]"):
        attach(lively_model(config=SHAPE), "mxfp8")


@pytest.mark.parametrize("counts", COUNTS)
def test_mxfp8_through_torchao(counts):
    """torchao's emulation: near the exact products, by MXFP8's own error and no more."""
    pytest.importorskip("torchao")
    T = sum(counts)
    x = torch.randn(T, 64, generator=generator(), requires_grad=True)
    w = torch.randn(len(counts), 64, 96, generator=generator(1), requires_grad=True)
    dy = torch.randn(T, 96, generator=generator(2))
    found = []
    for weight in (fp8_training.Float8(w, "mxfp8"), w):
        x.grad = w.grad = None
        y = ops.expert_mm(x, weight, torch.tensor(counts))
        y.backward(dy)
        found.append((y.detach(), x.grad, w.grad))
    for ours, plain in zip(*found, strict=True):
        assert 0.01 < float((ours - plain).norm() / plain.norm()) < 0.06
    y = ops.linear(x, fp8_training.Float8(w[0].t(), "mxfp8"))
    assert 0.01 < float((y - x @ w[0]).norm() / (x @ w[0]).norm()) < 0.06 and y.shape == (T, 96)


def pattern(seed):
    """Rows that repeat a few tokens: something to learn."""
    batch = random_batch(seed, pictures=False)
    period = torch.arange(batch.tokens_BT.shape[1] + 1) % 5
    start = torch.randint(PATCH + 1, 60, (len(batch.tokens_BT), 1), generator=generator(seed))
    rows = start + 3 * period
    return dataclasses.replace(batch, tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:] * batch.valid_BT)


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_training_goes_as_in_float32(tmp_path):
    """80 steps from ln 96 = 4.56 nats, more than two of them learnt: the mean of the last 20 losses is within 5 % of
    float32's fall (measured: 2 %), on another path."""
    found = {}
    for recipe in ("off", *OWN):
        settings = dict(steps=80, accumulate=1, checkpoint_every=80, eval_every=80, fp8=recipe)
        model = train(job(tmp_path / recipe, config=SHAPE, source=pattern, **settings))
        assert not any(type(m).__name__.startswith("Float8") for m in model.modules())
        found[recipe] = losses(tmp_path / recipe)
    last = {recipe: sum(curve[-20:]) / 20 for recipe, curve in found.items()}
    fall = found["off"][0] - last["off"]
    print({recipe: round(value, 3) for recipe, value in last.items()})
    assert fall > 2
    for recipe in OWN:
        assert abs(last[recipe] - last["off"]) < 0.05 * fall and found[recipe] != found["off"]


def test_stopped_and_gone_on_is_bitwise_the_same(tmp_path):
    whole = values(train(job(tmp_path / "a", config=SHAPE, fp8="rowwise")))

    def stopping(step):
        if step == 4 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return random_batch(step)

    with pytest.raises(Stopped):
        train(job(tmp_path / "b", config=SHAPE, fp8="rowwise", source=stopping))
    resumed = values(train(job(tmp_path / "b", config=SHAPE, fp8="rowwise", source=stopping)))
    assert not changed(whole, resumed)
    assert changed(whole, values(train(job(tmp_path / "c", config=SHAPE))))


def test_killed_and_gone_on_is_bitwise_the_same(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from test_fp8_training import SHAPE; from training_helpers import job, random_batch\n"
        "from puna.train import train\n"
        "def source(step):\n    if step == 5: os._exit(9)\n    return random_batch(step)\n"
        "train(job(Path(sys.argv[1]), config=SHAPE, fp8='tensorwise', source=source))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "b"), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == 9
    resumed = values(train(job(tmp_path / "b", config=SHAPE, fp8="tensorwise")))
    assert not changed(values(train(job(tmp_path / "a", config=SHAPE, fp8="tensorwise"))), resumed)
