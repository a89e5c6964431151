"""`tokenizer.model`: ranks read, made into merges and written back, against tiktoken's rule taken literally."""

import base64
import dataclasses
import itertools
import random

import pytest
import regex

from puna import nursery
from puna.errors import PunaError
from puna.processor import Tokenizer
from puna.processor.ranks import merges, read_ranks, write_ranks
from puna.processor.special import FULL, SPLIT_PATTERN

SENTENCES = [text[:400] for lang in nursery.LANGUAGES for text in nursery.texts(lang, "val")[:2]]


def literal(text, ranks):
    """tiktoken's algorithm: whole words first, else the lowest rank of two neighbours, the leftmost, until none is."""
    ids = []
    for word in regex.findall(SPLIT_PATTERN, text):
        data = word.encode()
        parts = [data[i : i + 1] for i in range(len(data))]
        while data not in ranks:
            joins = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
            if not joins:
                break
            i = min(joins)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[data]] if data in ranks else [ranks[part] for part in parts]
    return ids


def vocabulary(seed):
    """All bytes in a shuffled order, then chunks of text in *any* order: harder than what training makes, with tokens
    that joining does not reach."""
    draw = random.Random(seed)
    tokens = [bytes([b]) for b in range(256)]
    draw.shuffle(tokens)
    data = " ".join(SENTENCES).encode()
    more = {data[i : i + n] for n in (2, 2, 3, 4, 5, 6, 7, 12) for i in (draw.randrange(len(data)) for _ in range(90))}
    more = sorted(more - set(tokens))
    draw.shuffle(more)
    return tokens + more


@pytest.mark.parametrize("seed", range(6))
def test_encodes_as_tiktoken_does(tmp_path, seed):
    tokens = vocabulary(seed)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    made = {a + b for a, b in merges(tokens)}
    assert 256 < 256 + len(made) < len(tokens)  # some tokens are found as whole words alone
    path = tmp_path / "tokenizer.model"
    path.write_text(write_ranks(tokens))
    tokenizer = Tokenizer.from_ranks(path)
    assert [tokenizer.token_bytes(i) for i in range(len(tokens))] == tokens
    draw = random.Random(-seed)
    letters = "".join(SENTENCES)
    words = ["".join(draw.choice(letters) for _ in range(draw.randrange(1, 12))) for _ in range(200)]
    for text in (*SENTENCES, *words, "aaaaaaa", "ababababab"):
        assert tokenizer.encode(text) == literal(text, ranks)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_all_control_tokens_follow_and_the_file_comes_back(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_text(text := write_ranks(vocabulary(0)))
    tokenizer = Tokenizer.from_ranks(path)
    base = len(vocabulary(0))
    assert tokenizer.special == {name: base + i for i, name in enumerate(FULL)}
    assert tokenizer.encode("<|eot|>") != [tokenizer.eot] and tokenizer.decode(tokenizer.encode("<|eot|>")) == "<|eot|>"
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.to_ranks() == tokenizer.to_ranks() == text
    assert all(loaded.encode(line) == tokenizer.encode(line) for line in SENTENCES)


def test_a_trained_tokenizer_says_the_same_as_ranks(tmp_path):
    """What BPE training learns obeys tiktoken's rule too, so a model of ours can go to Meta's format."""
    trained = Tokenizer.train(SENTENCES, 900 + 2048, special="full")
    path = tmp_path / "tokenizer.model"
    path.write_text(trained.to_ranks())
    again = Tokenizer.from_ranks(path)
    assert again.special == trained.special
    assert all(again.encode(text) == trained.encode(text) for text in SENTENCES)
    assert Tokenizer.train(SENTENCES, 600).to_ranks() is None  # compact: Meta's code would look elsewhere


def line(token, rank):
    return f"{base64.b64encode(token).decode()} {rank}\n"


BYTES = "".join(line(bytes([b]), b) for b in range(256))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (BYTES + "YWI\n", "line 257"), (BYTES + "!!!! 256\n", "line 257"), (BYTES + line(b"ab", 257), "rank 256"),
        (BYTES + line(b"ab", 256) + line(b"ab", 257), "twice"), (line(b"a", 0), "single bytes"), ("", "single bytes"),
        (BYTES + " 256\n", "line 257"), (BYTES + "YWI= x\n", "line 257"),
    ],
)  # fmt: skip
def test_bad_files_name_what_is_wrong(tmp_path, text, wrong):
    path = tmp_path / "tokenizer.model"
    path.write_text(text)
    with pytest.raises(PunaError, match=wrong) as error:
        read_ranks(path)
    assert str(path) in str(error.value)


def test_a_folder_of_metas_with_its_rank_file_has_a_processor(tmp_path):
    import puna
    from puna.convert.folder import write_folder
    from puna.convert.layout import ModelStore
    from puna.convert.meta import MetaFormat
    from puna.model import Llama4, ModelConfig, VisionConfig

    tokens = vocabulary(1)
    base = len(tokens)
    vision = VisionConfig(image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_width=128, adapter_width=48)
    config = ModelConfig(
        vocab_size=base + 2048, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, expert_width=16,
        dense_width=32, n_experts=2, chunk=32, patch_token=base + FULL.index("<|patch|>"), vision=vision,
    )  # fmt: skip
    folder = write_folder(ModelStore(Llama4(config)), MetaFormat(None, 1), tmp_path / "meta")
    assert puna.load(folder)[1] is None
    (folder / "tokenizer.model").write_text(write_ranks(tokens))
    model, processor = puna.load(folder)
    assert (processor.image.tile, processor.image.patch, processor.image.max_tiles) == (16, 4, 16)
    assert processor.tokenizer.patch == config.patch_token
    again = write_folder(ModelStore(model), MetaFormat(processor, 1), tmp_path / "again")
    assert (again / "tokenizer.model").read_text() == (folder / "tokenizer.model").read_text()
    (folder / "tokenizer.model").write_text(write_ranks([*tokens, b"too many"]))
    with pytest.raises(PunaError, match=f"{base + 2049} tokens, the model only {base + 2048}"):
        puna.load(folder)
    other = dataclasses.replace(config, patch_token=3)
    folder = write_folder(ModelStore(Llama4(other)), MetaFormat(None, 1), tmp_path / "other")
    (folder / "tokenizer.model").write_text(write_ranks(tokens))
    with pytest.raises(PunaError, match="patch"):
        puna.load(folder)
