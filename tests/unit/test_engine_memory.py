"""The engine's memory: preemption, the prefix cache, equal bits whatever else runs, long prompts."""

# ruff: noqa: F811

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PROMPTS, C, drain, engine, model, picture, user  # noqa: F401

from puna.engine import Engine, EngineThread, Sampling, bytes_all_layers
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig

# ---- memory: preemption, the prefix cache


LONG = user("The quick brown fox jumps over the lazy dog, and the cat looks at " + "the red apple and the house " * 3)


def test_preempted_answers_are_what_they_would_have_been(engine, model, tiny_processor):
    """Memory for about half of what six answers need: the youngest wait and go on, text, seeds and all."""
    options = dict(max_tokens=60, temperature=1.0, seed=[1, 2, 3, 4, 5, 6])
    expected = engine.generate(PROMPTS, **options)
    page = engine.stats()["cache_bytes_used"] // (engine.pages.total - engine.pages.free)
    tight = Engine(model, tiny_processor, max_batch=6, cache_bytes=12 * page, prefix_cache_bytes=0)
    got = tight.generate(PROMPTS, **options)
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    assert [c.text for c in got] == [c.text for c in expected]
    assert tight.stats()["preemptions"] > 0 and tight.stats()["cache_bytes_used"] == 0
    assert tight.cache.nbytes <= 12 * page + 6 * C * 3 * page // C and engine.stats()["preemptions"] == 0


def test_what_never_fits_is_refused(engine, model, tiny_processor):
    page = 2 * 2 * 8 * 4 * C
    tight = Engine(model, tiny_processor, cache_bytes=2 * page)
    with pytest.raises(PunaError, match=r"do not fit in the 64 tokens that cache_bytes has room for.*cache_bytes"):
        tight.add_request([1] * 30, Sampling(max_tokens=35))
    with pytest.raises(PunaError, match="cache_bytes"):
        tight.add_request([1] * 64, Sampling(max_tokens=None))
    assert not tight.busy
    assert len(tight.generate([[1] * 30], max_tokens=34)[0].tokens) == 34
    stats = tight.stats()
    assert (stats["tokens_prefilled"], stats["tokens_generated"], stats["version"]) == (30, 34, 0)
    assert set(stats) >= {"waiting", "active", "cache_bytes", "cache_bytes_used", "prefix_hits", "prefix_tokens",
                          "preemptions"}  # fmt: skip
    assert len(tight.generate([[1] * 30], max_tokens=None)[0].tokens) == 34, "as far as the memory goes"
    with pytest.raises(PunaError, match=f"cache_bytes: must be an integer of at least {page}"):
        Engine(model, tiny_processor, cache_bytes=page - 1)
    with EngineThread(tight) as served, pytest.raises(PunaError, match="cache_bytes"):
        served.submit([1] * 30, Sampling(max_tokens=35))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_nothing_leaks_whatever_happens(model, data):
    """Requests, steps and aborts in any order, with memory for some of them: at the end all rows and pages are free."""
    page = 2 * 2 * 8 * 4 * C
    engine = Engine(model, max_batch=3, prefill_tokens=20, cache_bytes=5 * page, prefix_cache_bytes=2 * page)
    begin = [5, 6, 7, 8] * C
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "step", "step", "abort"]))
        if action == "add":
            prompt = begin[: data.draw(st.integers(1, 100))] + [data.draw(st.integers(1, 3))]
            engine.add_request(prompt, Sampling(max_tokens=data.draw(st.integers(1, 50))))
        elif action == "abort" and engine._requests:
            engine.abort(data.draw(st.sampled_from(sorted(engine._requests))))
        else:
            engine.step()
        held = {page for request in engine.scheduler.active for page in request.pages}
        held |= {page for pages in engine.prefix.entries.values() for page in pages}
        assert len(held) == engine.pages.total - engine.pages.free
    if data.draw(st.booleans()):
        engine.abort_all()
    done = drain(engine)
    assert all(completion.finish_reason in ("stop", "length", "abort") for completion in done.values())
    assert not len(engine.scheduler) and engine.pages.free == engine.pages.total - engine.prefix.held
    engine.prefix.clear()
    assert engine.pages.free == engine.pages.total and engine.pages.owners == []


