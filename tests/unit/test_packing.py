"""Packing invariants: every token once and in order, documents on their chunks, little padding, nothing cut in a
picture."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.packing import KEEP_OPEN, pack
from puna.errors import PunaError
from puna.processor import Encoded

PAD, IMAGE_START, IMAGE_END = 0, 1, 2


def document(number: int, length: int) -> Encoded:
    """A document whose tokens say which one it is and where: 100,000 * (number + 1) + place."""
    tokens = np.arange(length, dtype=np.int32) + 100_000 * (number + 1)
    return Encoded(tokens, np.arange(length) % 3 != 0, [])


def pieces(rows):
    """(row, begin, tokens, loss) of every packed piece."""
    for r in range(len(rows)):
        ids = rows.doc_ids[r]
        for doc in np.unique(ids[ids >= 0]):
            at = np.flatnonzero(ids == doc)
            assert (np.diff(at) == 1).all(), "a document's tokens are consecutive"
            yield r, int(at[0]), rows.tokens[r, at], rows.loss[r, at]


lengths = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 300)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths, st.sampled_from([16, 32]), st.integers(1, 4), st.sampled_from([64, 10_000]))
def test_invariants(lengths, chunk, chunks, window):
    T = chunk * chunks
    docs = [document(i, n) for i, n in enumerate(lengths)]
    rows = pack(docs, T, chunk, PAD, window=window)
    assert rows.documents == len(docs)
    assert rows.tokens.shape == rows.doc_ids.shape == rows.loss.shape == (len(rows), T)
    assert (rows.tokens[rows.doc_ids < 0] == PAD).all() and not rows.loss[rows.doc_ids < 0].any()
    found = {}
    for _, begin, tokens, loss in pieces(rows):
        n = len(tokens)
        if n > chunk:
            assert begin % chunk == 0
        else:
            assert begin // chunk == (begin + n - 1) // chunk, "a short document stays in its chunk"
        number, place = divmod(int(tokens[0]), 100_000)
        found.setdefault(number - 1, []).append((place, tokens, loss))
    for i, doc in enumerate(docs):
        parts = sorted(found.pop(i), key=lambda part: part[0])
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), doc.tokens)
        np.testing.assert_array_equal(np.concatenate([p[2] for p in parts]), doc.loss)
        assert [len(p[1]) for p in parts[:-1]] == [T] * (len(parts) - 1)
    assert not found
    assert rows.token_count == sum(lengths)
    if len(rows):
        assert rows.padding_share == pytest.approx(1 - sum(lengths) / rows.tokens.size)
        first = rows.doc_ids[:, 0]
        assert (first == 0).all(), "ids count from 0 in each row"


def with_pictures(number: int, parts: list[int]) -> Encoded:
    """Positive parts are text tokens, negative ones a picture of that many tokens."""
    tokens, pictures = [], []
    for i, part in enumerate(parts):
        if part > 0:
            tokens += [10] * part
        else:
            tokens += [IMAGE_START] + [1000 * (number + 1) + i] * (-part - 2) + [IMAGE_END]
            pictures.append((number, i))
    return Encoded(np.array(tokens, np.int32), np.array(tokens) == 10, pictures)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(1, 50), st.integers(-16, -3)), min_size=1, max_size=12), max_size=12))
def test_pictures_stay_whole_and_in_order(parts):
    docs = [with_pictures(i, p) for i, p in enumerate(parts)]
    rows = pack(docs, 32, 16, PAD, image=(IMAGE_START, IMAGE_END))
    seen = []
    for r in range(len(rows)):
        count = 0
        for _, _, tokens, _ in (piece for piece in pieces(rows) if piece[0] == r):
            starts, ends = np.flatnonzero(tokens == IMAGE_START), np.flatnonzero(tokens == IMAGE_END)
            assert len(starts) == len(ends) and (starts < ends).all(), "every picture is whole"
            count += int((tokens == IMAGE_START).sum())
        assert count == len(rows.pictures[r])
        middles = rows.tokens[r][np.flatnonzero(rows.tokens[r] == IMAGE_START) + 1]
        assert [divmod(int(m) - 1000, 1000) for m in middles] == rows.pictures[r], "pictures in the order of tokens"
        seen += rows.pictures[r]
    assert sorted(seen) == sorted(p for doc in docs for p in doc.pictures)
    assert rows.token_count == sum(len(doc.tokens) for doc in docs)


def test_cut_moves_before_the_picture():
    doc = with_pictures(0, [28, -10, 20])
    rows = pack([doc], 32, 16, PAD, image=(IMAGE_START, IMAGE_END))
    assert sorted(len(tokens) for _, _, tokens, _ in pieces(rows)) == [28, 30]
    with pytest.raises(PunaError, match="a picture takes 40 tokens and a row holds 32"):
        pack([with_pictures(0, [4, -40])], 32, 16, PAD, image=(IMAGE_START, IMAGE_END))
    with pytest.raises(ValueError, match="image="):
        pack([doc], 32, 16, PAD)


def lognormal(mean: float, seed: int = 0, n: int = 600) -> list[Encoded]:
    sizes = np.clip(np.random.default_rng(seed).lognormal(mean, 1, n), 2, 5000).astype(int)
    return [document(i, int(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("mean", [3.0, 4.5, 5.0, 6.5])
@pytest.mark.parametrize("T, chunk", [(128, 128), (512, 128), (512, 256)])
def test_little_padding_on_varied_documents(mean, T, chunk):  # noqa: N803
    assert pack(lognormal(mean), T, chunk, PAD).padding_share <= 0.10


def test_filler_takes_only_space_left_empty():
    docs = lognormal(5.0)
    long, short = ([d for d in docs if (len(d.tokens) > 256) == want] for want in (True, False))
    without, filled = pack(long, 1024, 256, PAD), pack(long, 1024, 256, PAD, filler=short)
    assert without.padding_share > 0.15 > 0.10 >= filled.padding_share
    assert len(filled) == len(without) and filled.documents > without.documents == len(long)
    everything = sorted((int(t[0]), len(t)) for _, _, t, _ in pieces(filled))
    assert len(everything) == len(set(everything))


def test_deterministic_and_not_sorted():
    docs = lognormal(4.0, n=2000)
    a, b = pack(docs, 256, 128, PAD), pack(docs, 256, 128, PAD)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert not np.array_equal(a.tokens, pack(docs, 256, 128, PAD, seed=1).tokens)
    # The rows' number of documents must not drift along the data set, as it would sorted by length.
    per_row = a.doc_ids.max(1) + 1
    place = np.arange(len(per_row))
    assert abs(np.corrcoef(place, per_row)[0, 1]) < 0.2
    # Nor does a chunk hold its documents from long to short.
    a = pack(docs, 128, 128, PAD)
    rising = falling = 0
    for r in range(len(a)):
        sizes = np.bincount(a.doc_ids[r][a.doc_ids[r] >= 0])
        rising, falling = rising + (np.diff(sizes) > 0).sum(), falling + (np.diff(sizes) < 0).sum()
    assert 0.4 < rising / (rising + falling) < 0.6


def test_rows_on_disk_are_those_in_memory_and_few_documents_are_held(tmp_path):
    sizes = [len(doc.tokens) for doc in lognormal(4.0, n=20_000)]
    alive, most, total = weakref.WeakSet(), 0, sum(sizes)

    class Tokens(np.ndarray):  # its own type, so that the set counts by identity
        __hash__, __eq__ = object.__hash__, object.__eq__

    def passing():
        nonlocal most
        for i, size in enumerate(sizes):
            doc = document(i % 20_000, size)
            tokens = doc.tokens.view(Tokens)
            alive.add(tokens)
            yield Encoded(tokens, doc.loss, [])
            if i % 500 == 0:
                most = max(most, sum(map(len, alive)))

    window, T = 20_000, 512
    on_disk = pack(passing(), T, 128, PAD, window=window, scratch=tmp_path)
    assert most < total / 3 and most < window + 2 * KEEP_OPEN * T, f"{most} of {total} tokens were held at once"
    in_memory = pack([document(i, n) for i, n in enumerate(sizes)], T, 128, PAD, window=window)
    for name in ("tokens", "doc_ids", "loss"):
        assert isinstance(getattr(on_disk, name), np.memmap) and not isinstance(getattr(in_memory, name), np.memmap)
        np.testing.assert_array_equal(getattr(on_disk, name), getattr(in_memory, name))
    assert list(tmp_path.iterdir()) == [], "the files have no name, so a killed run leaves none"
    assert len(pack([], T, 128, PAD, scratch=tmp_path)) == 0
    (tmp_path / "file").touch()
    with pytest.raises(PunaError, match="can't pack data in .*file"):
        pack([document(0, 9)], T, 128, PAD, scratch=tmp_path / "file" / "folder")


def test_overlong_conversations_can_be_dropped():
    docs = [document(0, 10), document(1, 100), document(2, 64)]
    rows = pack(docs, 64, 32, PAD, overlong=lambda doc: "drop")
    assert (rows.documents, rows.dropped, rows.token_count) == (2, 1, 74)
    assert pack(docs, 64, 32, PAD).token_count == 174


def test_rows_shorter_than_a_chunk_and_wrong_lengths():
    assert pack([document(0, 10), document(1, 40)], 16, 128, PAD).token_count == 50
    with pytest.raises(PunaError, match="seq_len 100 must be a multiple of the attention chunk 64"):
        pack([], 100, 64, PAD)
    empty = pack([], 64, 64, PAD)
    assert len(empty) == 0 and empty.padding_share == 0 and empty.pictures == []
    with pytest.raises(ValueError, match="loss flags"):
        pack([Encoded(np.zeros(3, np.int32), np.ones(2, bool), [])], 64, 64, PAD)
