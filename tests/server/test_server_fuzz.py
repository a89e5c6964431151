"""Made-up input: requests from the OpenAPI document (schemathesis), pictures, conversations, tool calls and boxes
(hypothesis). Short here; `PUNA_FUZZ=5000 pytest tests/server/test_server_fuzz.py` runs so many examples of each."""

import base64
import io
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from server_fakes import PATH, FakeEngine, ask, make_app, show
from starlette.testclient import TestClient

from puna.errors import PunaError
from puna.processor.grounding import parse_boxes
from puna.processor.image import open_picture
from puna.processor.tools import FORMS, Call, parse_calls, write_calls
from puna.processor.video import film_size, read_video
from puna.serve.body import read_json
from puna.serve.errors import ApiError
from puna.serve.limits import Limits
from puna.serve.openapi import GETS, POSTS
from puna.serve.stream import Reader

EXAMPLES = int(os.environ.get("PUNA_FUZZ", "60"))
RELAXED = settings(  # the same examples every time, unless many are asked for
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None,
    derandomize="PUNA_FUZZ" not in os.environ,
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


# ---------------------------------------------------------------- requests from the document
schemathesis = pytest.importorskip("schemathesis")
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "unsupported_method")  # fmt: skip


@pytest.fixture(scope="module")
def documented(tiny_processor):
    app = make_app(FakeEngine(context=100_000), tokenizer=tiny_processor.tokenizer)
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_requests_from_the_document(documented, path):
    """Whatever a client that knows the document sends, valid or not: documented statuses and shapes, no 5xx."""
    operation = documented[path]["POST" if path in POSTS else "GET"]
    modes = list(schemathesis.GenerationMode) if path in POSTS else [schemathesis.GenerationMode.POSITIVE]
    chosen = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKS]
    assert len(chosen) == len(CHECKS)

    @settings(RELAXED, max_examples=max(EXAMPLES // 2, 5) if path in POSTS else 2)
    @given(st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def check(case):
        case.call_and_validate(checks=chosen)

    check()


# ---------------------------------------------------------------- bodies
@RELAXED
@given(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_bodies_are_json_or_refused(raw):
    try:
        value = read_json(raw, Limits())
    except ApiError as error:
        assert error.status == 400 and len(error.message) < 300
    else:
        assert value == json.loads(raw)


@pytest.fixture(scope="module")
def fake():
    with TestClient(make_app(FakeEngine(context=100_000)), raise_server_exceptions=False) as client:
        yield client


FIELDS = ["messages", "temperature", "stop", "n", "tools", "tool_choice", "logit_bias", "response_format", "seed",
          "stream", "input", "prompt", "text", "regex", "instructions", "include"]  # fmt: skip


@RELAXED
@given(
    st.sampled_from([PATH, "/v1/completions", "/v1/responses", "/tokenize"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=5),
)
def test_any_values_in_known_fields(fake, path, fields):
    base = {PATH: ask(), "/v1/completions": {"prompt": [1]}, "/v1/responses": {"input": "a"}, "/tokenize": {}}[path]
    assert fake.post(path, json={**base, **fields}).status_code in (200, 400)
    assert fake.app.state.places.taken == 0


# ---------------------------------------------------------------- pictures and videos
def _files():
    made = []
    for kind in ("png", "jpeg", "webp", "gif"):
        buffer = io.BytesIO()
        more = {"save_all": True, "append_images": [Image.new("RGB", (9, 7), "red")]} if kind in ("gif", "webp") else {}
        Image.effect_noise((9, 7), 90).convert("RGB").save(buffer, kind, **more)
        made.append(buffer.getvalue())
    return made


FILES = _files()


@st.composite
def damaged(draw):
    """A picture file with some bytes changed, cut or inserted."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8)):
        data[at % len(data)] = byte
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data) - 1)) :]
    return bytes(data) + draw(st.binary(max_size=20))


@RELAXED
@given(damaged() | st.binary(max_size=300))
def test_damaged_pictures_are_opened_or_refused(fake, data):
    for call in (lambda: open_picture(data, max_pixels=10**6), lambda: film_size(data)):
        try:
            call()
        except PunaError as error:
            assert "\n" not in str(error)
    width, height, count = 0, 0, 0
    try:
        width, height, count = film_size(data)
    except PunaError:
        pass
    if 0 < width * height * count < 10**6:
        try:
            read_video(data, 4)
        except PunaError:
            pass
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    assert fake.post(PATH, json=show(url)).status_code in (200, 400)


# ---------------------------------------------------------------- conversations
def test_special_tokens_in_any_text(tiny_processor):
    """Whatever is written, in any role: the control tokens are those of a plain letter, and decoding gives the text."""
    tokenizer = tiny_processor.tokenizer
    control = set(tokenizer.special.values())
    piece = st.sampled_from(sorted(tokenizer.special)) | st.text(max_size=12).filter(str.isprintable)

    @RELAXED
    @given(st.lists(piece, min_size=1, max_size=8).map("".join), st.sampled_from(["user", "system", "assistant"]))
    def check(text, role):
        if not text.strip():
            return
        messages = [{"role": role, "content": text}] + [{"role": "user", "content": "b"}] * (role != "user")
        plain = [{**messages[0], "content": "a"}, *messages[1:]]
        tokens, expected = (
            tiny_processor.encode_chat(m, generation_prompt=True).tokens.tolist() for m in (messages, plain)
        )
        assert [t for t in tokens if t in control] == [t for t in expected if t in control]
        assert text in tokenizer.decode(tokens, special=True)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()


# ---------------------------------------------------------------- calls and boxes in answers
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
CALLS = st.builds(Call, NAMES, st.dictionaries(NAMES, JSON_VALUES, max_size=3))
SCRAPS = st.sampled_from(
    ["[", "]", "{", "}", "(", ")", '"', "'", "\\", "=", ", ", "<function=", "</function>", '{"name": ', "parameters",
     "f", "None", "1e999", '<box label="', '">', "</box>", "1,2,3,4", "<", "&lt;", "\n", "é", "\\ud800"]
)  # fmt: skip
TEXTS = st.lists(SCRAPS | st.text(max_size=4), max_size=20).map("".join)


@RELAXED
@given(TEXTS, st.lists(st.integers(1, 9), max_size=12))
def test_a_stream_is_read_like_the_whole(text, cuts):
    """Any text, cut anywhere: the same text, calls and boxes as all at once, and no box is said twice."""
    whole = Reader(256, ["f"]).read(text, True)
    reader, parts, at = Reader(256, ["f"]), [], 0
    for cut in cuts:
        parts.append(reader.read(text[at : at + cut], False))
        at += cut
    parts.append(reader.read(text[at:], True))
    bare = [[(c["name"], c["arguments"]) for _, calls, _ in some for c in calls] for some in ([whole], parts)]
    assert "".join(part[0] for part in parts) == whole[0] and bare[0] == bare[1]
    boxes = [box for part in parts for box in part[2]]
    assert boxes == whole[2] == [vars(box) for box in parse_boxes(whole[0])]


@RELAXED
@given(st.lists(CALLS, min_size=1, max_size=3), st.sampled_from(sorted(FORMS)))
def test_calls_are_read_as_they_were_written(calls, form):
    try:
        text = write_calls(calls, form)
    except PunaError:
        return
    assert parse_calls(text) == ("", calls) or any("e" in json.dumps(c.arguments) for c in calls)
