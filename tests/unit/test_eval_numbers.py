"""Bits per byte and FLOPs against literal computations: one token at a time in float64, one visible key at a time."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puna.errors import PunaError
from puna.eval import bits_per_byte, bpb_evaluation, nll, unigram_bits_per_byte
from puna.model import Llama4, ModelConfig, VisionConfig, preset
from puna.plan.flops import flops_per_tile, flops_per_token, mean_keys, parameter_count

EYE = VisionConfig(image_size=16, patch_size=4, width=64, layers=2, heads=4, mlp_width=256, adapter_width=64)
TEXTS = ["The cat sat.", "Grüße, नमस्ते und 12 + 34 = 46! " * 3, "x", ""]


def tiny(vocab=600, **changes):
    settings = {
        "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "expert_width": 24,
        "dense_width": 40, "n_experts": 4, "moe_step": 2, "chunk": 8, "floor_scale": 8, "max_context": 256,
    }  # fmt: skip
    model = Llama4(ModelConfig(vocab, **settings | changes), seed=3)
    with torch.no_grad():  # a new model's head is zero: all tokens equally likely
        model.output.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return tiny().double()


def literal_bits(model, tokenizer, text, window):
    """Bits of each window of one text: a forward pass for every single token, its softmax written out."""
    ids, found = tokenizer.encode(text), []
    for start in range(0, len(ids), window - 1):
        seen, bits = [tokenizer.bos], 0.0
        for token in ids[start : start + window - 1]:
            with torch.inference_mode():
                logits = model(torch.tensor([seen]))[0, -1].tolist()
            top = max(logits)
            bits -= (logits[token] - top - math.log(math.fsum(math.exp(x - top) for x in logits))) / math.log(2)
            seen.append(token)
        found.append(bits)
    return found


@pytest.mark.parametrize("window", [2, 7, 512])
def test_bits_per_byte_is_the_literal_sum(model, tiny_processor, window):
    tokenizer = tiny_processor.tokenizer
    bits = [b for text in TEXTS for b in literal_bits(model, tokenizer, text, window)]
    size = sum(len(text.encode()) for text in TEXTS)
    for rows in (1, 3, 64):
        measured = bits_per_byte(model, tiny_processor, TEXTS, window, rows)
        assert measured.bpb == pytest.approx(math.fsum(bits) / size, rel=1e-10)
        assert measured.n_bytes == size
        assert measured.n_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
        assert measured.stderr > 0


def test_a_model_that_knows_nothing_pays_for_every_token_alike(tiny_processor):
    model = tiny()
    with torch.no_grad():
        model.output.weight.zero_()
    text = "The cat sat on the mat."
    tokens = len(tiny_processor.tokenizer.encode(text))
    expected = tokens * math.log2(600) / len(text)
    assert bits_per_byte(model, tiny_processor, [text], 64).bpb == pytest.approx(expected, rel=1e-6)


def test_the_standard_error_is_that_of_a_ratio():
    lengths_V, cut = np.array([0, 1, 2]), [[0, 2, 2], [0, 1, 1], [0, 2]]  # 4, 2 and 2 bytes
    measured = nll.ratio(np.array([8.0, 4.0, 6.0]), cut, lengths_V)
    assert measured.bpb == 18 / 8 and measured.n_bytes == 8 and measured.n_tokens == 5
    residuals = (8 - 2.25 * 4, 4 - 2.25 * 2, 6 - 2.25 * 2)
    assert measured.stderr == pytest.approx(math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 8, rel=1e-12)
    assert nll.ratio(np.array([8.0]), cut[:1], lengths_V).stderr == 0


def test_chance_is_the_add_half_unigram_by_hand():
    counts_V, lengths_V = np.array([3, 0, 1, 0]), np.array([1, 2, 3, 0])
    bits = math.log2(6 / 3.5) + math.log2(6 / 1.5) + math.log2(6 / 0.5)  # (count + 1/2) / (4 + 4/2)
    assert unigram_bits_per_byte(counts_V, [0, 2, 1], lengths_V) == pytest.approx(bits / 6, rel=1e-12)
    with pytest.raises(PunaError, match="no tokens"):
        unigram_bits_per_byte(counts_V, [], lengths_V)


def test_training_tokens_are_counted_one_by_one(tiny_processor):
    tokenizer, documents = tiny_processor.tokenizer, TEXTS * 150  # more than one group
    expected = [0] * 600
    for text in documents:
        for token in tokenizer.encode(text):
            expected[token] += 1
    assert nll.token_counts(tokenizer, documents).tolist() == expected
    few = nll.token_counts(tokenizer, documents, max_chars=9)
    assert few.sum() == len(tokenizer.encode(documents[0][:9]))


def test_text_is_cut_to_bytes_without_breaking_characters():
    assert nll.head(["abc", "déf", "g"], 5) == ["abc", "d"]  # é has two bytes, only one is left
    assert nll.head(["abc", "def"], 0) == ["abc", "def"] and nll.head(["abc", "def"], 3) == ["abc"]


def test_every_token_is_in_one_window_behind_a_begin_of_text(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    cut = nll.windows(tokenizer, TEXTS, 5)
    assert all(ids[0] == tokenizer.bos and 2 <= len(ids) <= 5 for ids in cut)
    assert [i for ids in cut for i in ids[1:]] == [i for text in TEXTS for i in tokenizer.encode(text)]
    for texts, window, match in (([""], 5, "empty"), (["a"], 1, "at least 2")):
        with pytest.raises(PunaError, match=match):
            nll.windows(tokenizer, texts, window)


def test_the_evaluation_during_training_gives_the_same_numbers(model, tiny_processor):
    texts = {"en": ["The quick brown fox jumps. " * 9], "de": ["Über sieben Brücken. " * 9, "Ende."]}
    values = bpb_evaluation(tiny_processor, texts, window=16, max_bytes=60, batch_rows=5)(model)
    assert values.keys() == {"bpb/en", "bpb/de"}
    for lang, documents in texts.items():
        alone = bits_per_byte(model, tiny_processor, nll.head(documents, 60), 16)
        assert values[f"bpb/{lang}"] == pytest.approx(alone.bpb, rel=1e-10)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "chunk"), [(1, None), (24, None), (24, 8), (27, 8), (5, 8), (8, 8)])
def test_mean_keys_counts_what_is_visible(T, chunk):  # noqa: N803
    visible = sum(1 for q in range(T) for k in range(q + 1) if chunk is None or q // chunk == k // chunk)
    assert mean_keys(T, chunk) == pytest.approx(visible / T, rel=1e-12)


def counted(run) -> float:
    """FLOPs of matrix products that `run` makes, attention's left out."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if not any(kind in str(op) for kind in ("attention", "bmm")))  # blocks too


