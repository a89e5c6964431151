"""Packed rows survive the disk exactly; damage is found and named; sources are built once and from the right things."""

import errno
import json

import numpy as np
import pytest

from puna.data import files, shards, sources
from puna.data.packing import pack
from puna.data.sources import DataConfig, build, fingerprint
from puna.errors import PunaError
from puna.processor import Encoded, ImageProcessor, Processor, Tokenizer
from puna.tasks import EmojiPicture


@pytest.fixture
def rows():
    picture = EmojiPicture("1f355", "twemoji", 7)
    docs = [
        Encoded(np.arange(n, dtype=np.int32), np.arange(n) % 2 == 0, [picture] * (n % 3 == 0)) for n in range(1, 30)
    ]
    return pack(docs, 32, 16, 99)


def test_round_trip(tmp_path, rows):
    shards.save(tmp_path / "deep" / "x", rows, "abc")
    again = shards.load(tmp_path / "deep" / "x", "abc")
    for name in ("tokens", "doc_ids", "loss"):
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name))
        assert isinstance(getattr(again, name), np.memmap)
    assert again.pictures == rows.pictures and any(rows.pictures)
    assert (again.documents, again.dropped, again.padding_share) == (rows.documents, rows.dropped, rows.padding_share)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x"], "no half-written folder stays"
    assert shards.load(tmp_path / "deep" / "x", "other") is None and shards.load(tmp_path / "nothing") is None
    shards.save(tmp_path / "deep" / "x", pack([], 32, 16, 99), "new")
    assert len(shards.load(tmp_path / "deep" / "x", "new")) == 0


