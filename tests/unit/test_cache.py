"""The hybrid cache: cached decoding equals a whole forward pass, borders matter, memory is what the formula says."""

import pytest
import torch

from puna.engine.cache import HybridCache, bytes_all_layers, bytes_per_sequence, local_layers
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


def feed(model, cache, row, tokens, features=None, first=None):
    """Feeds tokens [1, T] to one row, in slices cut at borders (`first`: length of the first slice); log-probs."""
    out, at, given = [], 0, 0
    while at < tokens.shape[1]:
        n = min(cache.room(row), tokens.shape[1] - at, first or C)
        part = tokens[:, at : at + n]
        count = int((part == PATCH).sum())
        mine = features[given : given + count] if count else None
        out.append(logprobs(model, part, cache=cache.view([row], n), features=mine))
        cache.advance([row], [n])
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
    cache = HybridCache(model.config, 1)
    got = [feed(model, cache, 0, tokens[:, :length], features, first=5)]
    got += [feed(model, cache, 0, tokens[:, i : i + 1]) for i in range(length, tokens.shape[1])]
    torch.testing.assert_close(torch.cat(got, 1), full, atol=5e-5, rtol=0)
    if pictures:
        other = logprobs(model, tokens, tiles=-tiles)
        assert (other - full).abs().max() > 1e-2, "the pictures must matter"


@torch.inference_mode()
def test_rows_without_storage_move_and_swap(model):
    """A row that was given away but not yet fed has no storage of its own."""
    cache = HybridCache(model.config, 8)
    feed(model, cache, 0, tokens_of(5))
    cache.move(7, 1)
    assert cache.lengths[1] == 0
    kept = cache.slabs[0].key[0, :, :5].clone()
    cache.swap(0, 7)
    assert cache.lengths[0] == 0 and cache.lengths[7] == 5
    torch.testing.assert_close(cache.slabs[0].key[7, :, :5], kept)