def test_the_next_turn_finds_the_last_one(engine, tiny_processor):
    """A conversation goes on behind what is known of it, the answer included; its answers stay what they were."""
    first = engine.generate([LONG], max_tokens=60)[0]
    turns = [*engine.prepare(LONG).tokens, *first.tokens, *engine.prepare(user("And now?")).tokens[1:]]
    fresh = Engine(engine.model, tiny_processor).generate([turns], max_tokens=20)[0]
    again = engine.generate([turns], max_tokens=20)[0]
    assert first.cached_tokens == fresh.cached_tokens == 0
    assert again.cached_tokens == (first.prompt_tokens + 59) // C * C > first.prompt_tokens, "the answer's chunks too"
    assert again.tokens == fresh.tokens
    torch.testing.assert_close(torch.tensor(again.logprobs), torch.tensor(fresh.logprobs), atol=5e-5, rtol=0)


def test_pictures_are_part_of_the_key(engine):
    """The same words about another picture find nothing behind the picture; about the same one they do."""
    ask = "What do you see in it? " * 6
    engine.generate([user(ask, picture(1))], max_tokens=1)
    other, same = (engine.generate([user(ask, picture(n))], max_tokens=12)[0] for n in (4, 1))
    fresh = [Engine(engine.model, engine.processor) for _ in range(2)]
    alone = [e.generate([user(ask, picture(n))], max_tokens=12)[0] for e, n in zip(fresh, (4, 1), strict=True)]
    assert other.cached_tokens == 0 and same.cached_tokens >= 2 * C
    assert [other.tokens, same.tokens] == [c.tokens for c in alone] and other.logprobs != same.logprobs


def test_pictures_behind_what_is_known_are_encoded_and_no_others(engine, monkeypatch):
    """A second picture after a known first one: one tile goes through the tower; the answer is the whole prompt's."""
    known = user("Look. " * 16, picture(1))
    more = [*known, {"role": "assistant", "content": "x" * C}, *user("And this?", picture(2))]
    expected = Engine(engine.model, engine.processor).generate([more], max_tokens=12)[0]
    engine.generate([known], max_tokens=1)
    seen, encode = [], engine.model.image_features
    monkeypatch.setattr(engine.model, "image_features", lambda tiles: (seen.append(len(tiles)), encode(tiles))[1])
    got = engine.generate([more], max_tokens=12)[0]
    assert got.cached_tokens > 0 and got.tokens == expected.tokens and seen == [1]


def test_a_salt_shares_nothing(engine):
    for salt, cached in (("alice", False), ("bob", False), (None, False), ("alice", True)):
        events = []
        engine.add_request(LONG, Sampling(max_tokens=1), sink=events.append, salt=salt)
        drain(engine)
        assert bool(events[-1].completion.cached_tokens) == cached, salt
    ready = engine.prepare(LONG, "carol")
    assert engine.prepare(ready) is ready and engine.prepare(ready, "dora").salt == b"dora" != ready.salt == b"carol"


def test_n_answers_cost_one_prompt(engine):
    """Four at once: one computes the chunks, the others take them; each draws its own tokens."""
    got = engine.generate([LONG] * 4, max_tokens=20, temperature=1.5, seed=[1, 2, 3, 4])
    chunks = (got[0].prompt_tokens - 1) // C * C
    assert [c.cached_tokens for c in got] == [0] + [chunks] * 3
    assert engine.stats()["tokens_prefilled"] == got[0].prompt_tokens + 3 * (got[0].prompt_tokens - chunks)
    alone = [Engine(engine.model, engine.processor).generate([LONG], max_tokens=20, temperature=1.5, seed=n)[0].tokens
             for n in (1, 2, 3, 4)]  # fmt: skip
    assert [c.tokens for c in got] == alone and len({tuple(tokens) for tokens in alone}) == 4


