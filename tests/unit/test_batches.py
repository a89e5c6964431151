"""A batch is a function of its step alone: right targets, right tiles, whatever was asked before and however it was
prepared."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from puna.data.batches import Batches, targets, varied
from puna.data.mixture import Mixture
from puna.data.packing import pack
from puna.errors import PunaError
from puna.processor import Encoded
from puna.tasks import EmojiPicture, Scene

IMAGE_START, IMAGE_END = 1, 2


class Drawn:
    """Stands for Processor: a picture numbered n has n % 3 + 1 tiles filled with n."""

    def __init__(self):
        self.calls = 0

    def tiles(self, pictures):
        self.calls += 1
        return torch.cat([torch.full((p % 3 + 1, 3, 2, 2), float(p)) for p in pictures])


def sources(T=32, chunk=16):  # noqa: N803
    rng = np.random.default_rng(0)
    text = []
    for _ in range(80):
        n = int(rng.integers(2, 50))
        text.append(Encoded(rng.integers(10, 99, n).astype(np.int32), rng.random(n) < 0.9, []))
    seen = []
    for n in range(40):
        tokens = np.array([5, IMAGE_START, 3, IMAGE_END, 6, 7], np.int32)
        seen.append(Encoded(tokens, tokens >= 6, [n]))
    return {"text": pack(text, T, chunk, 0), "seen": pack(seen, T, chunk, 0, image=(IMAGE_START, IMAGE_END))}


def make(prefetch=2, rows=4, **more):
    packed = sources()
    mixture = Mixture({"text": 3, "seen": 1}, {name: len(p) for name, p in packed.items()}, seed=1)
    return Batches(packed, mixture, Drawn(), rows, prefetch=prefetch, **more)


def equal(a, b):
    tensors = ("tokens_BT", "targets_BT", "valid_BT", "doc_ids_BT")
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    assert (a.tiles is None) == (b.tiles is None) and (a.tiles is None or torch.equal(a.tiles, b.tiles))
    assert (a.tiles_B, a.row_sources, a.row_index) == (b.tiles_B, b.row_sources, b.row_index)
    return True


THREADS = """
import os, threading, torch
from puna.processor import ImageProcessor, Processor
from puna.tasks import EmojiPicture
from puna.tasks.pictures import by_id, styles
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)  # the training thread's own team
concept = next(iter(by_id()))
pictures = [EmojiPicture(concept, styles(concept)[0], seed) for seed in range(40)]
count = lambda: len(os.listdir("/proc/self/task"))
before, found = count(), []
def work():
    tiles = Processor(None, ImageProcessor(64, 16)).tiles(pictures)
    found.append((count() - 1, tuple(tiles.shape)))  # this thread itself not counted
