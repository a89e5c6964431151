"""Byte-level BPE: the split, the control tokens' ids, and that no text ever becomes a control token."""

import json
import pickle
import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from puna import nursery
from puna.errors import PunaError
from puna.processor import StreamDecoder, Tokenizer
from puna.processor import tokenizer as module
from puna.processor.special import COMPACT, FULL

TEXTS = [
    "the cat sat on the mat and the cat ran; 2024 + 2024 = 4048, 100 1000 10000 2024 2024\n",
    "Grüße aus Köln. नमस्ते दुनिया ก ข ค. def f(x): return x\n",
]
STRINGS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(FULL[:30] + COMPACT)), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 320)


@settings(max_examples=300, deadline=None)
@given(STRINGS)
def test_any_text_round_trips_and_never_holds_a_control_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@pytest.mark.parametrize("name", COMPACT)
def test_control_strings_are_text_to_us_and_one_token_to_other_software(tokenizer, name):
    ids = tokenizer.encode(f"a{name}b")
    assert len(ids) > 3 and tokenizer.decode(ids) == f"a{name}b"
    other = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert other.encode(f"a{name}b", add_special_tokens=False).ids[1] == tokenizer.special[name]


def test_transformers_reads_the_saved_file(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(theirs) == tokenizer.vocab_size == 320
    text = "the cat, नमस्ते 2024  !"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)]  # as Llama 4's own file does
    assert {name: theirs.convert_tokens_to_ids(name) for name in COMPACT} == tokenizer.special


def test_full_layout_has_the_published_ids():
    full = Tokenizer.train(TEXTS, 300 + 2048, special="full")
    published = {
        "begin_of_text": 0, "end_of_text": 1, "fim_prefix": 2, "fim_suffix": 4, "header_start": 5, "header_end": 6,
        "eom": 7, "eot": 8, "step": 9, "text_post_train_reserved_special_token_0": 10,
        "text_post_train_reserved_special_token_5": 15, "python_start": 16, "python_end": 17, "finetune_right_pad": 18,
        "text_post_train_reserved_special_token_8": 19, "text_post_train_reserved_special_token_68": 79,
        "image_start": 80, "image_end": 81, "vision_reserved_special_token_0": 82, "tile_x_separator": 84,
        "tile_y_separator": 85, "vision_reserved_special_token_5": 89, "image": 90,
        "vision_reserved_special_token_6": 91, "patch": 92, "vision_reserved_special_token_7": 93,
        "vision_reserved_special_token_1047": 1133,
        "reasoning_reserved_special_token_0": 1134, "reasoning_reserved_special_token_7": 1141,
        "reasoning_thinking_start": 1142, "reasoning_thinking_end": 1143, "reserved_special_token_0": 1144,
        "reserved_special_token_903": 2047,
    }  # fmt: skip
    assert {name: full.special[f"<|{name}|>"] - 300 for name in published} == published
    assert "<|text_post_train_reserved_special_token_6|>" not in full.special
    assert len(set(FULL)) == 2048 and full.vocab_size == 2348


def test_compact_layout_follows_the_base_vocabulary_in_the_same_order(tokenizer):
    assert [tokenizer.special[name] for name in COMPACT] == list(range(320 - len(COMPACT), 320))
    assert list(COMPACT) == sorted(COMPACT, key=FULL.index)
    assert tokenizer.stop_ids == (tokenizer.end_of_text, tokenizer.eom, tokenizer.eot)
    names = {"bos": "begin_of_text", "pad": "finetune_right_pad", "tile_x": "tile_x_separator", "patch": "patch"}
    assert all(getattr(tokenizer, a) == tokenizer.special[f"<|{n}|>"] for a, n in names.items())


def test_every_byte_is_a_token(tokenizer):
    single = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert {bytes([b]) for b in range(256)} <= set(single)
    assert len(set(single)) == len(single)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello, world!", ["Hello", ",", " world", "!"]),
        ("1234567", ["123", "456", "7"]),
        ("I don't KNOW'S", ["I", " don't", " KNOW'S"]),
        ("    return x", ["   ", " return", " x"]),
        ("camelCase HTTPServer", ["camel", "Case", " HTTPServer"]),
        ("a\n\n  b  ", ["a", "\n\n", " ", " b", "  "]),
        ("x /* c */\n// d", ["x", " /*", " c", " */\n//", " d"]),
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        (" 12 #!\r\n", [" ", "12", " #!\r\n"]),
    ],
)
def test_split_pattern(tokenizer, text, pieces):
    inner = tokenizer._inner
    assert [text[a:b] for _, (a, b) in inner.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_single_digits_never_merge_while_grouped_ones_do():
    def joined(tokenizer):
        tokens = map(tokenizer.token_bytes, range(tokenizer.vocab_size - len(COMPACT)))
        return [token for token in tokens if sum(byte in b"0123456789" for byte in token) > 1]

    single, grouped = (Tokenizer.train(TEXTS, 320, digits=d) for d in ("single", "grouped"))
    assert joined(single) == [] and len(single.encode("2024")) == 4
    assert joined(grouped) and len(grouped.encode("2024")) < 4
    split = json.loads(single.to_json())["pre_tokenizer"]
    assert split == json.loads(grouped.to_json())["pre_tokenizer"]
    assert [p["type"] for p in split["pretokenizers"]] == ["Split", "ByteLevel"]


def test_training_is_deterministic_and_depends_on_the_text():
    assert Tokenizer.train(TEXTS, 330).to_json() == Tokenizer.train(iter(TEXTS), 330).to_json()
    assert Tokenizer.train(TEXTS, 290).to_json() != Tokenizer.train(TEXTS[1:], 290).to_json()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=30), st.booleans())
