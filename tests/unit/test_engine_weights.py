"""What RL needs of the engine: routes of the chosen tokens, new weights under running answers, versions."""

import copy
import threading

import pytest
import test_engine
import torch
from test_engine import PROMPTS

from puna.engine import Engine, EngineThread, Sampling
from puna.errors import PunaError
from puna.model.moe import record_routes

model, engine = test_engine.model, test_engine.engine


@pytest.fixture
def other(model):
    """Another model of the same shape."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        source = torch.Generator().manual_seed(2)
        for name, parameter in other.named_parameters():
            if "norm" not in name:
                parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=source))
    return other


@pytest.mark.parametrize("how", [{}, {"speculate": 3}, {"max_batch": 2, "prefill_tokens": 7}], ids=str)
def test_routes_are_those_of_a_whole_forward_pass(model, tiny_processor, how):
    engine = Engine(model, tiny_processor, **how)
    ids = [engine.add_request(p, Sampling(max_tokens=25, return_routes=i != 1)) for i, p in enumerate(PROMPTS)]
    done = test_engine.drain(engine)
    assert done[ids[1]].routes is None
    for i, (id, messages) in enumerate(zip(ids, PROMPTS, strict=True)):
        if i == 1:
            continue
        encoded = tiny_processor.encode_chat(messages, generation_prompt=True)
        tokens, n = torch.tensor([[*encoded.tokens.tolist(), *done[id].tokens[:-1]]]), len(done[id].tokens)
        with torch.no_grad(), record_routes(model) as routes:
            model.hidden(tokens, tiles=tiny_processor.tiles(encoded.pictures))
        expected = torch.stack([ids_BT[0] for ids_BT in routes], -1)[-n:]
        got = torch.from_numpy(done[id].routes)
        assert got.dtype == torch.int16 and got.shape == (n, len(routes), 1)
        assert (got[..., 0] != expected).float().mean() <= 0.001 and len(got.unique()) > 1
    assert all(layer.record is None for layer in model.modules() if hasattr(layer, "record"))


def test_replayed_routes_give_the_answers_log_probabilities(model, tiny_processor):
    """What a trainer does with them: the forward pass with these experts has the engine's log-probabilities."""
    engine = Engine(model, tiny_processor)
    id = engine.add_request(PROMPTS[1], Sampling(max_tokens=20, temperature=1.0, seed=1, return_routes=True))
    done = test_engine.drain(engine)[id]
    prompt = engine.prepare(PROMPTS[1]).tokens
    tokens = torch.tensor([[*prompt.tolist(), *done.tokens]])
    routes = torch.full((done.routes.shape[1], 1, tokens.shape[1]), -1)
    routes[:, 0, len(prompt) - 1 : -1] = torch.from_numpy(done.routes[..., 0]).long().T
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens, routes=list(routes)), -1)[0, len(prompt) - 1 : -1]
    mine = logprobs.gather(-1, torch.tensor(done.tokens)[:, None])[:, 0]
    torch.testing.assert_close(mine, torch.tensor(done.logprobs), atol=5e-5, rtol=0)
    routes[:, 0, len(prompt)] = (routes[:, 0, len(prompt)] + 1) % model.config.n_experts
    with torch.no_grad():
        wrong = torch.log_softmax(model(tokens, routes=list(routes)), -1)[0, len(prompt) - 1 : -1]
    assert (wrong - logprobs).abs().max() > 1e-3, "other experts, other numbers"


def test_new_weights_under_running_answers(engine, other):
    """Earlier tokens are the old model's, later ones the new model's over old keys; who comes then sees the new one."""
    model, old = engine.model, copy.deepcopy(engine.model.state_dict())
    before = engine.generate(PROMPTS[:2], max_tokens=20)
    after = Engine(other, engine.processor).generate(PROMPTS[:2], max_tokens=20)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    try:
        ids = [engine.add_request(p, Sampling(max_tokens=20)) for p in PROMPTS[:2]]
        while any(len(engine._requests[id].tokens) < 6 for id in ids):
            engine.step()
        counts = [len(engine._requests[id].tokens) for id in ids]
        assert engine.version == 0 and engine.replace_weights(other.state_dict(), version=7) == 7
        done = test_engine.drain(engine)
        for id, n, was, new in zip(ids, counts, before, after, strict=True):
            answer = done[id]
            assert answer.versions == [0] * n + [7] * (len(answer.tokens) - n) and answer.version == (0, 7)
            assert answer.tokens[:n] == was.tokens[:n] and answer.tokens != was.tokens != new.tokens
        fresh = engine.generate(PROMPTS[:2], max_tokens=20)
        assert [d.tokens for d in fresh] == [d.tokens for d in after] and fresh[0].version == (7, 7)
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
        assert engine.replace_weights(iter(old.items())) == 8
        assert [d.tokens for d in engine.generate(PROMPTS[:2], max_tokens=20)] == [d.tokens for d in before]
    finally:
        model.load_state_dict(old)


