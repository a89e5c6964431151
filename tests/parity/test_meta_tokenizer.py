"""Meta's own `tokenizer.model`: the ids and dialogs of llama4-facts.md §4, and tiktoken as the oracle.

The file is under the Llama 4 Community License and no part of this repository. It is found through PUNA_META_TOKENIZER
(its path), or in the package `llama-models` (`pip install --no-deps llama-models==0.3.0`); without it this file is
skipped. Only public vectors are written here, nothing of the file's content.
"""

import dataclasses
import hashlib
import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch
from parity_helpers import SCOUT, strong_model
from PIL import Image

import puna
from puna import nursery
from puna.convert import export_hf
from puna.convert.folder import write_folder
from puna.convert.layout import ModelStore
from puna.convert.meta import MetaFormat
from puna.errors import PunaError
from puna.processor import ImageProcessor, Processor, Tokenizer
from puna.processor.ranks import read_ranks
from puna.processor.special import FULL, SPLIT_PATTERN


def find():
    given = os.environ.get("PUNA_META_TOKENIZER")
    if given:
        return Path(given)
    spec = importlib.util.find_spec("llama_models")
    return Path(spec.submodule_search_locations[0]) / "llama4" / "tokenizer.model" if spec else None


FILE = find()
SHA256 = "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        FILE is None or not FILE.is_file(),
        reason="needs Meta's tokenizer.model: set PUNA_META_TOKENIZER or pip install --no-deps llama-models==0.3.0",
    ),
]
VECTORS = {
    "Hello, world!": [19873, 24, 3817, 13],
    "The quick brown fox jumps over the lazy dog.": [954, 7202, 27756, 92637, 67072, 1278, 290, 37463, 10877, 26],
    "1234567": [7235, 19596, 35],
    "I don't know": [53, 5863, 2609],
    "    return x": [277, 677, 831],
    "\n\n": [368],
    "user": [1556], "assistant": [140680], "system": [15651], "ipython": [607, 6934], "hi": [5703],
    "\U0001f600": [80883, 222],
}  # fmt: skip
BOS, HEAD, END, EOM, EOT = 200000, 200005, 200006, 200007, 200008


@pytest.fixture(scope="module")
def tokenizer():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256, f"{FILE} is not Llama 4's tokenizer.model"
    return Tokenizer.from_ranks(FILE)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Processor(tokenizer, ImageProcessor())


def test_golden_ids(tokenizer):
    assert {text: tokenizer.encode(text) for text in VECTORS} == VECTORS
    assert {text: tokenizer.decode(ids) for text, ids in VECTORS.items()} == {text: text for text in VECTORS}
    assert tokenizer.vocab_size == 202048
    assert tokenizer.special == {name: 200000 + i for i, name in enumerate(FULL)}
    assert (tokenizer.pad, tokenizer.patch, tokenizer.stop_ids) == (200018, 200092, (200001, EOM, EOT))
    assert max(len(tokenizer.token_bytes(i)) for i in range(200000)) == 113  # §4.1


def test_golden_dialogs(processor):
    """§4.1's dialog; then, from §4's ids, a tool's turn: its call ends in eom, its result stands under ipython."""
    hi = [{"role": "user", "content": "hi"}]
    asked = [BOS, HEAD, 1556, END, 368, 5703, EOT]
    answer = [HEAD, 140680, END, 368]
    assert processor.encode_chat(hi, generation_prompt=True).tokens.tolist() == asked + answer
    called = [*hi, {"role": "assistant", "content": "hi"}, {"role": "tool", "content": "1234567"}]
    assert processor.encode_chat(called, generation_prompt=True).tokens.tolist() == [
        *asked, *answer, 5703, EOM, HEAD, 607, 6934, END, 368, 7235, 19596, 35, EOT, *answer,
    ]  # fmt: skip


def test_a_picture_in_metas_ids(processor):
    """§3.4: 336 x 336 is 147 tokens, 640 x 480 is 727."""
    for size, count in (((336, 336), 147), ((640, 480), 727)):
        tokens = processor.encode_document([Image.new("RGB", size)]).tokens.tolist()[1:-1]
        assert len(tokens) == count and (tokens[0], tokens[-1]) == (200080, 200081)
        assert tokens.count(200092) == 144 * (1 if count == 147 else 5) and tokens[-146] == 200090


