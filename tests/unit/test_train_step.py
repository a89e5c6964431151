"""One optimizer step: what it divides by, how it is cut in parts, what it clips, and what it refuses to do."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from training_helpers import CONFIG, changed, lively_model, random_batch, values

from puna.model import Llama4
from puna.model.moe import moe_layers
from puna.optim import build_adamw
from puna.train.balance import router_metrics
from puna.train.step import accumulate_gradients, clip_gradients, train_step
from puna.train.terms import NextToken, cross_entropy

NO_CLIP = 1e9
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}  # ||a - b|| / ||b|| of the whole gradient


def gradient(batches, dtype=torch.float64, clip=NO_CLIP, slice_size=16, term=None):
    """(gradient by name, StepResult) of one step of plain gradient descent with learning rate 1."""
    model = lively_model(dtype=dtype)
    before = values(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [b if b.tiles is None else dataclasses.replace(b, tiles=b.tiles.to(dtype)) for b in batches]
    result = train_step(model, optimizer, batches, term or NextToken(), clip, slice_size)
    return {name: before[name] - value for name, value in values(model).items()}, result


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def distance(a, b):
    """||a - b|| / ||b|| over all parameters."""
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def uneven():
    """Four rows of which the first two learn from nearly every token, the third from few, the last from none."""
    batch = random_batch(valid=0.9)
    batch.valid_BT[2] &= torch.arange(24) % 5 == 0
    batch.valid_BT[3] = False
    return batch


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cross_entropy_is_torchs_and_is_differentiated_once(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 11, generator=generator)).to(dtype)
    targets = torch.randint(0, 11, (7,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = cross_entropy(ours, targets), F.cross_entropy(theirs, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (loss / 3).backward(retain_graph=True)
    (expected / 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(RuntimeError, match="taken before"):
        loss.backward()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_accumulation_is_one_big_batch(dtype):
    batch = uneven()
    whole, one = gradient([batch], dtype)
    assert flat(whole).norm() > 0.1 and all(g.abs().max() > 0 for g in whole.values()), "a parameter has no gradient"
    for parts in (2, 4):
        cut = batch.split(parts)
        assert len({int(b.valid_BT.sum()) for b in cut}) > 1
        other, result = gradient(cut, dtype)
        assert distance(other, whole) < TOLERANCE[dtype], parts
        assert result.loss == pytest.approx(one.loss, rel=1e-6)
        assert (result.tokens, result.valid) == (one.tokens, one.valid) == (84, int(batch.valid_BT.sum()))
        assert result.metrics["accuracy"] == one.metrics["accuracy"]


def test_the_loss_is_divided_by_the_valid_tokens_of_the_whole_step():
    """Against a loss written down plainly; dividing each micro-batch by its own count would give another gradient."""
    batch = uneven()

    def plain(mean):
        model = lively_model(dtype=torch.float64)
        sums, counts = [], []
        for part in batch.split(2):
            tiles = None if part.tiles is None else part.tiles.double()
            logits = model(part.tokens_BT, tiles, part.doc_ids_BT)
            loss = F.cross_entropy(logits.flatten(0, 1), part.targets_BT.flatten(), reduction="none")
            sums.append(loss[part.valid_BT.flatten()].sum())
            counts.append(int(part.valid_BT.sum()))
        loss = mean(sums, counts)
        loss.backward()
        return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}

    got, result = gradient(batch.split(2))
    loss, right = plain(lambda sums, counts: sum(sums) / sum(counts))
    assert result.loss == pytest.approx(loss, rel=1e-12) and distance(got, right) < 1e-13
    _, wrong = plain(lambda sums, counts: sum(s / n for s, n in zip(sums, counts, strict=True)) / len(sums))
    assert distance(wrong, right) > 0.1


def test_what_is_not_valid_teaches_nothing():
    """Targets of tokens that do not count, and padding's tokens, change neither loss nor gradient."""
    batch, other = random_batch(), random_batch()
    other.targets_BT[~other.valid_BT] = 50
    other.tokens_BT[other.doc_ids_BT < 0] = 51
    (one, a), (two, b) = gradient([batch]), gradient([other])
    assert a.loss == pytest.approx(b.loss, rel=1e-13) and distance(two, one) < 1e-13
    other.targets_BT[other.valid_BT] = 50
    assert distance(gradient([other])[0], one) > 0.1