def test_stream_equals_decode_for_any_ids(tokenizer, ids, special):
    stream = StreamDecoder(tokenizer, special)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, special)


def test_stream_waits_for_whole_characters(tokenizer):
    text = "👩‍👩‍👧 नमस्ते"
    stream, pieces = StreamDecoder(tokenizer), []
    for i in tokenizer.encode(text):
        pieces.append(stream.push(i))
    assert "" in pieces and "\ufffd" not in "".join(pieces) and "".join(pieces) == text
    assert stream.flush() == ""
    stream.push(tokenizer.encode("é")[0])
    assert stream.flush() == "\ufffd" and stream.push(tokenizer.encode("a")[0]) == "a"


def test_decode_hides_control_tokens_unless_asked(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("hi"), tokenizer.eot]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, special=True) == "<|begin_of_text|>hi<|eot|>"
    for wrong in (-1, 320):
        with pytest.raises(PunaError, match="outside the vocabulary"):
            tokenizer.decode([wrong])


def test_saving_loading_and_pickling_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "deep"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.to_json() == tokenizer.to_json() and copy.special == tokenizer.special
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]  # no temporary file is left


def test_long_texts_are_encoded_in_llama_4s_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIECE", 40)
    monkeypatch.setattr(module, "MAX_RUN", 10)
    text = "a" * 25 + " " * 33 + "the cat" * 9
    pieces = list(module._pieces(text))
    assert "".join(pieces) == text and pieces[:3] == ["a" * 10, "a" * 10, "aaaaa" + " " * 10]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "", "b"]) == [tokenizer.encode(text), [], tokenizer.encode("b")]
    rand = random.Random(0)
    for _ in range(300):
        text = "".join(rand.choice("a \n") * rand.randint(1, 14) for _ in range(rand.randint(1, 12)))
        pieces = list(module._pieces(text))
        with monkeypatch.context() as literal:
            literal.setattr(module, "_may_run_long", lambda piece: True)
            assert pieces == list(module._pieces(text))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tokenizer.train(TEXTS, 320, special="none"), "special must be"),
        (lambda: Tokenizer.train(TEXTS, 320, digits="two"), "digits must be"),
        (lambda: Tokenizer.train(TEXTS, 270), "too small"),
        (lambda: Tokenizer.train(["aaaa"], 5000), "yield only"),
        (lambda: Tokenizer.train([], 320), "yield only"),
        (lambda: Tokenizer.train("one string", 320), "iterable of documents"),
        (lambda: Tokenizer.train([b"bytes"], 320), "must be a string"),
        (lambda: Tokenizer.train(["\ud800"], 320), "surrogate"),
    ],
)
def test_training_mistakes_are_told(call, message):
    with pytest.raises(PunaError, match=message):
        call()


def test_encoding_mistakes_are_told(tokenizer):
    with pytest.raises(PunaError, match="surrogate at character 2"):
        tokenizer.encode("ab\udc00")
    with pytest.raises(PunaError, match="must be a string, not NoneType"):
        tokenizer.encode_batch(["a", None])


def _damage(kind: str, spec: dict) -> str:
    if kind == "cut":
        return json.dumps(spec)[:-40]
    if kind == "type":
        spec["model"]["type"] = "WordPiece"
    elif kind == "no eot":
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|eot|>"]
    elif kind == "clash":
        spec["added_tokens"][3]["id"] = 5
    elif kind == "far id":
        spec["added_tokens"][3]["id"] = 10**9
    elif kind == "many":
        spec["added_tokens"] += [{**spec["added_tokens"][0], "id": i, "content": str(i)} for i in range(400, 10_500)]
    elif kind == "no byte":
        del spec["model"]["vocab"]["!"]
    elif kind == "list":
        return "[1, 2]"
    return json.dumps(spec)


@pytest.mark.parametrize("kind", ["cut", "type", "no eot", "clash", "far id", "many", "no byte", "list"])
def test_damaged_files_are_told_with_their_path(tokenizer, tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    path.write_text(_damage(kind, json.loads(tokenizer.to_json())))
    with pytest.raises(PunaError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_missing_and_binary_files_are_told(tmp_path):
    with pytest.raises(PunaError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nothing.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PunaError, match="not UTF-8"):
        Tokenizer.load(tmp_path)


def test_an_unwritable_place_is_told(tokenizer, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PunaError, match="cannot write"):
        tokenizer.save(tmp_path / "file" / "tokenizer.json")


def test_the_quick_encoder_gives_the_same_ids():
    """fastokens against the tokenizers library: every language, code, and strings of odd characters."""
    pytest.importorskip("fastokens")
    tokenizer = Tokenizer.train([text for lang in nursery.LANGUAGES for text in nursery.texts(lang)[:20]], 2000)
    assert tokenizer._quick is not None
    rand = random.Random(0)
    pools = [
        [chr(c) for c in range(0x20, 0x7F)], list(" \t\n\r\u00a0\u2028\u3000\u200b\x0b\x00'’"), list("0123456789"),
        list("'sStTDdLlMm"), [chr(c) for c in rand.sample(range(0xE000), 2000) if not 0xD800 <= c < 0xE000],
        [chr(c) for c in rand.sample(range(0xE000, 0x110000), 500)],
    ]  # fmt: skip
    odd = ["".join(rand.choice(rand.choice(pools)) for _ in range(rand.randint(0, 80))) for _ in range(3000)]
    texts = [*(text for lang in nursery.LANGUAGES for text in nursery.texts(lang)[-30:]), *nursery.code()[:5], *odd]
    texts += ["x" * 60_000, "<|eot|> <|image|>", " " * 30_000 + "a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
