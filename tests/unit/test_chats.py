"""A user's chat data: both shapes, pictures by path and data URL, and every mistake with its row's number."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from puna.cli.main import main
from puna.data import Batches, DataConfig, build, files
from puna.errors import PunaError
from puna.processor import Processor

ANSWER = {"role": "assistant", "content": "A red square."}


def png(colour="red", size=(20, 12)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def asked(*content) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(png())
    return tmp_path


def test_both_shapes_are_the_same_conversation(folder, tiny_processor):
    """A picture by path, as a data URL and under ShareGPT's mark: the same tokens, the same loss, the same pixels."""
    text, said = {"type": "text", "text": "What is it?"}, {"from": "gpt", "value": ANSWER["content"]}
    rows = [
        asked({"type": "image_url", "image_url": {"url": "pictures/red.png"}}, text),
        asked({"type": "image_url", "image_url": {"url": url(png())}}, text),
        asked({"type": "image", "path": str(folder / "pictures" / "red.png")}, text),
        {"conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, said],
         "images": ["pictures/red.png"]},
        {"conversations": [{"from": "human", "value": "<image>What is it?"}, said],
         "image": url(png())},
    ]  # fmt: skip
    chats = list(files.documents(write(folder / "a.jsonl", *rows)))
    encoded = [tiny_processor.encode_chat(chat.messages) for chat in chats]
    by_hand = tiny_processor.encode_chat(
        [{"role": "user", "content": [{"type": "image", "image": Image.open(io.BytesIO(png()))}, text]}, ANSWER]
    )
    learnt = tiny_processor.tokenizer.decode(by_hand.tokens[by_hand.loss].tolist())
    assert "A red square." in learnt and "What" not in learnt
    for one in encoded:
        np.testing.assert_array_equal(one.tokens, by_hand.tokens)
        np.testing.assert_array_equal(one.loss, by_hand.loss)
        assert np.array_equal(np.asarray(one.pictures[0].open()), np.asarray(by_hand.pictures[0]))
    assert [chat.where.rsplit(", ")[-1] for chat in chats] == [f"line {n}" for n in range(1, 6)]