def test_slices_of_the_loss_change_nothing():
    rows = []

    class Watched(NextToken):
        def __call__(self, hidden_nD, head, batch):
            rows.append(len(hidden_nD))
            return super().__call__(hidden_nD, head, batch)

    batch = random_batch()
    n = int(batch.valid_BT.sum())
    whole, one = gradient([batch], slice_size=10_000, term=Watched())
    assert rows == [n]
    for size in (1, 7, n - 1, n):
        rows.clear()
        other, result = gradient([batch], slice_size=size, term=Watched())
        assert max(rows) == min(size, n) and sum(rows) == n
        assert distance(other, whole) < 1e-13 and result.loss == pytest.approx(one.loss, rel=1e-12)


def test_clipping_scales_the_whole_gradient_and_reports_its_norm_before():
    batch = random_batch()
    free, one = gradient([batch])
    norm = float(flat(free).norm())
    assert one.grad_norm == pytest.approx(norm, rel=1e-9)
    clipped, two = gradient([batch], clip=norm / 10)
    assert two.grad_norm == pytest.approx(norm, rel=1e-9)
    assert float(flat(clipped).norm()) == pytest.approx(norm / 10, rel=1e-5)
    assert distance({n: 10 * g for n, g in clipped.items()}, free) < 1e-5  # the direction stays
    assert distance(gradient([batch], clip=2 * norm)[0], free) == 0


