"""The engine's ways to choose tokens: penalties, biases, the likeliest tokens, beside others in one batch."""

import pytest
import test_engine
import torch
from test_engine import PROMPTS

from puna.engine import Sampling
from puna.errors import PunaError

model, engine = test_engine.model, test_engine.engine


def run(engine, *samplings, prompt=PROMPTS[1]):
    """The completions of one prompt with each of these settings, all in one batch, and their events."""
    events = [[] for _ in samplings]
    for sampling, sink in zip(samplings, events, strict=True):
        engine.add_request(prompt, sampling, sink=sink.append)
    while engine.busy:
        engine.step()
    return [seen[-1].completion for seen in events], events


def test_penalties_reach_the_answers(engine, monkeypatch):
    """Greedy answers are those of the penalised scores over whole forward passes; each setting gives another answer."""
    head = engine.model.head
    monkeypatch.setattr(engine.model, "head", lambda h: head(h) * 0.15)  # less sure of itself
    plain = engine.generate([PROMPTS[1]], max_tokens=12)[0].tokens
    options = [
        {"repetition_penalty": 0.4}, {"frequency_penalty": -1.5}, {"presence_penalty": -2.0},
        {"logit_bias": {plain[0]: -100}}, {"logit_bias": {7: 100.0}}, {},
    ]  # fmt: skip
    done, _ = run(engine, *(Sampling(max_tokens=12, **o) for o in options))
    prompt = engine.prepare(PROMPTS[1]).tokens.tolist()
    for option, completion in zip(options, done, strict=True):
        s, said = Sampling(**option), []
        for _ in range(12):
            with torch.no_grad():
                z = engine.model(torch.tensor([prompt + said]))[0, -1]
            z[engine._banned_V] = -torch.inf
            seen = torch.tensor(sorted({*prompt, *said}))
            r = s.repetition_penalty
            z[seen] = torch.where(z[seen] > 0, z[seen] / r, z[seen] * r)
            for token in set(said):
                z[token] -= s.frequency_penalty * said.count(token) + s.presence_penalty
            for token, bias in s.logit_bias.items():
                z[token] += bias
            said.append(int(z.argmax()))
        assert completion.tokens == said
    answers = [tuple(c.tokens) for c in done]
    assert answers[-1] == tuple(plain) and answers[-1] not in answers[:-1]
    assert answers[4] == (7,) * 12


def test_top_logprobs_of_events_and_completions(engine):
    [with_top, without], [events, _] = run(engine, Sampling(max_tokens=6, top_logprobs=3), Sampling(max_tokens=6))
    assert without.tokens == with_top.tokens and without.top_logprobs == []
    assert [e.top_logprobs for e in events[:-1]] == with_top.top_logprobs and events[-1].top_logprobs == []
    for token, logprob, top in zip(with_top.tokens, with_top.logprobs, with_top.top_logprobs, strict=True):
        assert len(top) == 3 and top[0] == (token, pytest.approx(logprob)) and top[0][1] >= top[1][1] >= top[2][1]


def test_ids_outside_the_vocabulary(engine):
    size = engine.config.vocab_size
    for option in ({"logit_bias": {size: 1.0}}, {"stop_ids": [size]}):
        with pytest.raises(PunaError, match=rf"^{next(iter(option))}: token ids must lie in 0\.\.{size - 1}"):
            engine.add_request(PROMPTS[0], Sampling(**option))
    assert not engine.busy
