"""Speculative decoding: other drafters, lengths and neighbours, the same answers; guesses, acceptance, refusals."""

import dataclasses
import math

import numpy as np
import pytest
import test_engine
import torch
from test_engine import PROMPTS, C, user

from puna.engine import Engine, Sampling
from puna.engine.constrain import Constraint
from puna.engine.sampler import Chooser, choose
from puna.engine.speculate import Lookup
from puna.errors import PunaError
from puna.model import Llama4

model, engine = test_engine.model, test_engine.engine


class Fixed:
    """A drafter of guesses that are right as often as wanted: it knows the answers."""

    def __init__(self, answers, share, seed=0):
        self.answers, self.share, self.dice = answers, share, np.random.default_rng(seed)

    def propose(self, requests, most):
        drafts = []
        for request in requests:
            right = self.answers[tuple(request.prompt.tokens)][len(request.tokens) :][:most]
            drafts.append([t if self.dice.random() < self.share else 5 for t in right])
        return drafts

    def forget(self, id):
        pass


@pytest.fixture(scope="module")
def draft(model):
    """The model with noise on its weights: it guesses right now and then."""
    torch.manual_seed(1)
    small = Llama4(dataclasses.replace(model.config, chunk=2 * C))
    with torch.no_grad():
        for (_, own), (_, other) in zip(small.named_parameters(), model.named_parameters(), strict=True):
            own.copy_(other + 0.1 * other.std() * torch.randn_like(other) if other.dim() > 1 else other)
    return small


def p_value(counts, expected):
    """Of the chi-square test: how likely counts as far from what is expected, or further, are by chance."""
    counts, expected = counts.flatten().double(), expected.flatten().double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


PAGE = 2 * 2 * 8 * 4 * 1 * C  # bytes of the test model's pages: one global layer, two heads of 8
REPEATING = user("One two three four five six. " * 6)
ASKED = [*PROMPTS, REPEATING]


