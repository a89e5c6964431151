"""Cases 35 to 67 of serving-and-evaluation.md F.4: messages, tools and pictures. Each with the status it must get; the
server is well after it."""

import base64
import json
import struct
import zlib

import pytest
from PIL import Image
from server_fakes import PATH, ask, case, data_url, refused, show
from starlette.testclient import TestClient

pytestmark = pytest.mark.usefixtures("still_well")
URL = "messages[0].content[0].image_url.url"


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "messages, param",
    [
        case(35, "none", [], "messages"), case(36, "string", "hello", "messages"), case(36, "object", {}, "messages"),
        case(36, "null", None, "messages"), case(36, "numbers", [1], "messages[0]"),
        case(36, "nulls", [None], "messages[0]"),
        case(37, "system-only", [{"role": "system", "content": "a"}], "messages[0].role"),
        case(37, "assistant-only", [{"role": "assistant", "content": "a"}], "messages[0].role"),
        case(38, "developer", [{"role": "developer", "content": "a"}], "messages[0]"),
        case(38, "number", [{"role": 3, "content": "a"}], "messages[0]"),
        case(38, "list", [{"role": ["user"], "content": "a"}], "messages[0]"),
        case(38, "none", [{"content": "a"}], "messages[0]"), case(38, "empty", [{}], "messages[0]"),
        case(39, "null", [user(None)], "messages[0].content"), case(39, "number", [user(5)], "messages[0].content"),
        case(39, "object", [user({})], "messages[0].content"),
        case(39, "missing", [{"role": "user"}], "messages[0].content"),
        case(40, "string", [user(["a"])], "messages[0].content[0]"),
        case(40, "audio", [user([{"type": "input_audio"}])], "messages[0].content[0]"),
        case(40, "no-text", [user([{"type": "text"}])], "messages[0].content[0].text"),
        case(40, "no-type", [user([{"text": "a"}])], "messages[0].content[0]"),
        case(40, "text-number", [user([{"type": "text", "text": 1}])], "messages[0].content[0].text"),
        case(40, "url-string", [user([{"type": "image_url", "image_url": "x"}])], "messages[0].content[0].image_url"),
        case(40, "no-url", [user([{"type": "image_url"}])], "messages[0].content[0].image_url"),
        case(41, "late", [user("a"), {"role": "system", "content": "b"}, user("c")], "messages[1].role"),
        case(41, "two", [*[{"role": "system", "content": "a"}] * 2, user("c")], "messages[1].role"),
        case(42, "many", [user("a")] * 100_000, "messages"),
        case(43, "10-MB", [user("a" * 10_000_000)], "messages[0].content"),
        case(44, "blank", [user(" \n\t ")], "messages[0].content"),
        case(44, "empty", [user("")], "messages[0].content"),
        case(44, "no-parts", [user([])], "messages[0].content"),
        case(48, "prefill", [user("a"), {"role": "assistant", "content": "b"}], "messages[1].role"),
        case(49, "no-id", [{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        case(49, "no-call", [user("a"), {"role": "tool", "content": "x", "tool_call_id": "1"}],
             "messages[1].tool_call_id"),
        case(49, "bare", [{"role": "tool"}], "messages[0].content"),
    ],
)  # fmt: skip
def test_messages(client, messages, param):
    refused(client.post(PATH, json={"messages": messages}), 400, param)


# ---------------------------------------------------------------- special tokens in what people write
def conversations(text):
    """`text` in every place that somebody outside writes."""
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": json.dumps({"q": text})}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {
        "user": {"messages": [user(text)]},
        "part": {"messages": [user([{"type": "text", "text": text}])]},
        "system": {"messages": [{"role": "system", "content": text}, user("b")]},
        "assistant": {"messages": [user("a"), {"role": "assistant", "content": text}, user("b")]},
        "tool": {"messages": [user("a"), said, {"role": "tool", "tool_call_id": "1", "content": text}]},
        "beside-picture": {"messages": [user([{"type": "image_url", "image_url": {"url": data_url()}},
                                              {"type": "text", "text": text}])]},
        "description": {"messages": [user("a")], "tools": [
            {"type": "function", "function": {"name": "find", "description": text, "parameters": {"title": "a"}}}
        ]},
    }  # fmt: skip


@pytest.mark.usefixtures("real_still_well")
@pytest.mark.parametrize("place", [case(45, place, place) for place in conversations("")])
def test_text_never_becomes_a_control_token(real, place):
    """The injection suite: with every special string of the vocabulary in it, a conversation has the same control
    tokens in the same order as with a letter in its place, and the strings are all there as text."""
    tokenizer = real.engine.engine.processor.tokenizer
    control = set(tokenizer.special.values())
    specials = "".join(tokenizer.special)

    def tokens(text):
        response = real.post("/tokenize", json=conversations(text)[place])
        assert response.status_code == 200, response.text
        return response.json()["tokens"]

    plain, hostile = tokens("a"), tokens(specials)
    assert [t for t in hostile if t in control] == [t for t in plain if t in control]
    text = tokenizer.decode(hostile, special=True)
    assert specials in text or json.dumps(specials)[1:-1] in text
    for each in tokenizer.special:  # alone, too: no neighbour may make the difference
        assert [t for t in tokens(each) if t in control] == [t for t in plain if t in control], each


@pytest.mark.usefixtures("real_still_well")
def test_45_plain_prompts_hold_no_control_tokens_either(real):
    tokenizer = real.engine.engine.processor.tokenizer
    specials = "".join(tokenizer.special)
    tokens = real.post("/tokenize", json={"prompt": specials}).json()["tokens"]
    assert tokens[0] == tokenizer.bos and not set(tokens[1:]) & set(tokenizer.special.values())
    assert tokenizer.decode(tokens[1:]) == specials


@pytest.mark.parametrize("name", [case(45, "name", "<|eot|>"), case(45, "space", "a b")])
def test_names_of_functions(client, name):
    tools = [{"type": "function", "function": {"name": name}}]
    refused(client.post(PATH, json=ask(tools=tools)), 400, "tools")


@pytest.mark.usefixtures("real_still_well")
@pytest.mark.parametrize("pictures", [case(46, f"{n}-pictures", n) for n in (0, 1, 2)])
def test_picture_tokens_in_text_are_text(real, pictures):
    """`<|image|><|patch|>` typed by a user takes no picture's place and counts as none."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(size=(16, 16))}}] * pictures
    counts = []
    for text in ("x", "<|image|><|patch|><|image_start|>"):
        body = ask([*parts, {"type": "text", "text": text}], max_tokens=1)
        assert real.post(PATH, json=body).status_code == 200
        tokens = real.post("/tokenize", json={"messages": body["messages"]}).json()["tokens"]
        counts.append(tokens.count(real.engine.engine.processor.tokenizer.patch))
    assert counts == [4 * pictures] * 2


EMOJI = "‮RTL \u200bzero 👩‍👩‍👧‍👦🏳️‍🌈é नि"


@pytest.mark.parametrize("size", [case(47, f"{n}-characters", n) for n in (1, 2, 3, 7)])
def test_streams_are_whole_characters(client, engine, size):
    """Any cut of the text gives valid UTF-8 in every event, and together the text; the prompt's passes unchanged."""
    engine.script, engine.size = (lambda m: EMOJI * 3), size
    with client.stream("POST", PATH, json=ask(EMOJI, stream=True)) as response:
        lines = [line.decode("utf-8") for line in b"".join(response.iter_raw()).split(b"\n\n") if line]
    chunks = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == EMOJI * 3
    assert engine.submitted[-1][0][0]["content"] == [{"type": "text", "text": EMOJI}]


# ---------------------------------------------------------------- tools
def tool(parameters, name="f"):
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


P = "tools[0].function.parameters"
TREE = {"type": "object", "properties": {"child": {"$ref": "#"}}}


@pytest.mark.parametrize(
    "fields, param",
    [
        case(50, "named", {"tools": tool({}), "tool_choice": {"type": "function", "function": {"name": "g"}}},
             "tool_choice"),
        case(50, "no-tools", {"tool_choice": "required"}, "tool_choice"),
        case(50, "auto-no-tools", {"tool_choice": "auto"}, "tool_choice"),
        case(50, "word", {"tools": tool({}), "tool_choice": "any"}, "tool_choice"),
        case(50, "half", {"tools": tool({}), "tool_choice": {"type": "function"}}, "tool_choice"),
        case(51, "list", {"tools": tool([])}, P), case(51, "type", {"tools": tool({"type": "strnig"})}, P),
        case(51, "no-object", {"tools": tool({"type": "array"})}, P),
        case(51, "properties", {"tools": tool({"properties": {"a": 1}})}, P),
        case(51, "required", {"tools": tool({"required": "a"})}, P),
        case(51, "circle", {"tools": tool({"$ref": "#"})}, P),
        case(51, "circle-of-two", {"tools": tool({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {
            "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})}, P),
        case(51, "remote", {"tools": tool({"properties": {"a": {"$ref": "https://example.com/x.json"}}})}, P),
        case(51, "file", {"tools": tool({"items": {"$ref": "file:///etc/passwd"}})}, P),
        case(51, "nowhere", {"tools": tool({"properties": {"a": {"$ref": "#/$defs/x"}}})}, P),
        case(51, "strict", {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
             "tools[0].function.strict"),
        case(51, "parallel", {"tools": tool({}), "parallel_tool_calls": False}, "parallel_tool_calls"),
        case(51, "twice", {"tools": tool({}) * 2}, "tools"),
    ],
)  # fmt: skip
def test_tools(client, fields, param):
    refused(client.post(PATH, json=ask(**fields)), 400, param)


@pytest.mark.usefixtures("real_still_well")
def test_51_a_recursive_schema_is_a_tree(real):
    for choice in ("auto", "required"):
        body = ask(tools=tool(TREE), tool_choice=choice, max_tokens=30)
        assert real.post(PATH, json=body).status_code == 200


# ---------------------------------------------------------------- pictures
ADDRESSES = {
    52: ("https://example.com/a.png", "http://example.com/a.png", "ftp://a/b.png", "//example.com/a.png"),
    53: ("file:///etc/passwd", "/etc/passwd", "\\\\host\\share\\a.png", "a.png", "blob:x", "~/a.png", "C:\\a.png"),
    54: ("http://127.0.0.1/a.png", "http://169.254.169.254/latest", "http://[::1]/a.png", "http://2130706433/",
         "http://0177.0.0.1/", "https://example.com\\@127.0.0.1/a.png", "https://127.0.0.1.nip.io/", "gopher://127.0.0.1/"),
    55: ("", "data:", "data:image/png", "data:image/png;base64", "data:,x", "data:text/html;base64,PGI+",
         "data:image/svg+xml;base64,PHN2Zy8+", "data:image/png,abc", "data:video/mp4;base64,AAAA"),
}  # fmt: skip


@pytest.mark.parametrize("url", [case(n, url[:20] or "empty", url) for n, urls in ADDRESSES.items() for url in urls])
def test_addresses_of_pictures(client, monkeypatch, url):
    import socket

    def nothing(*_):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    refused(client.post(PATH, json=show(url)), 400, URL, "data URL")


def as_png(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def file(kind, **options):
    return base64.b64decode(data_url(kind=kind, **options).partition(",")[2])


def png(width, height, bits=8, colour=2, pixels=b""):
    """A PNG file with this header, whatever its pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


NOISE = Image.effect_noise((40, 40), 90).convert("RGB")


@pytest.mark.parametrize(
    "url",
    [
        case(55, "no-base64", "data:image/png;base64,!!!!"), case(55, "cut", "data:image/png;base64,abc"),
        case(55, "no-picture", as_png(b"not a picture")), case(56, "empty", "data:image/png;base64,"),
        case(57, "png-head", as_png(file("png", picture=NOISE)[:40])),
        case(57, "png-pixels", as_png(file("png", picture=NOISE)[:-300])),
        case(57, "jpeg", as_png(file("jpeg", picture=NOISE)[:200])), case(57, "webp", as_png(file("webp")[:20])),
        case(57, "gif", as_png(file("gif")[:12])),
        case(58, "header-bomb", as_png(png(30_000, 30_000))), case(58, "wide", as_png(png(2**31 - 1, 1))),
        case(58, "zeros", as_png(png(0, 10))), case(58, "16-bit", as_png(png(20_000, 20_000, 16))),
        case(60, "svg", as_png(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), case(60, "pdf", as_png(b"%PDF-1.7")),
        case(60, "fits", as_png(b"SIMPLE  =                    T".ljust(2880))),
        case(60, "psd", as_png(b"8BPS\0\1" + b"\0" * 40)),
        case(60, "jpeg2000", as_png(b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40)), case(60, "tiff", as_png(file("tiff"))),
        case(60, "bmp", as_png(file("bmp"))), case(60, "ppm", as_png(file("ppm"))),
        case(60, "ico", as_png(file("ico"))),
        case(60, "eps", as_png(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
    ],
)  # fmt: skip
def test_broken_pictures(client, url):
    assert len(url) < 1_000_000
    refused(client.post(PATH, json=show(url)), 400, URL)


def animated(frames):
    """A GIF of `frames` frames of one pixel."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\xff\x00\x00\x00\x00\x00"
    return "data:image/gif;base64," + base64.b64encode(head + frame * frames + b"\x3b").decode()


def film(url, frames=4):
    return ask([{"type": "video_url", "video_url": {"url": url, "frames": frames}}])


def test_59_animations(client, engine):
    """As a picture, the first frame is read; as a video, a file with too many frames is refused."""
    assert client.post(PATH, json=show(animated(10_001))).status_code == 200
    assert engine.submitted[-1][0][0]["content"][0]["image"].size == (1, 1)
    at = "messages[0].content[0].video_url"
    refused(client.post(PATH, json=film(animated(10_001))), 400, f"{at}.url", "10000 frames")
    assert client.post(PATH, json=film(animated(20))).status_code == 200
    refused(client.post(PATH, json=film(animated(20), frames=9)), 400, at)
    kinds = ("video/mp4;base64,AAAA", "video/avi;base64,AAAA", "image/png;base64,")
    for url in ("https://example.com/a.mp4", *(f"data:{kind}" for kind in kinds)):
        refused(client.post(PATH, json=film(url)), 400, f"{at}.url")


@pytest.mark.parametrize("size", [case(61, f"{w}x{h}", (w, h)) for w, h in ((1, 1), (1, 16_000), (16_000, 1))])
def test_odd_shapes_are_fine(client, engine, size):
    assert client.post(PATH, json=show(data_url(size=size))).status_code == 200
    assert engine.submitted[-1][0][0]["content"][0]["image"].size == size


@pytest.mark.parametrize("size", [case(61, f"{w}x{h}", (w, h)) for w, h in ((1, 20_000), (20_000, 1))])
def test_shapes_beyond_the_limit(client, size):
    refused(client.post(PATH, json=show(data_url(size=size))), 400, URL, "side")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    return data_url(kind="jpeg", size=(20, 10), exif=exif)


@pytest.mark.parametrize(
    "url, size, pixel",
    [
        case(62, "16-bit", data_url(Image.new("I;16", (4, 4), 65_535)), (4, 4), (255, 255, 255)),
        case(62, "cmyk", data_url(Image.new("CMYK", (4, 4)), "jpeg"), (4, 4), (255, 255, 255)),
        case(62, "palette", data_url(Image.new("P", (4, 4)), transparency=0), (4, 4), (255, 255, 255)),
        case(62, "alpha", data_url(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), (4, 4), (255, 255, 255)),
        case(62, "grey-alpha", data_url(Image.new("LA", (4, 4), (0, 0))), (4, 4), (255, 255, 255)),
        case(62, "exif", turned(), (10, 20), None),
    ],
)
def test_odd_colours_are_fine(client, engine, url, size, pixel):
    assert client.post(PATH, json=show(url)).status_code == 200
    picture = engine.submitted[-1][0][0]["content"][0]["image"]
    assert (picture.size, picture.mode) == (size, "RGB") and pixel in (None, picture.getpixel((1, 1)))


def test_63_too_many_pictures(client):
    parts = [{"type": "image_url", "image_url": {"url": data_url()}}] * 9
    refused(client.post(PATH, json=ask(parts)), 400, "messages[0].content[8].image_url.url", "8 pictures")
    assert client.post(PATH, json=ask(parts[:8])).status_code == 200


def test_64_too_many_pixels_or_bytes_together(client):
    sheet = {"type": "image_url", "image_url": {"url": data_url(Image.new("1", (4900, 4900)))}}
    refused(client.post(PATH, json=ask([sheet] * 3)), 400, "messages[0].content[2].image_url.url", "together")
    refused(client.post(PATH, json=show(as_png(b"\x89PNG" * (2**21 + 1)))), 400, URL, "8388608 bytes")


@pytest.mark.parametrize("role", [case(65, role, role) for role in ("system", "assistant", "tool")])
def test_pictures_only_from_the_user(client, role):
    part = {"type": "image_url", "image_url": {"url": data_url()}}
    extra = {"tool_call_id": "1"} if role == "tool" else {}
    refused(client.post(PATH, json={"messages": [{"role": role, "content": [part], **extra}, user("a")]}), 400)


@pytest.mark.parametrize("detail", [case(66, str(d), d) for d in ("highest", 1, "", {})])
def test_detail_junk(client, detail):
    part = {"type": "image_url", "image_url": {"url": data_url(), "detail": detail}}
    refused(client.post(PATH, json=ask([part])), 400, "messages[0].content[0].image_url.detail")


@pytest.mark.usefixtures("real_still_well")
def test_67_identical_bytes(real):
    """There is no name by which one client's picture could be another's: a uuid is refused, equal bytes are equal."""
    part = {"type": "image_url", "image_url": {"url": data_url(NOISE)}}
    refused(real.post(PATH, json=ask([{**part, "uuid": "1"}])), 400, "messages[0].content[0].uuid")
    other = {"type": "image_url", "image_url": {"url": data_url(NOISE.transpose(Image.Transpose.ROTATE_90))}}
    first, again, different = (
        real.post(PATH, json=ask([p, {"type": "text", "text": "?"}], max_tokens=12)).json()["choices"][0]["message"]
        for p in (part, part, other)
    )
    assert first == again != different


def test_65_pictures_to_a_model_that_cannot_see():
    from server_fakes import FakeEngine, make_app

    with TestClient(make_app(FakeEngine(), pictures=False)) as blind:
        refused(blind.post(PATH, json=show(data_url())), 400, says="text only")
        assert blind.get("/v1/models").json()["data"][0]["pictures"] is False