def test_control_strings_are_text_with_this_tokenizer_too(tokenizer):
    controls = set(tokenizer.special.values())
    for name in FULL:
        ids = tokenizer.encode(f"a{name} b")
        assert not controls & set(ids) and tokenizer.decode(ids) == f"a{name} b"


def test_equal_to_tiktoken(tokenizer):
    """The rank file and our own split pattern, given to tiktoken: the nursery's held-out text in every language and
    code, and 5,000 strings of random characters."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken as the oracle: pip install tiktoken")
    ranks = {token: rank for rank, token in enumerate(read_ranks(FILE))}
    theirs = tiktoken.Encoding("llama4", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    documents = [d for lang in nursery.LANGUAGES for d in nursery.texts(lang, "val")] + list(nursery.code("val"))
    pieces = [text[i : i + 500] for text in documents for i in range(0, len(text), 500)]
    draw = random.Random(0)
    blocks = [(9, 14), (32, 127), (0, 0x300), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1E00, 0x2100),
              (0x3040, 0x3100), (0x1F300, 0x1F700)]  # fmt: skip
    for _ in range(5000):
        near = [draw.choice(blocks), (32, 127), (9, 14)]
        pieces.append("".join(chr(draw.randrange(*draw.choice(near))) for _ in range(draw.randrange(1, 30))))
    assert len(pieces) > 5300
    ours = tokenizer.encode_batch(pieces)
    assert [p for p, ids in zip(pieces, ours, strict=True) if ids != theirs.encode_ordinary(p)] == []


def test_transformers_own_conversion_gives_the_same_ids(tokenizer, tmp_path):
    """What Hugging Face's converter makes of the rank file, as an independent reading of it."""
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    pytest.importorskip("tiktoken", reason="transformers reads rank files through tiktoken")
    theirs = slow.TikTokenConverter(
        vocab_file=str(FILE), pattern=SPLIT_PATTERN, extra_special_tokens=list(FULL)
    ).converted()
    for text in (*VECTORS, *(text[:2000] for lang in nursery.LANGUAGES for text in nursery.texts(lang, "val")[:2])):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_a_folder_of_metas_loads_with_its_processor_and_goes_to_hugging_face_and_back(tokenizer, processor, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(
        SCOUT, vocab_size=202048, patch_token=200092, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, n_layers=2,
        expert_width=16, nope_layers=None, moe_layers=None, rope_scaling=None,
    )  # fmt: skip
    meta = write_folder(ModelStore(strong_model(config)), MetaFormat(None, 2), tmp_path / "meta")
    assert puna.load(meta)[1] is None
    (meta / "tokenizer.model").write_bytes(FILE.read_bytes())
    model, found = puna.load(meta)
    assert found.image == ImageProcessor(tile=16, patch=4) and found.tokenizer.special == tokenizer.special
    dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (20, 30))},
                                     {"type": "text", "text": "What is <|eot|>?"}]},
    ]  # fmt: skip
    ids = found.encode_chat(dialog, generation_prompt=True).tokens.tolist()

    hf = export_hf(model, found, tmp_path / "hf")
    again, back = puna.load(hf)
    assert back.encode_chat(dialog, generation_prompt=True).tokens.tolist() == ids and back.image == found.image
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    assert (
        len(theirs) == 202048 and theirs.encode("Hello, world!", add_special_tokens=False) == VECTORS["Hello, world!"]
    )
    simple = [{"role": "user", "content": "hi"}]
    chat = theirs.apply_chat_template(simple, add_generation_prompt=True, return_dict=False)
    assert chat == found.encode_chat(simple, generation_prompt=True).tokens.tolist()

    home = write_folder(ModelStore(again), MetaFormat(back, 2), tmp_path / "home")
    assert [line.split() for line in (home / "tokenizer.model").read_text().splitlines()] == [
        line.split() for line in FILE.read_text().splitlines()
    ]
    (meta / "params.json").write_text((meta / "params.json").read_text().replace("200092", "200091"))
    with pytest.raises(PunaError, match="patch"):
        puna.load(meta)
