"""The mixture is exact in every 1,024 rows, reads each source in whole passes, and is a pure function."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.mixture import BLOCK, Mixture, quotas
from puna.errors import PunaError

WEIGHTS = {"text/en": 5, "text/de": 2.5, "code": 1.7, "captions": 0.8}
SIZES = {"text/en": 3000, "text/de": 300, "code": 77, "captions": 5, "text/fr": 10}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_quotas_are_largest_remainders(weights):
    named = {f"s{i:02}": w for i, w in enumerate(weights)}
    result, total = quotas(named), sum(weights)
    assert sum(result.values()) == BLOCK
    assert all(abs(result[name] - BLOCK * w / total) < 1 for name, w in named.items())


@pytest.mark.parametrize("block", [0, 1, 17])
def test_exact_in_every_block(block):
    mixture = Mixture(WEIGHTS, SIZES, seed=3)
    got = Counter(mixture.locate(i)[0] for i in range(block * BLOCK, (block + 1) * BLOCK))
    assert got == {"text/en": 512, "text/de": 256, "code": 174, "captions": 82} == quotas(WEIGHTS)


def test_each_pass_reads_every_row_once_in_another_order():
    mixture = Mixture({"a": 3, "b": 1}, {"a": 500, "b": 70}, seed=0)
    rows = {"a": [], "b": []}
    for i in range(2 * BLOCK):
        name, row = mixture.locate(i)
        rows[name].append(row)
    for name, size in (("a", 500), ("b", 70)):
        passes = [rows[name][k : k + size] for k in range(0, len(rows[name]) - size + 1, size)]
        assert len(passes) >= 2
        assert all(sorted(p) == list(range(size)) for p in passes)
        assert passes[0] != passes[1]


def test_pure_function_of_index_and_seed():
    one, two = Mixture(WEIGHTS, SIZES, seed=1), Mixture(WEIGHTS, SIZES, seed=1)
    forward = [one.locate(i) for i in range(3000)]
    assert forward == [two.locate(i) for i in reversed(range(3000))][::-1]
    other = [Mixture(WEIGHTS, SIZES, seed=2).locate(i) for i in range(3000)]
    assert sum(a == b for a, b in zip(forward, other, strict=True)) < 1500
    blocks = [[name for name, _ in forward[b * BLOCK : (b + 1) * BLOCK]] for b in range(2)]
    assert blocks[0] != blocks[1], "each block has an order of its own"


def test_order_of_names_and_scale_of_weights_do_not_matter():
    a = Mixture({"x": 1, "y": 3}, {"x": 9, "y": 9})
    b = Mixture({"y": 3.0, "x": 1.0, "z": 0}, {"x": 9, "y": 9})
    assert a.fingerprint() == b.fingerprint()
    scaled = Mixture({"x": 10, "y": 30}, {"x": 9, "y": 9})
    assert [a.locate(i) for i in range(100)] == [scaled.locate(i) for i in range(100)]


def test_large_sources_take_the_path_without_an_array():
    mixture = Mixture({"big": 1}, {"big": 70_000}, seed=5)
    rows = [mixture.locate(i)[1] for i in range(300)]
    assert len(set(rows)) == 300 and max(rows) > 60_000


def test_fingerprint_sees_everything():
    base = Mixture(WEIGHTS, SIZES, seed=1).fingerprint()
    assert base != Mixture(WEIGHTS, SIZES, seed=2).fingerprint()
    assert base != Mixture(WEIGHTS, SIZES | {"code": 78}, seed=1).fingerprint()
    assert base != Mixture(WEIGHTS | {"code": 1.8}, SIZES, seed=1).fingerprint()
    assert base == Mixture(WEIGHTS, SIZES | {"text/fr": 11}, seed=1).fingerprint(), "unused sources don't matter"


def test_counts_and_show():
    mixture = Mixture(WEIGHTS, SIZES, seed=1)
    assert mixture.counts(3 * BLOCK + 200) == dict(Counter(mixture.locate(i)[0] for i in range(3 * BLOCK + 200)))
    text = mixture.show(BLOCK, {name: 100 * size for name, size in SIZES.items()})
    print(text)
    assert text.splitlines()[0] == "mixture · 1,024 rows · 102,400 tokens"
    german = next(line for line in text.splitlines() if "de" in line and "code" not in line)
    assert "25.0 %" in german and "256 rows" in german and "25,600 tokens" in german and "0.85 epochs" in german
    group = next(line for line in text.splitlines() if "─ text" in line)
    assert "768 rows" in group and "epochs" not in group
    assert "tokens" not in mixture.show(10)


@pytest.mark.parametrize(
    "weights, sizes, message",
    [
        ({"a": 0}, {"a": 3}, "sum to 0"),
        ({}, {}, "sum to 0"),
        ({"a": 1, "b": 1}, {"a": 3}, "unknown data source 'b'; there are: a"),
        ({"a": 1}, {"a": 0}, "'a' is empty"),
        ({"a": -1, "b": 2}, {"a": 3, "b": 3}, "weights are finite numbers >= 0"),
        ({"a": float("nan")}, {"a": 3}, "weights are finite"),
        ({"a": 1, "b": 0.0001}, {"a": 3, "b": 3}, "less than one row in 1024"),
    ],
)
def test_errors(weights, sizes, message):
    with pytest.raises(PunaError, match=message):
        Mixture(weights, sizes)


def test_fewer_rows_than_a_batch():
    mixture = Mixture({"a": 1, "b": 1}, {"a": 3, "b": 4})
    mixture.check_batch(7)
    with pytest.raises(PunaError, match="7 packed rows, fewer than one batch of 8"):
        mixture.check_batch(8)