def test_roles_of_both_shapes(folder):
    turns = [("human", "2 + 2?"), ("gpt", "[add(2, 2)]"), ("observation", "4"), ("gpt", "It is 4.")]
    sharegpt = {"system": "Be short.", "conversations": [{"from": a, "value": b} for a, b in turns]}
    roles = ("developer", "user", "assistant", "tool", "assistant")
    texts = ("Be short.", *(text for _, text in turns))
    openai = {"messages": [{"role": a, "content": b} for a, b in zip(roles, texts, strict=True)], "tools": []}
    one, two = files.documents(write(folder / "a.jsonl", sharegpt, openai))
    assert one.messages == two.messages
    assert [m["role"] for m in one.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_several_pictures_of_a_row_stay_in_order(folder, tiny_processor):
    """Also when they are read again, one by one, from packed rows on the disk."""
    colours = ("red", "green", "blue")
    row = {"conversations": [{"from": "human", "value": "one <image> two <image>"}, {"from": "gpt", "value": "yes"},
                             {"from": "human", "value": "<image>three"}, {"from": "gpt", "value": "no"}],
           "images": [url(png(colour)) for colour in colours]}  # fmt: skip
    first = {"messages": [{"role": "user", "content": "Grüße \u2028 zuerst"}, {"role": "assistant", "content": "ja"}]}
    name = f"file:{write(folder / 'a.jsonl', first, '', row)}"
    config = DataConfig(128, {name: 1})
    for _ in range(2):  # packed, then loaded
        rows = build(config, tiny_processor, 128, folder / "cache")[name]
        (pictures,) = [row for row in rows.pictures if row]
        assert [picture.open().getpixel((0, 0)) for picture in pictures] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert "iVBOR" not in "".join(p.read_text() for p in (folder / "cache").rglob("rows.json"))
    mixture = config.mixture({name: len(rows)}, 1, len(rows))
    batch = Batches({name: rows}, mixture, tiny_processor, len(rows), prefetch=0)(0)
    assert len(batch.tiles) == sum(tiny_processor.image.plan(*picture.size).tiles for picture in pictures)
    write(folder / "a.jsonl", "{}")
    with pytest.raises(PunaError, match="a.jsonl"):
        pictures[1].open()


WRONG = [
    ('{"messages": [', "not JSON"),
    ("[1]", 'needs "text", "messages"'),
    ({"messages": [ANSWER], "conversations": []}, "one of them only"),
    ({"messages": []}, "must be a list of messages, and not empty"),
    ({"messages": ["hi"]}, "message 1 must be an object"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "last message must be the assistant's"),
    ({"messages": [{"role": ["x"], "content": "hi"}, ANSWER]}, "unknown role"),
    ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "message 1 is empty"),
    ({"messages": [{"role": "user"}, ANSWER]}, "content must be a string or a list"),
    ({"messages": [ANSWER], "tools": {"type": "function"}}, "'tools' must be a list"),
    ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "[{"}, "tools: not JSON"),
    ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "turn 1: not JSON"),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": "x"}, ANSWER]}, "the first one"),
    (asked({"type": "audio", "audio": "x"}), "unknown content part 'audio'"),
    (asked({"type": "image_url", "image_url": {"url": "none.png"}}), "picture 1: no picture file"),
    (asked({"type": "image_url", "image_url": {"url": "a.jsonl"}}), "picture 1: the picture is not a PNG"),
    (asked({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}), "not fetched"),
    (asked({"type": "image_url", "image_url": {"url": url(png()[:-30])}}), "damaged or truncated"),
    (asked({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}), "base64 is damaged"),
    (asked({"type": "image_url"}), "must be a path or a data URL"),
    ({"messages": [ANSWER | {"content": [{"type": "image", "image": "pictures/red.png"}]}]}, "user messages"),
    ({"conversations": [{"from": "cat", "value": "miau"}]}, "turn 1 is from the unknown 'cat'"),
    ({"conversations": [{"from": "gpt", "value": 3}]}, "turn 1: 'value' must be text"),
    ({"conversations": [{"from": "gpt", "value": "x"}], "images": ["pictures/red.png"]}, "no <image> mark"),
    ({"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "x"}],
      "images": ["pictures/red.png"]}, "more <image> marks than pictures"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what"), WRONG, ids=[what for _, what in WRONG])
def test_a_wrong_row_says_which_and_why(folder, tiny_processor, row, what):
    """Between good rows, at its own number; nothing is packed."""
    good = asked({"type": "text", "text": "hi"})
    name = f"file:{write(folder / 'a.jsonl', good, '', row, good)}"
    with pytest.raises(PunaError) as caught:
        build(DataConfig(128, {name: 1}), tiny_processor, 128, folder / "cache")
    message = str(caught.value)
    assert message.count("a.jsonl, line ") == 1 and "a.jsonl, line 3: " in message and what in message
    assert "\n" not in message
    assert not (folder / "cache").exists()


def test_all_bad_rows_are_counted_and_the_first_shown(folder, tiny_processor):
    rows = [row for row, _ in WRONG for _ in range(3)]
    path = write(folder / "a.jsonl", *rows)
    with pytest.raises(PunaError) as caught:
        build(DataConfig(128, {f"file:{path}": 1}), tiny_processor, 128)
    message = str(caught.value)
    assert message.count("a.jsonl, line ") == 5 and message.endswith(f"and {len(rows) - 5} more rows")


def test_tools_of_both_shapes(folder, tiny_processor):
    """Offered, called and answered: the same conversation."""
    offered = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": call}]}, {"role": "tool", "content": "4"}, ANSWER]  # fmt: skip
    turns = [("human", "2 + 2?"), ("function_call", json.dumps(call)), ("observation", "4"), ("gpt", ANSWER["content"])]
    rows = [{"messages": said, "tools": [{"type": "function", "function": offered}]},
            {"conversations": [{"from": a, "value": b} for a, b in turns], "tools": json.dumps([offered])}]  # fmt: skip
    path = write(folder / "a.jsonl", *rows)
    one, two = files.documents(path)
    assert (one.messages, one.tools) == (two.messages, two.tools) and one.tools[0]["function"] == offered
    config = DataConfig(512, {f"file:{path}": 1})
    rows = build(config, tiny_processor, 512)[f"file:{path}"]
    learnt = tiny_processor.tokenizer.decode(rows.tokens[rows.loss].tolist())
    assert "add(a=2, b=2)" in learnt and ANSWER["content"] in learnt and "Adds." not in learnt
    assert "Adds." in tiny_processor.tokenizer.decode(rows.tokens[rows.doc_ids >= 0].tolist())


def test_pictures_need_a_model_that_sees(folder, tiny_processor):
    path = write(folder / "a.jsonl", asked({"type": "image", "image": "pictures/red.png"}))
    with pytest.raises(PunaError, match="line 1: this model reads text only"):
        build(DataConfig(128, {f"file:{path}": 1}), Processor(tiny_processor.tokenizer), 128)


def test_a_conversation_longer_than_a_row_is_left_out_and_counted(folder, tiny_processor):
    long = {"messages": [{"role": "user", "content": "word " * 300}, ANSWER]}
    short = {"messages": [{"role": "user", "content": "hi"}, ANSWER]}
    path = write(folder / "a.jsonl", long, short, {"text": "text " * 300})
    rows = build(DataConfig(128, {f"file:{path}": 1}), tiny_processor, 128)[f"file:{path}"]
    assert (rows.documents, rows.dropped) == (2, 1) and len(rows) > 2, "texts are cut, conversations are not"


def test_data_show_tells_texts_from_conversations(folder, capsys):
    path = write(folder / "a.jsonl", asked({"type": "text", "text": "What grazes here?"}), {"text": "A hill."})
    assert main(["data", "show", f"file:{path}"]) == 0
    out = capsys.readouterr().out
    assert "1 texts, 1 conversations" in out and "user: What grazes here?" in out and "A hill." in out
