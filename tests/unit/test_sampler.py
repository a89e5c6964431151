"""The sampler: supports, statistics, seeds, log-probabilities, refusals; and the cutting of text at stop strings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.engine.sampler import SHORTLIST, Chooser, Sampling, choose, kept_probabilities, sample
from puna.engine.text import StopStrings
from puna.errors import PunaError


def draws(logits, n=2000, banned=None, **options):
    """n draws from the same logits, each with a seed of its own; a list of tokens."""
    choosers = [Chooser(Sampling(seed=i, **options), vocabulary=len(logits)) for i in range(n)]
    logits = torch.tensor(logits, dtype=torch.float32).expand(n, -1)
    return [choice.token for choice in sample(logits, choosers, banned)]


LOGITS = [2.0, 1.0, 0.0, -1.0, -9.0, 1.5]


def test_greedy_is_the_argmax():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert Sampling().generator() is None
    assert [c.token for c in sample(logits, [Chooser(Sampling())] * 5)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-300])
def test_temperature_to_zero_is_greedy(temperature):
    assert set(draws(LOGITS, 50, temperature=temperature)) == {0}
    assert len(set(draws(LOGITS, 50, temperature=1.0))) > 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_p": 0.99999}])
def test_frequencies_are_softmax(temperature, filters):
    n = 4000
    counts = torch.bincount(torch.tensor(draws(LOGITS, n, temperature=temperature, **filters)), minlength=6)
    probs = torch.softmax(torch.tensor(LOGITS) / temperature, -1)
    deviation = (counts / n - probs).abs() / (probs * (1 - probs) / n).sqrt().clamp_min(1e-4)
    assert deviation.max() < 4.5
    assert draws(LOGITS, 50, temperature=1e30).count(4) > 0, "a huge temperature makes all alike"


def test_top_k_restricts_the_support():
    assert set(draws(LOGITS, temperature=5.0, top_k=3)) == {0, 1, 5}
    assert set(draws(LOGITS, temperature=5.0, top_k=1)) == {0}
    assert set(draws(LOGITS, temperature=5.0)) == set(range(6))


def test_top_p_restricts_the_support():
    # probabilities at temperature 1: 0.47 0.17 0.064 0.023 0.0000 0.28
    assert set(draws(LOGITS, temperature=1.0, top_p=0.4)) == {0}
    assert set(draws(LOGITS, temperature=1.0, top_p=0.5)) == {0, 5}
    assert set(draws(LOGITS, temperature=1.0, top_p=0.8)) == {0, 1, 5}
    assert set(draws(LOGITS, temperature=1.0, top_p=1e-12)) == {0}


def test_top_p_applies_to_what_top_k_left():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    kept, tokens = kept_probabilities(probs, 2, 0.5)  # of 0.7: 0.4 is more than a half
    assert tokens[kept > 0].tolist() == [0]
    kept, tokens = kept_probabilities(probs, 0, 0.5)
    assert tokens[kept > 0].tolist() == [0, 1]


def test_top_p_beyond_the_shortlist():
    """More tokens than the shortlist: those that need all get all, whoever shares the batch."""
    wide = torch.full((1, 2000), 1 / 2000, dtype=torch.float64)
    narrow = torch.cat([torch.tensor([[0.95]]), torch.full((1, 1999), 0.05 / 1999)], 1).double()
    kept, tokens = kept_probabilities(torch.cat([wide, narrow]), 0, 0.90025)
    assert (kept > 0).sum(-1).tolist() == [1801, 1] and tokens[1, 0] == 0 and SHORTLIST < 1800
    alone, own = kept_probabilities(narrow, 0, 0.90025)
    assert torch.equal(kept[1, : alone.shape[1]], alone[0]) and torch.equal(tokens[1, : own.shape[1]], own[0])


def test_seed_gives_the_same_draws_whatever_the_batch():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    mine = dict(temperature=1.3, top_p=0.9, seed=11)

    def run(others, steps=20):
        choosers = [Chooser(s) for s in [*others, Sampling(**mine)]]
        rows = [*range(len(others)), 3]
        return [choose(logits[rows], choosers)[-1].token for _ in range(steps)]

    alone = run([])
    assert alone == run([Sampling(), Sampling(temperature=2.0, seed=11), Sampling(temperature=1.0, top_p=0.1, seed=5)])
    assert len(set(alone)) > 5, "the generator goes on from token to token"
    mine["seed"] = 12
    assert alone != run([])
    mine["seed"] = None
    assert run([]) != run([]), "without a seed every request has its own"


def test_no_seed_leaves_torch_alone():
    before = torch.random.get_rng_state()
    draws(LOGITS, 3, temperature=1.0)
    Sampling(temperature=1.0).generator()
    assert torch.equal(before, torch.random.get_rng_state())


def test_banned_tokens_are_never_chosen_and_logprobs_are_raw():
    banned = torch.tensor([True, False, False, False, False, False])
    assert 0 not in draws(LOGITS, 500, banned, temperature=3.0)
    logits = torch.tensor([LOGITS])
    [choice] = sample(logits, [Chooser(Sampling())], banned)
    assert choice.token == 5
    assert choice.logprob == pytest.approx(torch.log_softmax(logits, -1)[0, 5].item(), abs=1e-6)
    changed = Sampling(temperature=7.0, top_k=2, seed=1, logit_bias={0: -9, 3: 9}, repetition_penalty=3)
    [choice] = sample(logits, [Chooser(changed, [1, 2], 6)])
    assert choice.logprob == pytest.approx(torch.log_softmax(logits, -1)[0, choice.token].item(), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_show_in_the_logprob(bad):
    requests = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_p=0.5, seed=1), Sampling()]
    logits = torch.tensor(LOGITS).repeat(4, 1)
    logits[:3, 2] = bad
    choices = sample(logits, [Chooser(r) for r in requests])
    assert [math.isfinite(c.logprob) for c in choices] == [False, False, False, True]
    assert all(0 <= c.token < 6 for c in choices)
    assert [type(c).__name__ for c in choose(logits, [Chooser(r) for r in requests])] == [
        "FloatingPointError", "FloatingPointError", "FloatingPointError", "Choice"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 1.5, "5", True]),
        ("temperature", [math.nan, math.inf, -math.inf, -0.1, "0.5", None, True]),
        ("top_p", [0, -0.5, 1.01, math.nan, "1", None]),
        ("top_k", [-5, 2.0, "3", None, True]),
        ("seed", [2**64, -(2**63) - 1, 1.0, "7", False]),
        ("stop", ["", [""], ["a", 3], 5, None, {"a"}]),
        ("stop_ids", [[-1], ["a"], "12", 5, [True], None]),
        ("min_p", [-0.1, 1.1, math.nan, "0", None, True]),
        ("frequency_penalty", [-2.1, 2.1, math.inf, -math.inf, "1", None, False]),
        ("presence_penalty", [-2.1, 2.1, math.inf, -math.inf, "1", None, False]),
        ("repetition_penalty", [0, -1, math.inf, math.nan, "1", None, True]),
        ("logit_bias", [{-1: 1}, {"1": 1}, {1: 101}, {1: -101}, {1: math.nan}, {1: "1"}, {True: 1}, [1], None]),
        ("top_logprobs", [-1, 21, 1.0, "5", None, True]),
        ("constraint", ["regex", {"type": "object"}, True]),
        ("return_routes", [1, "yes", None]),
    ],
)
def test_refusals_name_the_field(field, values):
    for value in values:
        with pytest.raises(PunaError, match=rf"^{field}: "):
            Sampling(**{field: value})


def test_edges_that_are_allowed():
    Sampling(max_tokens=None, temperature=1e30, top_p=1, top_k=10**9, seed=2**64 - 1)
    assert Sampling(seed=-1, temperature=1).generator() is not None
    assert Sampling(stop="a").stop == ("a",) and Sampling(stop=["a", "b"]).stop == ("a", "b")
    assert draws(LOGITS, 3, temperature=1.0, top_k=10**9)


# ---- all steps together, against a literal reference


def literal(logits, s, u, prompt, said, banned):
    """The steps of the module's docstring for one row, one token and one number at a time."""
    z = dict(enumerate(logits))
    for v in z:
        if s.repetition_penalty != 1 and v in {*prompt, *said}:
            z[v] = z[v] / s.repetition_penalty if z[v] > 0 else z[v] * s.repetition_penalty
        z[v] -= s.frequency_penalty * said.count(v) + s.presence_penalty * (v in said)
        z[v] += s.logit_bias.get(v, 0.0)
    z = {v: x for v, x in z.items() if v not in banned}
    if s.temperature == 0:
        return max(z, key=z.get)
    high = max(z.values())
    weights = {v: math.exp((x - high) / s.temperature) for v, x in z.items()}
    kept = {v: w / sum(weights.values()) for v, w in weights.items()}
    order = sorted(kept, key=lambda v: -kept[v])
    if s.top_k:
        order = order[: s.top_k]
        kept = {v: kept[v] / sum(kept[o] for o in order) for v in order}
    if s.top_p < 1:
        mass, enough = 0.0, []
        for v in order:
            if mass < s.top_p or not enough:
                enough.append(v)
            mass += kept[v]
        order = enough
    order = [v for v in order if kept[v] >= s.min_p * kept[order[0]]]
    if not s.top_k and s.top_p == 1:
        order = sorted(order)  # nothing needed the likeliest first
    below = 0.0
    for v in order:
        below += kept[v]
        if u * sum(kept[o] for o in order) < below:
            return v
    return order[-1]