thread = threading.Thread(target=work)
thread.start(), thread.join()
print(before, *found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_preparing_pictures_starts_no_openmp_threads():
    """With more of them than cores, the training thread's would sleep at every barrier instead of spinning."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, found = done.stdout.split(" ", 1)
    assert found.strip() == f"({before}, (40, 3, 64, 64))"


def test_targets_by_hand():
    tokens = np.array([[11, 12, 13, 21, 22, 0, 0]])
    doc_ids = np.array([[0, 0, 0, 1, 1, -1, -1]])
    loss = np.array([[0, 1, 0, 0, 1, 0, 0]], dtype=bool)
    got, valid = targets(tokens, doc_ids, loss)
    assert got.tolist() == [[12, 0, 0, 22, 0, 0, 0]]
    assert valid.tolist() == [[True, False, False, True, False, False, False]]
    # A document's first token is never a target, even where its loss flag says so, nor is padding.
    everything = targets(tokens, doc_ids, np.ones_like(loss))[1]
    assert everything.tolist() == [[True, True, False, True, False, False, False]]


def test_shapes_types_and_what_a_step_reads():
    batches = make()
    batch = batches(3)
    assert batch.tokens_BT.shape == (4, 32) and batch.tokens_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.doc_ids_BT.dtype == torch.int64 and batch.valid_BT.dtype == torch.bool
    assert batch.row_index == (12, 13, 14, 15)
    places = [batches.mixture.locate(i) for i in batch.row_index]
    for b, (name, row) in enumerate(places):
        np.testing.assert_array_equal(batch.tokens_BT[b], batches.sources[name].tokens[row])
    assert sum(batch.sources.values()) == 4 and batch.row_sources == tuple(name for name, _ in places)
    assert sum(batch.source_tokens.values()) == int((batch.doc_ids_BT >= 0).sum())
    batches.close()


def test_every_valid_target_is_the_next_token_of_its_document():
    batches = make(prefetch=0)
    for step in range(5):
        b = batches(step)
        row, t = b.valid_BT.nonzero(as_tuple=True)
        assert len(row) and (b.targets_BT[row, t] == b.tokens_BT[row, t + 1]).all()
        assert (b.doc_ids_BT[row, t] == b.doc_ids_BT[row, t + 1]).all() and (b.doc_ids_BT[row, t] >= 0).all()
        assert not torch.isin(b.targets_BT[b.valid_BT], torch.tensor([IMAGE_START, 3, IMAGE_END])).any()
        assert (b.targets_BT[~b.valid_BT] == 0).all()


def test_resuming_equals_going_through():
    """Batch s is the same after 0 .. s-1, asked for at once, in any order, with and without the thread."""
    through = make()
    expected = [through(s) for s in range(12)]
    for order, prefetch in (([11, 3, 4, 5, 3, 0, 11], 2), ([7, 8, 9], 0), ([10, 2, 9, 1], 5)):
        other = make(prefetch)
        assert all(equal(other(s), expected[s]) for s in order)
        other.close()
    assert not torch.equal(expected[0].tokens_BT, expected[1].tokens_BT)
    # Another batch size reads the same rows in the same order.
    double = make(rows=8)
    for s in range(6):
        both = torch.cat([expected[2 * s].tokens_BT, expected[2 * s + 1].tokens_BT])
        assert torch.equal(double(s).tokens_BT, both)
    double.close()
    through.close()


def test_prefetch_prepares_ahead_and_stops_at_the_end():
    batches = make(steps=5)
    batches(0)
    ahead = dict(batches._ahead)
    assert set(ahead) == {1, 2}
    done = ahead[1].result()
    assert batches(1) is done, "the prepared batch is the one handed out"
    batches(4)
    assert not batches._ahead, "nothing beyond the last step"
    batches.close()
    batches.close()
    assert batches(0).row_index == (0, 1, 2, 3), "usable again after close"
    batches.close()


def test_an_error_in_the_thread_reaches_the_caller():
    batches = make()

    class Broken:
        def tiles(self, pictures):
            raise PunaError("picture is damaged")

    batches.processor = Broken()
    with pytest.raises(PunaError, match="damaged"):
        for step in range(20):
            batches(step)
    batches.close()


def test_tiles_follow_the_rows_and_split_with_them():
    batches = make(prefetch=0)
    step = next(s for s in range(20) if batches(s).sources.get("seen", 0) >= 2)
    batch = batches(step)
    expected = []
    for name, row in (batches.mixture.locate(i) for i in batch.row_index):
        expected += [p for p in batches.sources[name].pictures[row] for _ in range(p % 3 + 1)]
    assert batch.tiles[:, 0, 0, 0].tolist() == expected and len(expected) == sum(batch.tiles_B)
    parts = batch.split(2)
    assert torch.equal(torch.cat([p.tokens_BT for p in parts]), batch.tokens_BT)
    assert torch.equal(torch.cat([p.tiles for p in parts if p.tiles is not None]), batch.tiles)
    for part in parts:
        assert sum(part.tiles_B) == (0 if part.tiles is None else len(part.tiles))
        assert len(part.row_sources) == len(part.row_index) == 2
    with pytest.raises(ValueError, match="equal parts"):
        batch.split(3)
    assert equal(batch.to("cpu"), batch)


def test_no_pictures_no_tiles():
    packed = {"text": sources()["text"]}
    batches = Batches(packed, Mixture({"text": 1}, {"text": len(packed["text"])}), None, 4, prefetch=0)
    assert batches(0).tiles is None and batches(0).tiles_B == (0, 0, 0, 0)


def test_augmented_pictures_get_another_look_each_time():
    picture, plain, scene = EmojiPicture("1f355", "twemoji", 7), EmojiPicture("1f355", "twemoji"), Scene(3)
    assert varied(picture, 1) == EmojiPicture("1f355", "twemoji", 1) != varied(picture, 2)
    assert varied(plain, 1) is plain and varied(scene, 1) is scene, "the test form and boxes stay as they are"
    docs = [Encoded(np.array([5, 1, 3, 2, 6], np.int32), np.ones(5, bool), [picture]) for _ in range(8)]
    packed = {"seen": pack(docs, 16, 16, 0, image=(1, 2))}
    mixture = Mixture({"seen": 1}, {"seen": len(packed["seen"])})

    class Seeds:
        def tiles(self, pictures):
            return torch.tensor([p.seed % 2**20 for p in pictures], dtype=torch.float32).reshape(-1, 1, 1, 1)

    def looks(step, **more):
        return Batches(packed, mixture, Seeds(), 2, prefetch=0, **more)(step).tiles.flatten().tolist()

    assert looks(0) == looks(0) and len(set(looks(0))) == len(looks(0))
    assert looks(0) != looks(4) and looks(0) != looks(0, seed=1)
    assert set(looks(0, vary=False)) == {7.0}


def test_show():
    shown = make(prefetch=0).show(1024 // 4 * 3)
    assert "3,072 rows" in shown and "tokens" in shown


def test_errors():
    packed = sources()
    sizes = {name: len(p) for name, p in packed.items()}
    mixture = Mixture({"text": 1}, sizes)
    with pytest.raises(PunaError, match=f"fewer than one batch of {sizes['text'] + 1}"):
        Batches(packed, mixture, None, sizes["text"] + 1)
    with pytest.raises(ValueError, match="other data"):
        Batches({"seen": packed["seen"]}, mixture, None, 2)
    with pytest.raises(ValueError, match="other data"):
        Batches({"text": packed["seen"]}, mixture, None, 2)
    longer = {"text": packed["text"], "seen": sources(T=64)["seen"]}
    both = Mixture({"text": 1, "seen": 1}, {name: len(p) for name, p in longer.items()})
    with pytest.raises(ValueError, match="different lengths"):
        Batches(longer, both, None, 2)
    with pytest.raises(ValueError, match="prefetch"):
        Batches(packed, mixture, None, 2, prefetch=-1)