def test_keys_computed_anew(model, tiny_processor, other):
    """With `recompute` the rest of an answer is what the new weights say to its text so far; nothing old is shared."""
    old = copy.deepcopy(model.state_dict())
    engine = Engine(model, tiny_processor, max_batch=2, prefill_tokens=16)
    try:
        ids = [engine.add_request(p, Sampling(max_tokens=20, return_routes=True)) for p in (PROMPTS[2], PROMPTS[4])]
        while any(len(engine._requests[id].tokens) < 6 for id in ids):
            engine.step()
        said = [list(engine._requests[id].tokens) for id in ids]
        engine.replace_weights(other.state_dict(), recompute=True)
        done = test_engine.drain(engine)
        for id, messages, tokens in zip(ids, (PROMPTS[2], PROMPTS[4]), said, strict=True):
            encoded = tiny_processor.encode_chat(messages, generation_prompt=True)
            ids_1T = torch.tensor([[*encoded.tokens.tolist(), *done[id].tokens]])
            with torch.no_grad():
                logits = other(ids_1T, tiles=tiny_processor.tiles(encoded.pictures))[0, len(encoded.tokens) - 1 : -1]
            new = torch.log_softmax(logits, -1).gather(-1, torch.tensor(done[id].tokens)[:, None])[:, 0]
            got, n = torch.tensor(done[id].logprobs), len(tokens)
            torch.testing.assert_close(got[n:], new[n:], atol=5e-5, rtol=0)
            assert done[id].tokens[:n] == tokens and (got[:n] - new[:n]).abs().max() > 1e-3
            assert done[id].versions == [0] * n + [1] * (20 - n) and len(done[id].routes) == 20
        fresh = engine.generate([PROMPTS[4]], max_tokens=9)[0]
        assert fresh.tokens == Engine(other, tiny_processor).generate([PROMPTS[4]], max_tokens=9)[0].tokens
    finally:
        model.load_state_dict(old)


def test_routes_and_equal_bits_exclude_each_other(model, tiny_processor):
    with pytest.raises(PunaError, match="^return_routes: .*batch_invariant"):
        Engine(model, tiny_processor, batch_invariant=True).add_request([1], Sampling(return_routes=True))


def test_wrong_weights_change_nothing(engine, other):
    old = copy.deepcopy(engine.model.state_dict())
    good = other.state_dict()
    name = "layers.0.attention.wo.weight"
    for wrong, says in (
        ({k: v for k, v in good.items() if k != name}, f"lack {name} "),
        ({**good, "layers.9.extra": good[name]}, "unknown layers.9.extra "),
        ({**good, name: good[name][:-1]}, f"{name}: .*same model"),
        ({**good, name: good[name].to(torch.int8)}, f"{name}: .*quantised alike"),
    ):
        for form in (wrong, iter(list(wrong.items())[::-1])):
            with pytest.raises(PunaError, match=says):
                engine.replace_weights(form)
    with pytest.raises(PunaError, match="^version: "):
        engine.replace_weights(good, version="new")
    assert engine.version == 0
    assert all(torch.equal(tensor, old[key]) for key, tensor in engine.model.state_dict().items())


def test_another_type_of_numbers_is_converted(model, other):
    small = copy.deepcopy(model).bfloat16()
    Engine(small).replace_weights(other.state_dict())
    for key, tensor in small.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, other.state_dict()[key].bfloat16())


def test_through_the_thread(engine, other):
    """From any thread, between two steps; a refusal is the caller's alone."""
    old = copy.deepcopy(engine.model.state_dict())
    try:
        with EngineThread(engine) as served:
            handle = served.submit(PROMPTS[1], Sampling(max_tokens=100))
            events = iter(handle)
            next(events)
            here = served.call(lambda engine: threading.current_thread().name)
            assert here == "puna-engine"
            with pytest.raises(PunaError, match="lack"):
                served.call(lambda engine: engine.replace_weights({}))
            assert served.call(lambda engine: engine.replace_weights(other.state_dict())) == 1
            *_, last = events
            assert last.completion.version == (0, 1) and last.completion.error is None
        with pytest.raises(PunaError, match="stopped"):
            served.call(lambda engine: 1)
    finally:
        engine.model.load_state_dict(old)
