"""The sampler: supports, statistics, seeds, log-probabilities, refusals; and the cutting of text at stop strings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.engine.sampler import SHORTLIST, Sampling, kept_probabilities, sample
from puna.engine.text import StopStrings
from puna.errors import PunaError


def draws(logits, n=2000, banned=None, **options):
    """n draws from the same logits, each with a seed of its own; a list of tokens."""
    requests = [Sampling(seed=i, **options) for i in range(n)]
    logits = torch.tensor(logits, dtype=torch.float32).expand(n, -1)
    return sample(logits, requests, [r.generator() for r in requests], banned)[0]


LOGITS = [2.0, 1.0, 0.0, -1.0, -9.0, 1.5]


def test_greedy_is_the_argmax():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    requests = [Sampling()] * 5
    assert requests[0].generator() is None
    assert sample(logits, requests, [None] * 5)[0] == logits.argmax(-1).tolist()


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
        requests = [*others, Sampling(**mine)]
        generators = [r.generator() for r in requests]
        rows = [*range(len(others)), 3]
        return [sample(logits[rows], requests, generators)[0][-1] for _ in range(steps)]

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
    tokens, logprobs = sample(logits, [Sampling()], [None], banned)
    assert tokens == [5]
    assert logprobs[0] == pytest.approx(torch.log_softmax(logits, -1)[0, 5].item(), abs=1e-6)
    hot = Sampling(temperature=7.0, top_k=2, seed=1)
    tokens, logprobs = sample(logits, [hot], [hot.generator()])
    assert logprobs[0] == pytest.approx(torch.log_softmax(logits, -1)[0, tokens[0]].item(), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_show_in_the_logprob(bad):
    requests = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_p=0.5, seed=1), Sampling()]
    logits = torch.tensor(LOGITS).repeat(4, 1)
    logits[:3, 2] = bad
    tokens, logprobs = sample(logits, requests, [r.generator() for r in requests])
    assert not any(math.isfinite(x) for x in logprobs[:3]) and math.isfinite(logprobs[3])
    assert all(0 <= token < 6 for token in tokens)


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
