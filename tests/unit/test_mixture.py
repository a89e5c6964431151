"""The mixture is exact in every 1,024 rows, reads each source in whole passes, and is a pure function."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data import DataConfig, Phase
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


# ---- phases


def test_a_phase_changes_the_shares_and_rereads_nothing():
    sizes = {"a": 5000, "b": 5000, "c": 90}
    first = 1500
    mixture = Mixture({"a": 3, "b": 1}, sizes, seed=4, then=[(first, {"b": 1, "c": 1}), (4000, {"a": 1})])
    placed = [mixture.locate(i) for i in range(5000)]
    assert placed[:first] == [Mixture({"a": 3, "b": 1}, sizes, seed=4).locate(i) for i in range(first)]
    names = [name for name, _ in placed]
    assert Counter(names[first : first + BLOCK]) == {"b": 512, "c": 512}
    assert set(names[4000:]) == {"a"} and set(names[:first]) == {"a", "b"}
    for name in ("a", "b"):
        rows = [row for n, row in placed if n == name]
        assert len(set(rows)) == len(rows), "a row was read again before its pass was over"
    rows = [row for n, row in placed if n == "c"]
    assert sorted(rows[:90]) == list(range(90)) == sorted(rows[90:180]), "passes go on as ever"
    for rows in (0, 1, first, first + 1, 3999, 4000, 5000):
        assert mixture.counts(rows) == {n: names[:rows].count(n) for n in "abc"}


def test_phases_are_pure_functions_and_part_of_the_fingerprint():
    sizes, then = {"a": 50, "b": 60}, [(7, {"b": 1})]
    one, two = (Mixture({"a": 1, "b": 1}, sizes, 1, then) for _ in range(2))
    assert [one.locate(i) for i in range(100)] == [two.locate(i) for i in reversed(range(100))][::-1]
    assert one.fingerprint() == two.fingerprint() != Mixture({"a": 1, "b": 1}, sizes, 1).fingerprint()
    assert one.fingerprint() != Mixture({"a": 1, "b": 1}, sizes, 1, [(8, {"b": 1})]).fingerprint()


def test_phases_out_of_order_or_wrong():
    sizes = {"a": 50, "b": 60}
    for then in ([(0, {"a": 1})], [(9, {"a": 1}), (9, {"b": 1})]):
        with pytest.raises(ValueError, match="each must begin after the one before"):
            Mixture({"a": 1}, sizes, 0, then)
    with pytest.raises(PunaError, match="unknown data source 'x'"):
        Mixture({"a": 1}, sizes, 0, [(5, {"x": 1})])


def test_a_stage_s_phases_begin_with_whole_steps():
    config = DataConfig(64, {"a": 1.0}, then=(Phase(0.25, {"b": 1.0}), Phase(0.9, {"a": 1.0, "b": 0})))
    assert config.used == ("a", "b")
    mixture = config.mixture({"a": 500, "b": 500}, steps=10, rows=4)
    names = [mixture.locate(i)[0] for i in range(40)]
    assert names == ["a"] * 8 + ["b"] * 28 + ["a"] * 4
    with pytest.raises(PunaError, match="3 phases do not fit into 2 steps"):
        config.mixture({"a": 500, "b": 500}, steps=2, rows=4)
    for wrong in ((0.0,), (1.0,), (0.5, 0.5), (0.6, 0.2)):
        with pytest.raises(PunaError, match="rising shares between 0 and 1"):
            DataConfig(64, {"a": 1.0}, then=tuple(Phase(after, {"b": 1.0}) for after in wrong))
    with pytest.raises(PunaError, match="options for data source 'c'"):
        DataConfig(64, {"a": 1.0}, options={"c": {}}, then=(Phase(0.5, {"b": 1.0}),))
    assert DataConfig(64, {"a": 1.0}, options={"b": {}}, then=(Phase(0.5, {"b": 1.0}),)).options == {"b": {}}
