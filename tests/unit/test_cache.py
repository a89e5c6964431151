"""The hybrid cache: cached decoding equals a whole forward pass, borders matter, memory is what the formula says."""

import pytest
import torch

from puna.engine import Engine
from puna.engine import cache as cache_module
from puna.engine.cache import Apart, HybridCache, bytes_all_layers, bytes_per_sequence, local_layers, page_size
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.attention import Attention
from puna.model.config import ModelConfig, VisionConfig, scout

C = 16
PATCH = 99
VISION = VisionConfig(image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_width=32, adapter_width=32)


def make_model(seed=0, **fields):
    """Four layers (the last one global), chunks of 16, and a floor scale of 8 so that the temperature is at work."""
    torch.set_num_threads(1)
    shape = dict(
        vocab_size=100, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, expert_width=32, dense_width=32,
        n_experts=4, chunk=C, floor_scale=8, max_context=128, patch_token=PATCH, vision=VISION,
    )  # fmt: skip
    model = Llama4(ModelConfig(**{**shape, **fields}), seed=seed).eval()
    with torch.no_grad():  # larger random weights: attention and routing far from uniform, so mistakes show
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)
        model.tok_embeddings.weight.mul_(5)
        # A new model's head is zero, all tokens equally likely.
        model.output.weight.normal_(0, 0.14, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def tokens_of(length, seed=1, pictures=()):
    """Random tokens [1, length]; each of `pictures` is where a tile's four patches begin."""
    tokens = torch.randint(0, PATCH, (1, length), generator=torch.Generator().manual_seed(seed))
    for at in pictures:
        tokens[0, at : at + 4] = PATCH
    return tokens


def logprobs(model, tokens, **options):
    return torch.log_softmax(model(tokens, **options), -1)


class Place:
    """A sequence: its row, its pages (always two apart, so that none are neighbours), and what is stored of it."""

    def __init__(self, row=0, pages=None):
        self.row, self.fed = row, 0
        self.pages = list(range(row * 20, row * 20 + 18, 2)) if pages is None else pages


def cache_of(model, rows=1):
    return HybridCache(model.config, rows, 200)


def step(model, cache, places, tokens_BT, counts=None, features=None):
    """One forward pass over several sequences; log-probabilities [B, T, V]."""
    counts = counts or [tokens_BT.shape[1]] * len(places)
    out = logprobs(model, tokens_BT, cache=cache.view(places, counts), features=features)
    for place, n in zip(places, counts, strict=True):
        place.fed += n
    return out


def feed(model, cache, place, tokens, features=None, first=None):
    """Feeds tokens [1, T] to one sequence, in slices cut at borders (`first`: length of the first slice); log-probs."""
    out, at, given = [], 0, 0
    while at < tokens.shape[1]:
        n = min(C - place.fed % C, tokens.shape[1] - at, first or C)
        piece = tokens[:, at : at + n]
        count = int((piece == PATCH).sum())
        mine = features[given : given + count] if count else None
        out.append(step(model, cache, [place], piece, features=mine))
        at, given, first = at + n, given + count, None
    return torch.cat(out, 1)


@pytest.mark.parametrize("length", [C - 1, C, C + 1, 2 * C, 2 * C + 1])
@pytest.mark.parametrize("pictures", [False, True], ids=["text", "pictures"])
@torch.inference_mode()
def test_cached_equals_full_forward(model, length, pictures):
    """A prompt of `length`, then decoding across the next border: every log-probability of one forward pass."""
    places = () if not pictures else (3, C - 2) if length > C + 1 else (3, C - 6)  # across a slice's end, and a border
    tokens = tokens_of(length + C + 2, pictures=places)
    tiles = torch.rand(len(places), 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1 if places else None
    features = model.image_features(tiles).flatten(0, 1) if places else None
    full = logprobs(model, tokens, tiles=tiles)
    cache, place = cache_of(model), Place()
    got = [feed(model, cache, place, tokens[:, :length], features, first=5)]
    got += [feed(model, cache, place, tokens[:, i : i + 1]) for i in range(length, tokens.shape[1])]
    torch.testing.assert_close(torch.cat(got, 1), full, atol=5e-5, rtol=0)
    if pictures:
        other = logprobs(model, tokens, tiles=-tiles)
        assert (other - full).abs().max() > 1e-2, "the pictures must matter"


@torch.inference_mode()
def test_rows_of_different_lengths_decode_together(model):
    """Rows before, at and after borders in one batch: each as if alone."""
    lengths = [3, C - 1, C, C + 1, 2 * C, 2 * C + 5]
    texts = [tokens_of(n + 4, seed=n) for n in lengths]
    cache, places = cache_of(model, len(lengths)), [Place(row) for row in range(len(lengths))]
    for place, n, text in zip(places, lengths, texts, strict=True):
        feed(model, cache, place, text[:, :n])
    for i in range(4):
        new = torch.cat([text[:, n + i : n + i + 1] for n, text in zip(lengths, texts, strict=True)])
        got = step(model, cache, places, new)
        for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
            alone = logprobs(model, text[:, : n + i + 1])[0, -1]
            torch.testing.assert_close(got[row, 0], alone, atol=5e-5, rtol=0)


@pytest.mark.parametrize("pages", [[0, 1, 2, 3], [7, 2, 9, 4], [3, 2, 1, 0], [5, 6, 1, 2]])
@torch.inference_mode()
def test_pages_may_lie_anywhere(model, pages):
    tokens = tokens_of(3 * C + 5)
    cache, place = cache_of(model), Place(0, pages)
    got = torch.cat([feed(model, cache, place, tokens[:, :-2], first=3), *(
        feed(model, cache, place, tokens[:, i : i + 1]) for i in (3 * C + 3, 3 * C + 4))], 1)  # fmt: skip
    torch.testing.assert_close(got, logprobs(model, tokens), atol=5e-5, rtol=0)


@torch.inference_mode()
def test_shared_pages_are_read_by_all_and_once(model, monkeypatch):
    """Three answers behind the same two chunks, whose pages they share: each as if alone; a page is in one product."""
    begin, ends = tokens_of(2 * C), [tokens_of(4 + i, seed=i) for i in range(3)]
    cache, first = cache_of(model, 3), Place(0, [0, 1, 2])
    feed(model, cache, first, begin)
    places = [first, Place(1, [0, 1, 3]), Place(2, [0, 1, 5])]
    for place, end in zip(places, ends, strict=True):
        place.fed = 2 * C
        feed(model, cache, place, end[:, :-1])
    read, real = [], cache_module.part
    monkeypatch.setattr(cache_module, "part", lambda q, k, *more: (read.append(len(k)), real(q, k, *more))[1])
    got = step(model, cache, places, torch.cat([end[:, -1:] for end in ends]))
    assert sum(read) == 5, "two shared pages and three of their own"
    for i, end in enumerate(ends):
        alone = logprobs(model, torch.cat([begin, end], 1))[0, -1]
        torch.testing.assert_close(got[i, 0], alone, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_a_long_past_comes_in_pieces(model, monkeypatch):
    monkeypatch.setattr(cache_module, "PIECE", 2 * C)
    tokens = tokens_of(7 * C)
    got = feed(model, cache_of(model), Place(), tokens)
    torch.testing.assert_close(got, logprobs(model, tokens), atol=5e-5, rtol=0)


@torch.inference_mode()
def test_padding_on_the_right_is_harmless(model):
    """Slices of different lengths in one pass, from the start and from different places; rows far apart."""
    a, b = tokens_of(C + 9, seed=3), tokens_of(C + 9, seed=4)
    cache, at_a, at_b = cache_of(model, 4), Place(3), Place(1)
    padded = torch.cat([a[:, :12], torch.cat([b[:, :5], torch.zeros(1, 7, dtype=torch.long)], 1)])
    step(model, cache, [at_a, at_b], padded, [12, 5])
    both = step(model, cache, [at_b, at_a], torch.cat([b[:, 5:11], torch.cat([a[:, 12:15], a[:, :3]], 1)]), [6, 3])
    full_a, full_b = logprobs(model, a), logprobs(model, b)
    torch.testing.assert_close(both[0], full_b[0, 5:11], atol=5e-5, rtol=0)
    torch.testing.assert_close(both[1, :3], full_a[0, 12:15], atol=5e-5, rtol=0)
    torch.testing.assert_close(feed(model, cache, at_b, b[:, 11:]), full_b[:, 11:], atol=5e-5, rtol=0)
    torch.testing.assert_close(feed(model, cache, at_a, a[:, 15:]), full_a[:, 15:], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_rows_move_and_swap(model):
    """Only what is alive in the chunk must move; a row that was not fed yet has no storage of its own."""
    texts = [tokens_of(n + 1, seed=n) for n in (C + 3, 5, 2 * C)]
    cache, places = cache_of(model, 8), [Place(row) for row in range(3)]
    for place, text in zip(places, texts, strict=True):
        feed(model, cache, place, text[:, :-1])
    expected = [logprobs(model, text)[0, -1] for text in texts]
    cache.swap(0, 1, 5)
    places[0].row, places[1].row = 1, 0
    cache.swap(0, 7, 5)
    places[1].row = 7
    cache.move(1, 0, 3)
    places[0].row = 0
    cache.move(2, 1, 0)
    places[2].row = 1
    for place, text, wanted in zip(places, texts, expected, strict=True):
        torch.testing.assert_close(feed(model, cache, place, text[:, -1:])[0, 0], wanted, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_what_is_stored_is_read(model):
    """Negative control: changed values change what comes, in local and in global layers; in a dead slot they don't."""
    tokens = tokens_of(C + 5)
    full = logprobs(model, tokens)[0, -1]

    def after(layer, unit, slot):
        cache, place = cache_of(model), Place()
        feed(model, cache, place, tokens[:, :-1])  # C + 4 tokens: slots 0..3 of the local layers are alive
        cache.slabs[layer].value[unit, :, slot] += 3.0
        return feed(model, cache, place, tokens[:, -1:])[0, 0]

    assert (after(0, 0, 2) - full).abs().max() > 1e-3
    assert (after(3, 0, slice(0, C)) - full).abs().max() > 1e-3, "the global layer reads beyond the chunk"
    for layer, unit, slot in ((0, 0, 9), (3, 1, 3), (3, 2, 9)):  # dead, nobody's, not yet
        torch.testing.assert_close(after(layer, unit, slot), full, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_ignoring_the_border_changes_the_answer(model):
    """Negative control: a cache that lets local layers see across the border is wrong from the first token after it."""
    tokens = tokens_of(C + 1)
    full = logprobs(model, tokens)
    blind, place = cache_of(make_model(chunk=4 * C)), Place()
    got = torch.cat([feed(model, blind, place, tokens[:, :C]), feed(model, blind, place, tokens[:, C:])], 1)
    torch.testing.assert_close(got[:, :C], full[:, :C], atol=5e-5, rtol=0)
    assert (got[:, C] - full[:, C]).abs().max() > 1e-2


@torch.inference_mode()
def test_memory(model):
    """Storage is hybrid: local layers stop at a chunk, and the formula is exact where pages are."""
    config, tokens = model.config, tokens_of(128)
    cache, place = cache_of(model), Place(0, list(range(8)))
    feed(model, cache, place, tokens)
    assert cache.nbytes == bytes_per_sequence(config, 128, torch.float32) == 2 * 2 * 8 * 4 * (3 * C + 128)
    assert bytes_all_layers(config, 128, torch.float32) == 2 * 2 * 8 * 4 * 4 * 128
    assert [slab.key.shape[0] * slab.key.shape[2] for slab in cache.slabs] == [C, C, C, 128]
    cache.shrink(0, 3)
    assert cache.nbytes == 2 * 2 * 8 * 4 * 3 * C
    cache.shrink(0, 0)
    assert cache.nbytes == 0


@torch.inference_mode()
def test_measured_memory_at_long_context():
    """100 chunks through an engine: what it holds is at most 0.26 of what all layers would hold."""
    model = make_model(max_context=4096)
    engine = Engine(model, max_batch=1, prefix_cache_bytes=0)
    engine.generate([tokens_of(100 * C)[0].tolist()], max_tokens=1)
    held = engine.cache.nbytes / bytes_all_layers(model.config, 100 * C, torch.float32)
    assert 0.25 < held <= 0.26


def test_memory_of_scout():
    """DESIGN's goal at a million tokens, and serving-and-evaluation.md B.1's table."""
    config = scout()
    assert sum(local_layers(config)) == 36
    assert bytes_all_layers(config, 10**6) == 196_608 * 10**6
    assert bytes_per_sequence(config, 10**6) == 49_152 * 10**6 + 36 * 8192 * 4096
    assert bytes_per_sequence(config, 10**6) / bytes_all_layers(config, 10**6) <= 0.26
    assert bytes_per_sequence(config, 8192) == bytes_all_layers(config, 8192), "nothing is saved within one chunk"


def test_storage_grows_by_doubling(model):
    cache, sizes = HybridCache(model.config, 8, 100), []
    for pages in (1, 3, 4, 6, 99):
        cache.reserve(1, 1, pages)
        sizes.append(len(cache.slabs[3].key))
    assert sizes == [1, 3, 6, 6, 99]
    cache.reserve(3, 1, 0)
    assert cache.slabs[0].key.shape[:3] == (3, 2, C)
    cache.reserve(4, 1, 0)
    assert len(cache.slabs[0].key) == 6


def test_pages_are_parts_of_chunks():
    shape = scout().to_dict()
    chunks = (16, 250, 256, 384, 8192)
    sizes = [page_size(ModelConfig.from_dict({**shape, "chunk": chunk})) for chunk in chunks]
    assert sizes == [16, 250, 256, 192, 256]


def test_refusals(model):
    cache, place = cache_of(model, 2), Place(0, [0, 1])
    place.fed = C - 2
    with pytest.raises(ValueError, match="straddle a border"):
        cache.view([place], [3])
    place.fed = 2 * C
    with pytest.raises(ValueError, match="do not fit in 2 pages"):
        cache.view([place], [1])
    for places, tokens in (([], []), ([place], [0]), ([place], [1, 1])):
        with pytest.raises(ValueError, match="at least one sequence"):
            cache.view(places, tokens)
    with pytest.raises(ValueError, match="2 tokens a row, not 1"):
        cache.view([Place()], [2]).positions_BT(1)
    with pytest.raises(PunaError, match="at least one row"):
        HybridCache(model.config, 0, 1)


@torch.inference_mode()
def test_wiped_storage_forgets_nan(model):
    """NaN passes through a mask; what is freed after a failure must not poison the next sequence."""
    tokens = tokens_of(5)
    cache, places = cache_of(model, 2), [Place(0), Place(1)]
    cache.reserve(2, 5, 40)
    for slab in cache.slabs:
        slab.key[0] = slab.value[0] = torch.nan
    feed(model, cache, places[1], tokens)  # makes the batch below longer than row 0's own tokens
    cache.wipe(0, places[0].pages)
    feed(model, cache, places[0], tokens[:, :1])
    got = step(model, cache, places, tokens[:, [1, 1]].T)[0, 0]
    torch.testing.assert_close(got, logprobs(model, tokens[:, :2])[0, -1], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_each_alone_is_the_same_function(model):
    """The batch-invariant view: tokens of two sequences, several of one, in rows of one token each, and empty rows."""
    a, b = tokens_of(C + 6, seed=5), tokens_of(4, seed=6)
    cache, at_a, at_b = cache_of(model, 2), Place(0), Place(1)
    feed(model, cache, at_a, a[:, : C + 2])
    feed(model, cache, at_b, b[:, :3])
    tokens = torch.cat([a[0, C + 2 :], b[0, 3:], torch.zeros(3, dtype=torch.long)])[:, None]
    places = [Place(0, at_a.pages) for _ in range(4)] + [at_b]
    for i, place in enumerate(places[:4]):
        place.fed = C + 2 + i
    got = logprobs(model, tokens, cache=Apart(cache, places, [1] * 5, 8))[:, 0]
    wanted = torch.cat([logprobs(model, a)[0, C + 2 :], logprobs(model, b)[0, 3:]])
    torch.testing.assert_close(got[:5], wanted, atol=5e-5, rtol=0)


def test_the_model_asks_the_cache_in_every_layer(model):
    assert all(isinstance(layer.attention, Attention) for layer in model.layers)
    cache, asked = cache_of(model), []
    view = cache.view([Place()], [3])
    attend = view.attend
    view.attend = lambda layer, q, k, v: (asked.append(layer), attend(layer, q, k, v))[1]
    with torch.inference_mode():
        model(tokens_of(3), cache=view)
    assert asked == [0, 1, 2, 3]
