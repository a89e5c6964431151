"""Each row of the table of limits: at the limit a request passes, one past it is refused."""

import asyncio
import dataclasses
import importlib
import json

import pytest
from PIL import Image
from server_fakes import PATH, FakeEngine, ask, data_url, make_app, refused, show
from starlette.testclient import TestClient

from puna.cli.main import build_parser
from puna.cli.talk import limit_flags
from puna.errors import PunaError
from puna.serve.limits import Limits, table

NOISE = Image.effect_noise((16, 16), 90)


def picture_bytes(url):
    return len(url.partition(",")[2]) * 3 // 4 - url.count("=")


def several(*urls):
    return ask([{"type": "image_url", "image_url": {"url": url}} for url in urls])


def twice(text):
    return {"messages": ask(text)["messages"] * 2}


def schema(text):
    return ask("JSON", response_format={"type": "json_schema", "json_schema": {"schema": {"const": text}}})


def offer(n):
    return ask(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(n)])


def film(frames):
    picture = Image.new("L", (4, 4))
    more = [Image.new("L", (4, 4), 9 * i) for i in range(1, frames)]
    url = data_url(picture, "gif", save_all=True, append_images=more)
    return ask([{"type": "video_url", "video_url": {"url": url, "frames": 1}}])


# name -> (limit, a request that just passes, one that just does not, its status)
BODIES = {
    "body_bytes": (300, ask("a" * 200), ask("a" * 400), 413),
    "held_bytes": (300, ask("a" * 200), ask("a" * 400), 429),
    "json_depth": (5, ask([{"type": "text", "text": "a"}]), ask([[[[[]]]]]), 400),
    "json_values": (9, {"stop": None, **ask("a, b, c")}, {"stop": None, **ask("a, b, c, d, e, f, g, h, i")}, 400),
    "messages": (2, {"messages": ask()["messages"] * 2}, {"messages": ask()["messages"] * 3}, 400),
    "text_chars": (10, twice("12345"), twice("123456"), 400),
    "pictures": (2, several(*[data_url()] * 2), several(*[data_url()] * 3), 400),
    "picture_bytes": (picture_bytes(data_url()), show(data_url()), show(data_url(NOISE)), 400),
    "picture_pixels": (48, show(data_url(size=(8, 6))), show(data_url(size=(7, 7))), 400),
    "picture_side": (8, show(data_url(size=(8, 8))), show(data_url(size=(9, 1))), 400),
    "total_pixels": (96, several(*[data_url(size=(8, 6))] * 2), several(*[data_url(size=(7, 7))] * 2), 400),
    "film_frames": (3, film(3), film(4), 400),
    "tools": (2, offer(2), offer(3), 400),
    "schema_chars": (20, schema("a"), schema("a" * 20), 400),
    "answer_tokens": (20, ask(max_tokens=20), ask(max_tokens=21), 400),
    "answers": (2, ask(n=2), ask(n=3), 400),
    "stops": (1, ask(stop=["a"]), ask(stop=["a", "b"]), 400),
    "stop_chars": (3, ask(stop="abc"), ask(stop="abcd"), 400),
    "biases": (1, ask(logit_bias={"1": 1}), ask(logit_bias={"1": 1, "2": 1}), 400),
}  # fmt: skip


def client_with(**limits):
    return TestClient(make_app(limits=Limits(**limits)), raise_server_exceptions=False)


@pytest.mark.parametrize("name", BODIES)
def test_limit(name):
    limit, fits, exceeds, status = BODIES[name]
    client = client_with(**{name: limit})
    assert client.post(PATH, json=fits).status_code == 200
    refused(client.post(PATH, json=exceeds), status)
    assert client_with().post(PATH, json=exceeds).status_code == (400 if name == "json_depth" else 200), (
        "something else refused it"
    )


def test_limit_key_chars():
    client = TestClient(make_app(keys=["abc"], limits=Limits(key_chars=3)))
    for key, status in (("abc", 200), ("abcd", 401)):
        assert client.get("/ready", headers={"authorization": f"Bearer {key}"}).status_code == status
    with pytest.raises(PunaError, match="1 to 3"):
        make_app(keys=["abcd"], limits=Limits(key_chars=3))