def test_flops_of_a_token_are_those_that_torch_counts():
    """All matrix products, forward and backward, and attention by its visible pairs."""
    T, model = 24, tiny().train()
    config, count = model.config, model.parameter_count()
    tokens = torch.randint(600, (3, T), generator=torch.Generator().manual_seed(0))
    products = counted(lambda: model(tokens).sum().backward()) / tokens.numel()
    pairs = sum(
        1 for layer in range(4) for q in range(T) for k in range(q + 1) if config.is_nope(layer) or q // 8 == k // 8
    )
    attention = 3 * 4 * config.n_heads * config.head_dim * pairs / T  # scores and weighted sum, backward twice
    assert [layer for layer in range(4) if config.is_nope(layer)] == [3]
    assert flops_per_token(config, T) == pytest.approx(products + attention + 6 * count.norms, rel=1e-12)


def test_flops_of_a_tile_are_those_that_torch_counts_and_little_more():
    """The formula also counts biases and norms, the class token as a patch, and a gradient of the pixels that nobody
    asks for."""
    model = tiny(patch_token=7, vision=EYE)
    tiles = torch.rand(3, 3, 16, 16)
    products = counted(lambda: model.vision(tiles).sum().backward()) / len(tiles)
    attention = 12 * EYE.layers * EYE.width * 17**2
    sizes = {name: p.numel() for name, p in model.vision.named_parameters() if p.dim() == 1 or "patch_e" in name}
    patch = sizes.pop("patch_embedding.weight")
    sizes.pop("class_embedding")
    more = 6 * 17 * sum(sizes.values()) + (6 * 17 - 4 * 16) * patch
    assert flops_per_tile(model.config) == pytest.approx(products + attention + more, rel=1e-12)
    assert more < 0.05 * products and flops_per_tile(tiny().config) == 0


def test_parameters_are_counted_without_making_the_model():
    config = preset("nano_scout")
    assert parameter_count(config) == Llama4(config).parameter_count()
    assert parameter_count(preset("scout")).total == 108_641_793_536