V = 12
OPTIONS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 2.0])},
    optional={
        "top_k": st.integers(1, V), "top_p": st.floats(0.05, 1), "min_p": st.floats(0, 1),
        "frequency_penalty": st.floats(-2, 2), "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.25, 4), "seed": st.integers(0, 9),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=4),
    },
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(OPTIONS, min_size=1, max_size=5), st.lists(st.integers(0, V - 1), max_size=6), st.integers(0, 99))
def test_a_batch_equals_the_literal_steps(rows, prompt, seed):
    """Any mixture of settings in one batch, over several tokens."""
    samplings = [Sampling(**{"seed": 5, **options}) for options in rows]
    choosers = [Chooser(s, prompt, V) for s in samplings]
    numbers = [s.generator() for s in samplings]
    said, source = [[] for _ in rows], torch.Generator().manual_seed(seed)
    banned = torch.zeros(V, dtype=torch.bool)
    banned[3] = True
    for _ in range(5):
        logits = torch.randn(len(rows), V, generator=source) * 2
        choices = choose(logits, choosers, banned)
        for row, choice in enumerate(choices):
            u = 0.0
            if samplings[row].temperature:
                u = torch.rand(1, dtype=torch.float64, generator=numbers[row]).item()
            assert choice.token == literal(logits[row].tolist(), samplings[row], u, prompt, said[row], {3})
            said[row].append(choice.token)


