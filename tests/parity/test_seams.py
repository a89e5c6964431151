"""The seams of the model: routes in and out, the dispatcher that expert parallelism replaces, ops."""

import torch
from parity_helpers import SHAPES, strong_model

from puna.model import ops
from puna.model.moe import LocalDispatcher, moe_layers, record_routes

MODEL = strong_model(SHAPES["scout"])
TOKENS = torch.randint(5, 50, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_recorded_routes_replay_and_others_change_the_output():
    with record_routes(MODEL) as routes:
        logits = MODEL(TOKENS)
    assert [tuple(route.shape) for route in routes] == [(2, 24)] * len(moe_layers(MODEL))
    assert torch.equal(MODEL(TOKENS, routes=routes), logits)
    assert torch.equal(MODEL(TOKENS, routes=[torch.full_like(route, -1) for route in routes]), logits)
    other = [route.clone() for route in routes]
    other[0][0, 3] = (other[0][0, 3] + 1) % MODEL.config.n_experts
    forced = MODEL(TOKENS, routes=other)
    for same, was in ((forced[0, :3], logits[0, :3]), (forced[1], logits[1])):  # other groups of rows, other rounding
        torch.testing.assert_close(same, was, rtol=0, atol=1e-4)
    assert (forced[0, 3] - logits[0, 3]).abs().max() > 1e-2


@torch.no_grad()
def test_a_layers_dispatcher_can_be_replaced():
    class Counting(LocalDispatcher):
        calls = 0

        def dispatch(self, *arguments):
            Counting.calls += 1
            return super().dispatch(*arguments)

    logits, layer = MODEL(TOKENS), moe_layers(MODEL)[0]
    kept, layer.dispatcher = layer.dispatcher, Counting()
    try:
        assert torch.equal(MODEL(TOKENS), logits) and Counting.calls == 1
    finally:
        layer.dispatcher = kept


@torch.no_grad()
def test_products_go_through_ops(monkeypatch):
    logits = MODEL(TOKENS)
    for name in ("linear", "expert_mm"):
        real = getattr(ops, name)
        with monkeypatch.context() as patch:
            patch.setattr(ops, name, lambda *a, real=real: real(*a) * 1.01)
            assert not torch.allclose(MODEL(TOKENS), logits)