@torch.inference_mode()
def test_rows_of_different_lengths_decode_together(model):
    """Rows before, at and after borders in one batch: each as if alone."""
    lengths = [3, C - 1, C, C + 1, 2 * C, 2 * C + 5]
    texts = [tokens_of(n + 4, seed=n) for n in lengths]
    cache = HybridCache(model.config, len(lengths))
    for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        feed(model, cache, row, text[:, :n])
    rows = list(range(len(lengths)))
    for step in range(4):
        new = torch.cat([text[:, n + step : n + step + 1] for n, text in zip(lengths, texts, strict=True)])
        got = logprobs(model, new, cache=cache.view(rows, 1))
        cache.advance(rows, [1] * len(rows))
        for row, (n, text) in enumerate(zip(lengths, texts, strict=True)):
            alone = logprobs(model, text[:, : n + step + 1])[0, -1]
            torch.testing.assert_close(got[row, 0], alone, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_padding_on_the_right_is_harmless(model):
    """Two prompts in one forward pass, the shorter padded; then rows that are no neighbours, in another order."""
    a, b = tokens_of(C + 9, seed=3), tokens_of(C + 9, seed=4)
    cache = HybridCache(model.config, 4)
    padded = torch.cat([a[:, :12], torch.cat([b[:, :5], torch.zeros(1, 7, dtype=torch.long)], 1)])
    logprobs(model, padded, cache=cache.view([3, 1], 12))
    cache.advance([3, 1], [12, 5])
    rest_b = feed(model, cache, 1, b[:, 5:])
    rest_a = feed(model, cache, 3, a[:, 12:])
    torch.testing.assert_close(rest_a, logprobs(model, a)[:, 12:], atol=5e-5, rtol=0)
    torch.testing.assert_close(rest_b, logprobs(model, b)[:, 5:], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_rows_move_and_swap(model):
    texts = [tokens_of(n + 1, seed=n) for n in (C + 3, 5, 2 * C)]
    cache = HybridCache(model.config, 3)
    for row, text in enumerate(texts):
        feed(model, cache, row, text[:, :-1])
    expected = [logprobs(model, text)[0, -1] for text in texts]
    cache.swap(0, 1)
    torch.testing.assert_close(feed(model, cache, 0, texts[1][:, -1:])[0, 0], expected[1], atol=5e-5, rtol=0)
    cache.free(0)
    cache.move(2, 0)
    assert cache.lengths == [2 * C, C + 3, 0]
    torch.testing.assert_close(feed(model, cache, 0, texts[2][:, -1:])[0, 0], expected[2], atol=5e-5, rtol=0)
    torch.testing.assert_close(feed(model, cache, 1, texts[0][:, -1:])[0, 0], expected[0], atol=5e-5, rtol=0)


@torch.inference_mode()
def test_what_is_stored_is_read(model):
    """Negative control: changed values change what comes, in local and in global layers; in a dead slot they don't."""
    tokens = tokens_of(C + 5)
    full = logprobs(model, tokens)[0, -1]

    def after(change):
        cache = HybridCache(model.config, 1)
        feed(model, cache, 0, tokens[:, :-1])  # C + 4 tokens: slots 0..3 of the local layers are alive
        change(cache)
        return feed(model, cache, 0, tokens[:, -1:])[0, 0]

    def add(layer, slot):
        return lambda cache: cache.slabs[layer].value[0, :, slot].add_(3.0)

    assert (after(add(0, 2)) - full).abs().max() > 1e-3
    assert (after(add(3, slice(0, C))) - full).abs().max() > 1e-3, "the global layer reads beyond the chunk"
    torch.testing.assert_close(after(add(0, 9)), full, atol=5e-5, rtol=0)


@torch.inference_mode()
def test_ignoring_the_border_changes_the_answer(model):
    """Negative control: a cache that lets local layers see across the border is wrong from the first token after it."""
    tokens = tokens_of(C + 1)
    full = logprobs(model, tokens)
    blind = HybridCache(make_model(chunk=4 * C).config, 1)
    got = torch.cat([feed(model, blind, 0, tokens[:, :C]), feed(model, blind, 0, tokens[:, C:])], 1)
    torch.testing.assert_close(got[:, :C], full[:, :C], atol=5e-5, rtol=0)
    assert (got[:, C] - full[:, C]).abs().max() > 1e-2


@torch.inference_mode()
def test_memory(model):
    """Storage is hybrid: local layers stop at a chunk, and the formula is exact for a full slab."""
    config = model.config
    cache = HybridCache(config, 1)
    feed(model, cache, 0, tokens_of(128))
    assert cache.nbytes == bytes_per_sequence(config, 128, torch.float32) == 2 * 2 * 8 * 4 * (3 * C + 128)
    assert bytes_all_layers(config, 128, torch.float32) == 2 * 2 * 8 * 4 * 4 * 128
    assert [slab.key.shape[2] for slab in cache.slabs] == [C, C, C, 128]
    cache.release()
    assert cache.nbytes == 0 and cache.lengths == [0]


def test_memory_of_scout():
    """DESIGN's goal at a million tokens, and serving-and-evaluation.md B.1's table."""
    config = scout()
    assert sum(local_layers(config)) == 36
    assert bytes_all_layers(config, 10**6) == 196_608 * 10**6
    assert bytes_per_sequence(config, 10**6) == 49_152 * 10**6 + 36 * 8192 * 4096
    assert bytes_per_sequence(config, 10**6) / bytes_all_layers(config, 10**6) <= 0.26
    assert bytes_per_sequence(config, 8192) == bytes_all_layers(config, 8192), "nothing is saved within one chunk"


def test_storage_grows_by_doubling(model):
    cache = HybridCache(model.config, 8, max_context=100)
    sizes = []
    for length in (1, 64, 65, 100):
        cache.reserve(1, length)
        sizes.append(cache.slabs[3].key.shape[2])
    assert sizes == [64, 64, 100, 100]
    cache.reserve(3, 1)
    assert cache.slabs[0].key.shape[0] == 3
    cache.reserve(4, 1)
    assert cache.slabs[0].key.shape[:3] == (6, 2, C)


def test_refusals(model):
    cache = HybridCache(model.config, 2, max_context=C + 4)
    cache.advance([0], [C - 2])
    assert cache.room(0) == 2
    with pytest.raises(ValueError, match="straddles a border"):
        cache.view([0], 3)
    cache.advance([0], [2])
    with pytest.raises(PunaError, match="do not fit in the context"):
        cache.view([0], 5)
    with pytest.raises(ValueError, match="at least one row"):
        cache.view([], 1)
    with pytest.raises(ValueError, match="2 tokens a row, not 1"):
        cache.view([1], 2).positions_BT(1)
    with pytest.raises(PunaError, match="at least one row"):
        HybridCache(model.config, 0)


@torch.inference_mode()
def test_a_wiped_row_forgets_nan(model):
    """NaN passes through a mask; a row freed after a failure must not poison the next sequence."""
    tokens = tokens_of(5)
    cache = HybridCache(model.config, 2)
    cache.reserve(2, 5)
    for slab in cache.slabs:
        slab.key[0] = slab.value[0] = torch.nan
    feed(model, cache, 1, tokens)  # makes the batch below longer than row 0's own tokens
    cache.free(0, wipe=True)
    feed(model, cache, 0, tokens[:, :1])
    got = logprobs(model, tokens[:, [1, 1]].T, cache=cache.view([0, 1], 1))[0, 0]
    torch.testing.assert_close(got, logprobs(model, tokens[:, :2])[0, -1], atol=5e-5, rtol=0)


def test_the_model_asks_the_cache_in_every_layer(model):
    assert all(isinstance(layer.attention, Attention) for layer in model.layers)
    cache, asked = HybridCache(model.config, 1), []
    view = cache.view([0], 3)
    extend = view.extend
    view.extend = lambda layer, k, v: (asked.append(layer), extend(layer, k, v))[1]
    with torch.inference_mode():
        model(tokens_of(3), cache=view)
    assert asked == [0, 1, 2, 3]