@pytest.mark.parametrize(
    "option",
    [{"min_p": 0.9}, {"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 4},
     {"logit_bias": {4: 100}}, {"logit_bias": {0: -100}}, {"frequency_penalty": -2}],
    ids=str,
)  # fmt: skip
def test_each_option_changes_the_answer(option):
    def answer(**options):
        chooser = Chooser(Sampling(temperature=1.0, seed=3, **options), [1], 6)
        return [choose(torch.tensor([LOGITS]), [chooser])[0].token for _ in range(30)]

    assert answer() == answer() != answer(**option)
    if option == {"logit_bias": {4: 100}}:
        assert set(answer(**option)) == {4}
    if option == {"logit_bias": {0: -100}}:
        assert 0 not in answer(**option) and 0 in answer()


def test_looking_ahead_takes_no_number_away():
    def answer(ahead):
        chooser, tokens = Chooser(Sampling(temperature=1.0, seed=3)), []
        for _ in range(9):
            for a in ahead:
                sample(torch.tensor([LOGITS]), [chooser], ahead=a)
            tokens.append(choose(torch.tensor([LOGITS]), [chooser])[0].token)
        return tokens

    plain = answer([])
    assert answer([3, 0, 1]) == plain
    chooser = Chooser(Sampling(temperature=1.0, seed=3))
    assert [sample(torch.tensor([LOGITS]), [chooser], ahead=a)[0].token for a in range(9)] == plain


def test_top_logprobs_are_the_likeliest_of_the_raw_logits():
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    wanted = [{"top_logprobs": 4, "logit_bias": {2: 100}}, {}, {"top_logprobs": 20, "temperature": 9, "seed": 1}]
    wanted = [Sampling(**options) for options in wanted]
    choices = sample(logits, [Chooser(s, (), 30) for s in wanted], torch.arange(30) == 5)
    assert [len(c.top) for c in choices] == [4, 0, 20] and choices[0].token == 2
    for row in (0, 2):
        expected = torch.log_softmax(logits[row], -1).sort(descending=True)
        ids, values = zip(*choices[row].top, strict=True)
        assert list(ids) == expected.indices[: len(ids)].tolist()
        torch.testing.assert_close(torch.tensor(values), expected.values[: len(ids)])
    assert len(sample(logits[:1, :3], [Chooser(wanted[2])])[0].top) == 3


# ---- stop strings


def cut(pieces, stops):
    """(text, found, pieces given out) of a stream of pieces."""
    strings, out = StopStrings(stops), []
    for piece in pieces:
        out.append(strings.push(piece))
        if strings.found is not None:
            break
    if strings.found is None:
        out.append(strings.flush())
    return "".join(out), strings.found, out


def test_a_stop_string_over_piece_borders_is_never_shown():
    text, found, out = cut(["fine.", "\n", "\nUs", "er", ": hello"], ["\n\nUser:"])
    assert (text, found) == ("fine.", "\n\nUser:")
    assert out == ["fine.", "", "", "", ""]
    text, found, out = cut(["fine.", "\n", "\nUs", "ing"], ["\n\nUser:"])
    assert (text, found) == ("fine.\n\nUsing", None) and out[1:3] == ["", ""]


def test_the_earliest_stop_counts():
    assert cut(["one two three"], ["three", "two"])[:2] == ("one ", "two")
    assert cut(["aab"], ["ab"])[:2] == ("a", "ab")
    assert cut(["aaa", "b", "x"], ["aab"])[:2] == ("a", "aab")


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_streaming_equals_searching_the_whole_text(pieces, stops):
    """The text is the whole up to a stop string, found as early as the pieces allow."""
    text, found, out = cut(pieces, stops)
    whole = "".join(pieces)
    if found is None:
        assert text == whole and not any(stop in whole for stop in stops)
    else:
        assert whole.startswith(text + found)
        assert not any(stop in text for stop in stops)