def test_new_weights_forget_what_was_known(engine):
    """Written to in place, between requests or in the middle of one: nothing of the old ones is found."""
    old = engine.generate([LONG], max_tokens=8)[0]
    assert engine.generate([LONG], max_tokens=8)[0].cached_tokens > 0
    weight, version = engine.model.layers[0].attention.wo.weight, engine.version
    try:
        with torch.no_grad():
            weight.mul_(-1)
        new = engine.generate([LONG], max_tokens=8)[0]
        assert new.cached_tokens == 0 and new.logprobs != old.logprobs and engine.version == version + 1
        fresh = Engine(engine.model, engine.processor).generate([LONG], max_tokens=8)[0]
        assert new.tokens == fresh.tokens
        engine.prefix.clear()
        id = engine.add_request(LONG, Sampling(max_tokens=2 * C))
        while not engine.scheduler.decoding:
            engine.step()
    finally:
        with torch.no_grad():
            weight.mul_(-1)
    assert len(drain(engine)[id].tokens) > C and not engine.prefix.entries, "half old, half new: for nobody else"
    assert engine.generate([LONG], max_tokens=8)[0].tokens == old.tokens


# ---- the same bits


def bits(completions):
    return [(c.tokens, c.logprobs) for c in completions]


def test_batch_invariant(model, tiny_processor):
    """Alone, together, in other slices, from the prefix cache, after preemptions: the same bits."""
    options = dict(max_tokens=30, temperature=0.8, seed=7)

    def make(**more):
        return Engine(model, tiny_processor, batch_invariant=True, **{"prefix_cache_bytes": 0, **more})

    alone = [bits(make().generate([prompt], **options))[0] for prompt in PROMPTS]
    assert bits(make().generate(PROMPTS, **options)) == alone
    assert bits(make(max_batch=3, prefill_tokens=7).generate(PROMPTS[::-1], **options)) == alone[::-1]
    caching = make(prefix_cache_bytes=2**20)
    assert bits(caching.generate(PROMPTS, **options)) == alone
    again = caching.generate(PROMPTS, **options)
    assert bits(again) == alone and sum(c.cached_tokens for c in again) > 0
    page = 2 * 2 * 8 * 4 * C
    tight = make(cache_bytes=10 * page)
    assert bits(tight.generate(PROMPTS, **options)) == alone and tight.stats()["preemptions"] > 0
    plain = Engine(model, tiny_processor)
    for (tokens, logprobs), completion in zip(alone, plain.generate(PROMPTS, **options), strict=True):
        assert completion.tokens == tokens
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(logprobs), atol=5e-5, rtol=0)


def test_batch_invariance_is_not_promised_where_rows_differ(model, tiny_processor, monkeypatch):
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: head(h) * (1 + 1e-6 * torch.arange(len(h))[:, None]))
    with pytest.raises(PunaError, match="^batch_invariant"):
        Engine(model, tiny_processor, batch_invariant=True)


def test_same_seeds_and_batch_same_bits(engine):
    options = dict(max_tokens=30, temperature=1.0, seed=[1, 2, 3, 4, 5, 6])
    runs = [bits(Engine(engine.model, engine.processor, max_batch=4).generate(PROMPTS, **options)) for _ in range(2)]
    assert runs[0] == runs[1]


# ---- long prompts


@pytest.mark.parametrize("length, most", [(2**13, 0.31), pytest.param(2**16, 0.26, marks=pytest.mark.slow)])
def test_a_long_prompt(length, most):
    """Slices over a past without a mask: the answer of one forward pass, in a quarter of what all layers would hold."""
    config = ModelConfig(
        vocab_size=64, d_model=16, n_layers=4, n_heads=1, n_kv_heads=1, head_dim=16, expert_width=16, dense_width=16,
        n_experts=2, chunk=512, floor_scale=512, max_context=2**16 + 8,
    )  # fmt: skip
    model = Llama4(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "norm" in name else 4)
        model.output.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    prompt = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(1))
    engine = Engine(model, max_batch=1, prefix_cache_bytes=0)
    got = engine.generate([prompt], max_tokens=2)[0]
    assert engine.cache.nbytes <= most * bytes_all_layers(config, length, torch.float32)
    with torch.inference_mode():
        whole = torch.cat([prompt, torch.tensor(got.tokens[:1])])[None]
        full = torch.log_softmax(model.head(model.hidden(whole)[0, -2:]), -1)
        assert got.tokens == full.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(got.logprobs), full.amax(-1), atol=5e-5, rtol=0)
        late = model.head(model.hidden(prompt[None, -(2**12) :])[0, -1])
    assert (torch.log_softmax(late, -1) - full[0]).abs().max() > 1e-3, "what is far back matters"