@pytest.mark.parametrize(
    ("speculate", "options"),
    [
        (4, {}),
        (7, {"temperature": 1.0, "seed": 3}),
        (1, {"temperature": 1.5, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.5}),
        (4, {"temperature": 0.8, "seed": 5, "top_k": 9, "repetition_penalty": 1.1, "min_p": 0.01}),
    ],
    ids=str,
)
def test_no_answer_changes(model, tiny_processor, draft, speculate, options):
    """Text and pictures, alone and in batches, over chunk borders: tokens as without, log-probabilities within 5e-5."""
    plain = Engine(model, tiny_processor, max_batch=4).generate(ASKED, max_tokens=40, **options)
    known = {}
    ends = []
    for messages, done in zip(ASKED, plain, strict=True):
        prompt = Engine(model, tiny_processor).prepare(messages).tokens
        known[tuple(prompt)] = done.tokens
        ends.append((len(prompt), len(prompt) + len(done.tokens)))
    assert any(a // C < b // C for a, b in ends), "answers go over borders"
    engines = {
        "lookup": Engine(model, tiny_processor, max_batch=4, speculate=speculate),
        "draft": Engine(model, tiny_processor, max_batch=3, speculate=speculate, draft=draft, prefill_tokens=24),
        "half right": Engine(model, tiny_processor, max_batch=4, speculate=speculate),
        "right": Engine(model, tiny_processor, max_batch=1, speculate=speculate),
    }
    engines["half right"].drafter = Fixed(known, 0.6)
    engines["right"].drafter = Fixed(known, 1.0)
    for name, engine in engines.items():
        done = engine.generate(ASKED, max_tokens=40, **options)
        assert [d.tokens for d in done] == [d.tokens for d in plain], name
        assert [(d.text, d.finish_reason) for d in done] == [(d.text, d.finish_reason) for d in plain]
        for a, b in zip(done, plain, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=5e-5, rtol=0)
        assert not engine.busy and engine.pages.free == engine.pages.total - engine.prefix.held
        if name != "lookup":
            assert 0 < engine.accepted <= engine.drafted
    right = engines["right"]
    assert right.accepted == right.drafted, "a right guess is always accepted"
    assert engines["half right"].accepted < engines["half right"].drafted


def test_a_repeating_text_is_looked_up(model, tiny_processor, monkeypatch):
    """An answer that goes round in circles takes far fewer forward passes."""
    hidden, passes = model.hidden, []
    monkeypatch.setattr(model, "hidden", lambda tokens, **k: passes.append(tokens.shape[1]) or hidden(tokens, **k))
    circle = {"logit_bias": {t: 100.0 for t in (40, 41, 42)}, "repetition_penalty": 1.0, "max_tokens": 60}
    asked = [[40, 41, 42, 43, 44, 45] * 4]
    counts, answers = [], []
    for speculate in (0, 6):
        passes.clear()
        engine = Engine(model, tiny_processor, max_batch=2, speculate=speculate)
        answers.append(engine.generate(asked, **circle)[0].tokens)
        counts.append(len(passes))
    assert answers[0] == answers[1] and set(answers[0]) <= {40, 41, 42}
    assert counts[1] < counts[0] / 2 and engine.accepted > engine.drafted / 2, (counts, engine.accepted, engine.drafted)


def test_with_stops_grammars_and_limits(model, tiny_processor, draft):
    """Stop strings, stop ids, grammars, max_tokens and the context's end fall into the middle of a draft."""
    length = len(Engine(model, tiny_processor).prepare(PROMPTS[1]).tokens)
    plain = Engine(model, tiny_processor, max_batch=4, max_context=length + 30)
    free = plain.generate([PROMPTS[1]], max_tokens=30)[0]
    requests = [
        Sampling(max_tokens=n, **more)
        for n in (1, 7, 30)
        for more in (
            {}, {"stop": free.text[9:11]}, {"stop_ids": [free.tokens[5]]},
            {"top_logprobs": 2, "temperature": 1.0, "seed": 1},
            {"constraint": Constraint("regex", r"(ab|ac){3,30}!"), "temperature": 1.0, "seed": 2},
            {"constraint": Constraint("json_schema", '{"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 2}')},
        )
    ]  # fmt: skip
    known = {}

    def answers(engine):
        ids = [engine.add_request(PROMPTS[1], sampling) for sampling in requests]
        done = test_engine.drain(engine)
        return [(done[id].tokens, done[id].text, done[id].finish_reason, len(done[id].top_logprobs)) for id in ids]

    expected = answers(plain)
    assert {reason for _, _, reason, _ in expected} == {"stop", "length"}
    known[tuple(plain.prepare(PROMPTS[1]).tokens)] = free.tokens + [7] * 200
    for drafter in (Lookup(), Fixed(known, 1.0), None):
        options = dict(speculate=5, draft=None if drafter else draft)
        engine = Engine(model, tiny_processor, max_batch=4, max_context=length + 30, **options)
        engine.drafter = drafter or engine.drafter
        assert answers(engine) == expected and engine.accepted > 0


def test_guesses():
    def guess(text, most=4):
        return Lookup._follow(np.array(text), most)

    assert guess([1, 2, 3, 4, 9, 1, 2]) == [3, 4, 9, 1]
    assert guess([1, 2, 3, 7, 1, 2, 4, 8, 0, 1, 2], 2) == [4, 8], "the last place"
    assert guess([5, 1, 2, 3, 7, 6, 1, 2, 4, 8, 5, 1, 2], 2) == [3, 7], "the longest match"
    assert guess([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1], "a text that repeats goes on repeating"
    assert guess([1, 2, 3, 2]) == [] and guess([1]) == [] and guess([1, 1]) == [] and guess([7, 7, 7], 3) == [7, 7, 7]


def test_the_distribution_is_kept():
    """Three places of a small vocabulary, any drafts: what is chosen is distributed as the logits say (chi-square), and
    is, draw for draw, what is chosen without drafts. Accepting at the draft's own rate is not."""
    V, n, source = 5, 6_000, torch.Generator().manual_seed(0)
    first, second = torch.randn(V, generator=source), torch.randn(V, V, generator=source)  # by the token before
    seeds = range(n)
    guesses = torch.randint(0, V, (n, 2), generator=source).tolist()
    choosers = [Chooser(Sampling(temperature=1.0, seed=s)) for s in seeds]
    fed = torch.stack([torch.stack([first, second[a], second[b]]) for a, b in guesses])
    results = choose(fed, choosers, None, guesses)
    tokens = [[c.token for c in chosen] for chosen, _ in results]
    wrong = [i for i, said in enumerate(tokens) if len(said) == 1]  # the next one comes from the next pass
    more = choose(second[[tokens[i][0] for i in wrong]][:, None], [choosers[i] for i in wrong])
    for i, ([choice], _) in zip(wrong, more, strict=True):
        tokens[i].append(choice.token)
    accepted, pairs = n - len(wrong), torch.zeros(V, V)
    for one, two, *_ in tokens:
        pairs[one, two] += 1
    counts = pairs.sum(1)
    p = torch.softmax(first.double(), -1)
    assert p_value(counts, n * p) > 1e-3
    joint = p[:, None] * torch.softmax(second.double(), -1)
    assert p_value(pairs, n * joint) > 1e-3
    assert abs(accepted / n - 1 / V) < 4 * math.sqrt(0.16 / n), "a guess at random is right with probability p(guess)"
    biased = torch.tensor([guess[0] for guess in guesses]).bincount(minlength=V)
    assert p_value(biased, n * p) < 1e-6, "the test would see it"


def test_answers_of_the_engine_are_distributed_alike(model, tiny_processor, draft):
    """Over the whole engine: the second and third tokens of many seeds, with and without a draft model."""
    options = dict(max_tokens=3, temperature=1.5, top_k=3)
    seeds = list(range(200))
    plain = Engine(model, tiny_processor, max_batch=20).generate([[1, 2, 3]] * 200, seed=seeds, **options)
    engine = Engine(model, tiny_processor, max_batch=20, speculate=2, draft=draft)
    drafted = engine.generate([[1, 2, 3]] * 200, seed=[s + 1000 for s in seeds], **options)
    assert engine.accepted > 20
    kinds = sorted({tuple(d.tokens) for d in plain + drafted})
    table = torch.tensor([[sum(tuple(d.tokens) == k for d in some) for k in kinds] for some in (plain, drafted)]) * 1.0
    common = table.sum(0) >= 10
    table = torch.cat([table[:, common], table[:, ~common].sum(1, keepdim=True)], 1)
    table = table[:, table.sum(0) > 0]
    difference = (table[0] - table[1]) ** 2 / table.sum(0)  # of two samples: chi-square with one degree less than kinds
    p = torch.special.gammaincc(torch.tensor((table.shape[1] - 1) / 2.0), difference.sum() / 2)
    assert table.shape[1] > 4 and p > 1e-3
    again = engine.generate([[1, 2, 3]] * 9, seed=[s + 1000 for s in seeds[:9]], **options)
    assert [d.tokens for d in again] == [d.tokens for d in drafted[:9]]


def test_with_few_pages(model, tiny_processor, draft):
    """Where memory is short, sequences are preempted, and a draft never takes a page from anyone."""
    plain = Engine(model, tiny_processor, max_batch=4).generate(ASKED, max_tokens=40)
    longest = max(d.prompt_tokens for d in plain) + 40
    memory = dict(cache_bytes=(longest // C + 3) * PAGE, prefix_cache_bytes=0)
    for options in ({"speculate": 6}, {"draft": draft}):
        engine = Engine(model, tiny_processor, max_batch=4, **memory, **options)
        assert [d.tokens for d in engine.generate(ASKED, max_tokens=40)] == [d.tokens for d in plain]
        assert engine.stats()["preemptions"] and engine.stats()["tokens_drafted"] >= engine.stats()["tokens_accepted"]
        assert engine.pages.free == engine.pages.total


def test_with_equal_bits(model, tiny_processor):
    """batch_invariant keeps its promise beside drafts."""
    options = dict(max_tokens=25, temperature=0.3, seed=4)
    plain = Engine(model, tiny_processor, max_batch=1, batch_invariant=True).generate(ASKED[-2:], **options)
    engine = Engine(model, tiny_processor, max_batch=2, batch_invariant=True, speculate=4)
    known = {tuple(engine.prepare(a).tokens): d.tokens for a, d in zip(ASKED[-2:], plain, strict=True)}
    engine.drafter = Fixed(known, 0.7)
    done = engine.generate(ASKED[-2:], **options)
    assert [(d.tokens, d.logprobs) for d in done] == [(d.tokens, d.logprobs) for d in plain] and engine.accepted > 9


def test_a_draft_that_is_the_model_is_always_right(model, tiny_processor):
    engine = Engine(model, tiny_processor, max_batch=2, draft=model)
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        engine.generate([PROMPTS[2], PROMPTS[1]], max_tokens=30, **options)
    assert engine.drafted > 20 and engine.accepted == engine.drafted


def test_aborts_and_rows_come_back(model, tiny_processor, draft):
    engine = Engine(model, tiny_processor, max_batch=2, draft=draft, prefill_tokens=8)
    expected = Engine(model, tiny_processor).generate([PROMPTS[4]], max_tokens=20)[0].tokens
    for _ in range(3):
        one, two = (engine.add_request(PROMPTS[i], Sampling(max_tokens=20)) for i in (3, 4))
        for _ in range(12):
            engine.step()
        engine.abort(one)
        assert test_engine.drain(engine)[two].tokens == expected
    drafter = engine.drafter
    assert len(drafter._free) == 2 and drafter.pages.free == drafter.pages.total and not drafter._places


def test_refusals(model, tiny_processor):
    for value in (-1, 64, 1.5, True, "4"):
        with pytest.raises(PunaError, match="^speculate: "):
            Engine(model, tiny_processor, speculate=value)
    config = model.config
    other = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
    blind = dataclasses.replace(config, vision=None)
    tiles = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=32))
    short = dataclasses.replace(config, max_context=64)
    for wrong in (other, blind, tiles, short):
        with pytest.raises(PunaError, match="^draft: .*same family"):
            Engine(model, tiny_processor, draft=Llama4(wrong))