def test_damage_is_named(tmp_path, rows):
    folder = tmp_path / "x"

    def damaged(name, change):
        shards.save(folder, rows, "abc")
        path = folder / name
        data = change(path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(PunaError, match=name) as caught:
            shards.load(folder, "abc")
        assert "\n" not in str(caught.value) and "pack again" in str(caught.value)

    damaged("tokens.npy", lambda data: data[:-8])
    damaged("doc_ids.npy", lambda data: data[:5])
    damaged("loss.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    damaged("loss.npy", lambda data: None)
    damaged("rows.json", lambda data: data[:-20])
    damaged("rows.json", lambda data: b"[]")
    damaged("rows.json", lambda data: b"\xff\xfe")
    damaged("rows.json", lambda data: json.dumps(json.loads(data) | {"format": 9}).encode())
    damaged("tokens.npy", lambda data: (folder / "loss.npy").read_bytes())


def test_a_full_disk_leaves_the_old_data(tmp_path, rows, monkeypatch):
    shards.save(tmp_path / "x", rows, "old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_flush", full)
    with pytest.raises(PunaError, match="No space left on device; free space"):
        shards.save(tmp_path / "x", rows, "new")
    assert len(shards.load(tmp_path / "x", "old")) == len(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_pictures_need_a_recipe(tmp_path):
    docs = [Encoded(np.arange(3, dtype=np.int32), np.ones(3, bool), [object()])]
    with pytest.raises(ValueError, match="to_json"):
        shards.save(tmp_path / "x", pack(docs, 16, 16, 0), "a")


# ------------------------------------------------------------------------------------------------ sources
@pytest.fixture(scope="module")
def processor():
    tokenizer = Tokenizer.train(["the high grassland where llamas are raised, puna " * 20], 300)
    return Processor(tokenizer, ImageProcessor(tile=64, patch=8, max_tiles=4))


def decoded(processor, rows):
    """The texts of all packed documents, loss tokens in brackets' place left out: just the plain text."""
    found = []
    for r in range(len(rows)):
        for doc in range(rows.doc_ids[r].max() + 1):
            found.append(processor.tokenizer.decode(rows.tokens[r][rows.doc_ids[r] == doc]))
    return found


def test_user_files(tmp_path, processor):
    (tmp_path / "a.txt").write_text("A whole\ndocument. <|eot|>", encoding="utf-8")
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    lines = [json.dumps({"text": "line\u2028one"}, ensure_ascii=False), "", json.dumps(talk)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = f"file:{tmp_path}"
    rows = build(DataConfig(128, {name: 1.0}), processor, 64)[name]
    assert sorted(decoded(processor, rows))[:2] == ["A whole\ndocument. <|eot|>", "line\u2028one"]
    assert rows.documents == 3
    learnt = processor.tokenizer.decode(rows.tokens[rows.loss])
    assert "hello" in learnt and "hi" not in learnt.replace("whole", "")
    assert processor.tokenizer.eot in rows.tokens[rows.loss] and processor.tokenizer.bos not in rows.tokens[rows.loss]
    assert (rows.tokens == processor.tokenizer.eot).sum() == 2, "text in a file never becomes a control token"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"good\nbad \xff byte", r"a\.txt, line 2: not UTF-8 \(byte 0xff\)"),
        ("a.txt", b" \n\n", r"a\.txt is empty \(line 1\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "x"}', r'a\.jsonl, line 3: needs "text", "messages" .Open'),
        ("a.jsonl", b'{"text": ""}', r"line 1: .text. must be text"),
        ("a.jsonl", b'{"messages": []}', "line 1: .messages. must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "line 1: the last message must"),
        ("a.jsonl", b'{"messages": [{"role": "boss", "content": "x"}]}', "message 1 has the unknown role 'boss'"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": 3}]}', "line 1: message 1: content must be a"),
        ("a.jsonl", b'{"messages": [{"role": "system", "content": " "}, {"role": "assistant"}]}', "message 1 is empty"),
        ("a.pdf", b"x", "not of a known kind"),
    ],
)
def test_bad_user_files(tmp_path, processor, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PunaError, match=message):
        build(DataConfig(64, {f"file:{tmp_path / name}": 1}), processor, 64)


def test_missing_user_files(tmp_path):
    with pytest.raises(PunaError, match="does not exist"):
        files.paths(tmp_path / "nothing.txt")
    with pytest.raises(PunaError, match="holds no"):
        files.paths(tmp_path)


def test_built_once_and_kept(tmp_path, processor, monkeypatch):
    (tmp_path / "a.txt").write_text("the puna " * 50)
    name = f"file:{tmp_path / 'a.txt'}"
    config, told = DataConfig(64, {name: 1}), []
    first = build(config, processor, 64, tmp_path / "cache", lambda *args: told.append(args))[name]
    assert told[-1] == (name, 1, 1)
    packs = []
    monkeypatch.setattr(sources, "pack", lambda *args, **more: packs.append(1) or pack(*args, **more))
    again = build(config, processor, 64, tmp_path / "cache")[name]
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not packs, "the second time nothing is packed"
    key = fingerprint(name, config, processor, 64)
    assert key != fingerprint(name, DataConfig(64, {name: 1}, seed=1), processor, 64)
    assert key != fingerprint(name, config, processor, 32)
    assert key != fingerprint(name, config, Processor(processor.tokenizer), 64)
    (tmp_path / "a.txt").write_text("the puna! " * 50)
    assert key != fingerprint(name, config, processor, 64)
    build(config, processor, 64, tmp_path / "cache")
    assert packs, "changed data is packed anew"


def test_max_chars_takes_whole_documents(tmp_path):
    lines = [json.dumps({"text": f"{i:03}" + "x" * 97}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    name = f"file:{tmp_path / 'a.jsonl'}"
    some = sources.texts(name, max_chars=1000)
    assert len(some) == 10 and some == sorted(some) and all(len(text) == 100 for text in some)
    assert some != sources.texts(name, max_chars=1000, seed=1)
    assert len(sources.texts(name)) == 50


@pytest.mark.parametrize(
    "weights, options, message",
    [
        ({"text/eng": 1}, {}, "unknown data source 'text/eng'; did you mean 'text/en'"),
        ({"sft/nameing": 1}, {}, "did you mean 'sft/naming'"),
        ({"text/en": 1}, {"text/en": {"items": 3}}, "has no option 'items'; it takes max_chars"),
        ({"captions": 1}, {"captions": {"itens": 3}}, "captions' has no option 'itens'"),
        ({"captions": 1}, {"captions": {"items": 0}}, "items must be a whole number >= 1, not 0"),
        ({"text/en": 1}, {"text/fr": {}}, "options for data source 'text/fr', which has no weight"),
        ({"sft/addition": 1}, {"sft/addition": {"colour": 1}}, "no setting 'colour'"),
    ],
)
def test_wrong_names_and_options(processor, weights, options, message):
    with pytest.raises(PunaError, match=message):
        build(DataConfig(64, weights, options=options), processor, 64)


def test_task_conversations(processor):
    config = DataConfig(128, {"sft/addition": 1}, options={"sft/addition": {"items": 30}})
    rows = build(config, processor, 128)["sft/addition"]
    assert rows.documents == 30 and rows.loss_count < rows.token_count / 2
    answers = processor.tokenizer.decode(rows.tokens[rows.loss])
    assert "=" in answers and not any(c.isalpha() for c in answers), "questions are not learnt"
    other = build(DataConfig(128, {"sft/addition": 1}, 1, config.options), processor, 128)["sft/addition"]
    assert not np.array_equal(rows.tokens[: len(other)], other.tokens[: len(rows)])
    told = sources.summary({"a": rows})["a"]
    assert (told["rows"], told["documents"], told["tokens"]) == (len(rows), 30, rows.token_count)
    assert told["padding_share"] == pytest.approx(1 - told["tokens"] / (128 * len(rows)))
    with pytest.raises(PunaError, match="all 30 conversations of 'sft/addition' are longer than 16 tokens"):
        build(DataConfig(16, {"sft/addition": 1}, options=config.options), processor, 16)


def test_captions_and_naming_keep_recipes(tmp_path, processor):
    weights = {"captions": 1, "sft/naming": 1}
    options = {name: {"items": 20} for name in weights}
    built = build(DataConfig(256, weights, options=options), processor, 256, tmp_path)
    for name, rows in built.items():
        assert all(isinstance(p, EmojiPicture) and p.style != "noto" for row in rows.pictures for p in row), name
        pictures = sum(map(len, rows.pictures))
        assert pictures >= 20 and (rows.tokens == processor.tokenizer.image_start).sum() == pictures
        patches = (rows.tokens == processor.tokenizer.patch).sum()
        tiles = processor.tiles([p for row in rows.pictures for p in row])
        assert patches == len(tiles) * 16, "patch tokens and tiles agree"
        assert not rows.loss[rows.tokens == processor.tokenizer.patch].any()


def test_needle_fits_the_row(processor):
    config = DataConfig(1024, {"sft/needle": 1}, options={"sft/needle": {"items": 4}})
    rows = build(config, processor, 256)["sft/needle"]
    assert rows.dropped == 0 and rows.documents == 4


def test_nursery_is_packed_with_little_padding(processor):
    weights = {"text/en": 1, "text/th": 1, "code": 1, "long/en": 1}
    options = {name: {"max_chars": 300_000} for name in weights}
    built = build(DataConfig(512, weights, options=options), processor, 256)
    for name, rows in built.items():
        assert rows.padding_share <= 0.10, name
        assert rows.loss_count == rows.token_count - (rows.tokens == processor.tokenizer.bos).sum()
    rows = built["long/en"]
    longest = np.array([np.bincount(ids[ids >= 0]).max() for ids in rows.doc_ids])
    assert (longest > 256).mean() > 0.7, "rows are begun by documents longer than a chunk"