class Broken(NextToken):
    """The loss and its gradient become what they are multiplied by."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, hidden_nD, head, batch):
        loss, sums = super().__call__(hidden_nD, head, batch)
        return loss * self.factor, sums


def broken_gradient(model):
    """A finite loss whose gradient overflows in one parameter."""
    return model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("how", ["nan", "inf", "gradient", "nothing to learn"])
def test_a_step_that_is_not_finite_changes_nothing(how):
    model = lively_model()
    optimizer = build_adamw(model, 1e-2, 0.1, (0.9, 0.99), 1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    first = train_step(model, optimizer, random_batch().split(2), NextToken(), 1.0, 16)
    assert not first.skipped
    before = values(model)
    moments = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    assert len(moments) == len(before) and any(state["exp_avg"].any() for state in moments.values())

    batch, term, hook = random_batch(1), NextToken(), None
    if how == "gradient":
        hook = broken_gradient(model)
    elif how == "nothing to learn":
        batch.valid_BT[:] = False
    else:
        term = Broken(float(how))
    result = train_step(model, optimizer, batch.split(2), term, 1.0, 16)
    assert result.skipped
    assert torch.isfinite(torch.tensor(result.loss)) == (how not in ("nan", "inf"))
    assert not changed(before, values(model))
    assert all(torch.equal(optimizer.state[p][k], v) for p, state in moments.items() for k, v in state.items())
    assert all(p.grad is None for p in model.parameters()), "a broken gradient would leak into the next step"

    if hook:
        hook.remove()
    result = train_step(model, optimizer, random_batch(1).split(2), NextToken(), 1.0, 16)
    assert not result.skipped and changed(before, values(model)) == before.keys()
    assert all(p in moments and not torch.equal(optimizer.state[p]["exp_avg"], moments[p]["exp_avg"]) for p in moments)


def test_router_metrics_by_hand():
    counts = [torch.tensor([4, 0, 0, 0]), torch.tensor([1, 2, 1, 0])]
    got = router_metrics(counts, torch.tensor(2))
    entropy = 0.75  # of shares 1/4, 1/2, 1/4: 1.5 bits of the 2 that four experts can have
    assert got == {
        "router/max_load": (4 + 2) / 2, "router/dead": 4 / 8, "router/flip_share": 2 / 8,
        "router/entropy": pytest.approx(entropy / 2),
        "router/layers": {"max_load": [4.0, 2.0], "entropy": [0.0, entropy], "dead": [0.75, 0.25]},
    }  # fmt: skip
    even = router_metrics([torch.tensor([5, 5])], torch.tensor(0))
    assert even == {
        "router/max_load": 1.0, "router/entropy": pytest.approx(1.0), "router/dead": 0.0, "router/flip_share": 0.0,
        "router/layers": {"max_load": [1.0], "entropy": [1.0], "dead": [0.0]},
    }  # fmt: skip
    assert router_metrics([], torch.tensor(0)) == {}
    assert router_metrics([torch.zeros(4, dtype=torch.int64)], torch.tensor(0)) == {}, "no token was routed"


def test_gradient_norms_by_part_add_up_and_clipping_is_torchs():
    model, twin = lively_model(), lively_model()
    for each in (model, twin):
        accumulate_gradients(each, random_batch(), NextToken(), 40, 16)
    norm, parts = clip_gradients(model, 0.3)
    theirs = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
    assert torch.equal(norm, theirs) and float(norm) > 0.3
    assert not changed(
        {n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()}
    )
    assert sum(value**2 for value in parts.values()) == pytest.approx(float(norm) ** 2, rel=1e-5)
    assert set(parts) == {"adapter", "attention", "dense", "embedding", "experts", "head", "norms", "router", "vision"}
    assert all(value > 0 for value in parts.values())


def test_each_part_is_the_norm_of_its_own_gradients():
    model = lively_model()
    accumulate_gradients(model, random_batch(), NextToken(), 40, 16)
    holds = {"attention": "layers.0.attention.wqkv.weight", "experts": "layers.1.moe.experts.w13",
             "head": "output.weight", "router": "layers.1.moe.router.weight", "norms": "norm.weight",
             "dense": "layers.1.moe.shared.w2.weight",
             "embedding": "tok_embeddings.weight", "vision": "vision.layers.0.attention.wq.weight",
             "adapter": "vision.projector.weight"}  # fmt: skip
    for part, name in holds.items():
        alone = dict(model.named_parameters())[name].grad.clone()
        for parameter in model.parameters():
            parameter.grad = None
        dict(model.named_parameters())[name].grad = alone
        norm, parts = clip_gradients(model, 1e9)
        assert parts == {part: pytest.approx(float(norm))}
        accumulate_gradients(model, random_batch(), NextToken(), 40, 16)
    for parameter in model.parameters():
        parameter.grad = None
    assert clip_gradients(model, 1.0) == (torch.zeros(()), {})


def test_a_step_measures_the_routes_of_all_its_micro_batches():
    model, batch = lively_model(), random_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    layers = moe_layers(model)
    assert len(layers) == 2
    total = torch.zeros(2, 4)
    for part in batch.split(2):
        train_step(model, optimizer, [part], NextToken(), 1.0, 16)
        total += torch.stack([layer.counts_E for layer in layers])
    assert (total.sum(1) == batch.tokens_BT.numel()).all()
    both = train_step(model, optimizer, batch.split(2), NextToken(), 1.0, 16).metrics
    assert both["router/max_load"] == pytest.approx(float((total.max(1).values * 4 / total.sum(1)).mean()))
    assert both["router/flip_share"] == 0

    layers[1].selection_bias_E = torch.tensor([0.0, 0.0, 0.0, 1e4])  # everything to expert 3
    biased = train_step(model, optimizer, batch.split(2), NextToken(), 1.0, 16).metrics
    loads = (float(total[0].max() * 4 / total[0].sum()), 4.0)
    assert biased["router/max_load"] == pytest.approx(sum(loads) / 2)
    assert biased["router/dead"] == pytest.approx(both["router/dead"] + 3 / 8)
    moved = float(total[1, :3].sum() / total.sum())  # of the routes of both layers
    assert moved > 0.2 and biased["router/flip_share"] == pytest.approx(moved)


def test_a_model_without_experts_has_no_router_metrics():
    config = dataclasses.replace(CONFIG, moe_layers=())
    model = Llama4(config)
    result = train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [random_batch()], NextToken(), 1.0, 16)
    assert not result.skipped and {name for name in result.metrics if not name.startswith("grad/")} == {"accuracy"}


def test_the_balancer_sees_the_loads_of_all_micro_batches():
    batch = random_batch()
    parts = batch.split(4)
    model = lively_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = train_step(model, optimizer, [batch], NextToken(), NO_CLIP, 16).counts
    cut = train_step(model, optimizer, parts, NextToken(), NO_CLIP, 16).counts
    assert len(whole) == len(moe_layers(model)) and all(int(c.sum()) == batch.tokens_BT.numel() for c in whole)
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    last = [layer.counts_E for layer in moe_layers(model)]
    assert any(not torch.equal(a, b) for a, b in zip(cut, last, strict=True)), "the last part alone says something else"


@pytest.mark.parametrize("limit", [1e9, 1.0, 1e-3])
def test_clipping_is_torchs_bit_for_bit(limit):
    """Also where there is nothing to clip and the gradients are left alone."""
    found = []
    for ours in (True, False):
        model = torch.nn.Linear(5, 3)
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        norm = clip_gradients(model, limit)[0] if ours else torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        found.append([norm, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