def test_limit_answer_seconds():
    app = make_app(FakeEngine(lambda m: "word " * 100, pause=0.1), limits=Limits(answer_seconds=1))
    client = TestClient(app)
    assert refused(client.post(PATH, json=ask()), 504)["code"] == "timeout"
    stream = client.post(PATH, json=ask(stream=True)).text
    assert '"code":"timeout"' in stream and stream.endswith("[DONE]\n\n")
    assert all(handle.aborted.wait(1) for *_, handle in app.state.server.engine.submitted)
    assert app.state.places.taken == 0 and client.post(PATH, json=ask(max_tokens=1)).status_code == 200


def test_boxes_limit():
    answer = '<box label="a">1,2,3,4</box>' * 5
    app = make_app(FakeEngine(lambda m: answer), limits=Limits(boxes=3))
    message = TestClient(app).post(PATH, json=ask()).json()["choices"][0]["message"]
    assert len(message["boxes"]) == 3 and message["content"] == answer
    stream = TestClient(app).post(PATH, json=ask(stream=True)).text
    assert (
        sum(
            len(json.loads(line[6:])["choices"][0]["delta"].get("boxes", []))
            for line in stream.splitlines()
            if "boxes" in line
        )
        == 3
    )


def test_limit_places_running_and_waiting():
    """`running` and `waiting` answers together have a place; one more is a 429 that says when to come back."""
    engine = FakeEngine(lambda m: "word " * 100, pause=0.05)
    app = make_app(engine, limits=Limits(running=2, waiting=1))

    async def ask_twice():
        from starlette.testclient import httpx  # httpx or its successor, whichever is installed

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post(PATH, json=ask(max_tokens=20, n=2)))
            while len(engine.submitted) < 2:
                await asyncio.sleep(0.01)
            assert (await client.get("/ready")).status_code == 200
            second = await client.post(PATH, json=ask(n=2))
            assert (await client.post(PATH, json=ask(max_tokens=1))).status_code == 200
            return await first, second

    first, second = asyncio.run(ask_twice())
    assert first.status_code == 200 and len(first.json()["choices"]) == 2
    refused(second, 429)
    assert second.headers["retry-after"] == "1"
    assert app.state.places.taken == 0
    assert TestClient(app).post(PATH, json=ask(max_tokens=1)).status_code == 200


def test_limit_running_is_the_engines_batch(tiny_processor, tmp_path):
    from server_real import lively_model

    from puna.convert import export_hf
    from puna.serve.run import load_puna

    export_hf(lively_model(tiny_processor), tiny_processor, tmp_path / "model")
    thread, _ = load_puna(tmp_path / "model", Limits(running=3))
    with thread:
        assert thread.engine.scheduler.rows == 3


# where the limits are tested that no single request exceeds
ELSEWHERE = {
    "key_chars": test_limit_key_chars, "boxes": test_boxes_limit, "answer_seconds": test_limit_answer_seconds,
    "running": test_limit_places_running_and_waiting, "waiting": test_limit_places_running_and_waiting,
    "header_seconds": "test_cases_http.test_13_slow_headers_end_in_a_closed_connection",
    "body_seconds": "test_cases_http.test_13_a_slow_body_is_408",
    "read_seconds": "test_cases_http.test_20_a_client_that_never_reads_loses_its_place_and_holds_up_nobody",
    "drain_seconds": "test_server_stop.test_77_drain_seconds_is_the_longest_wait",
}  # fmt: skip


@pytest.mark.parametrize("row", table(), ids=lambda row: row.name)
def test_every_limit_has_a_default_a_flag_a_variable_and_a_test(row):
    """The command line, the environment and Python give the same limits; the flag goes first."""
    assert row.doc and row.default == getattr(Limits(), row.name)
    new = dataclasses.replace(Limits(), **{row.name: row.default + 1})
    assert Limits.read({}, {row.variable: str(row.default + 1), "HOME": "/"}) == new
    args = build_parser().parse_args(["serve", "MODEL", row.flag, str(row.default + 1)])
    assert Limits.read(limit_flags(args), {row.variable: "1"}) == new
    for bad in ("many", "0", "-1", "1.5"):
        with pytest.raises(PunaError, match="positive integer"):
            Limits.read({}, {row.variable: bad})
    if isinstance(where := ELSEWHERE.get(row.name), str):
        module, _, test = where.partition(".")
        assert hasattr(importlib.import_module(module), test)
    assert (row.name in BODIES) != (where is not None)


def test_unknown_limits_are_refused():
    with pytest.raises(PunaError, match="unknown limit PUNA_MAX_PICTURE; the limits are"):
        Limits.read({}, {"PUNA_MAX_PICTURE": "3"})
