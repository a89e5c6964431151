"""Each row of the table of limits: at the limit a request passes, one past it is refused."""

import asyncio
import dataclasses
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image
from server_fakes import PATH, FakeEngine, ask, data_url, make_app, refused, running, show
from starlette.testclient import TestClient

from puna.errors import PunaError
from puna.serve.limits import Limits, table

NOISE = Image.effect_noise((16, 16), 90)


def picture_bytes(url):
    return len(url.partition(",")[2]) * 3 // 4 - url.count("=")


def several(*urls):
    return ask([{"type": "image_url", "image_url": {"url": url}} for url in urls])


def twice(text):
    return {"messages": ask(text)["messages"] * 2}


# name -> (limit, a request that just passes, one that just does not, its status)
BODIES = {
    "body_bytes": (300, ask("a" * 200), ask("a" * 400), 413),
    "json_depth": (5, ask([{"type": "text", "text": "a"}]), ask([[[[[]]]]]), 400),
    "messages": (2, {"messages": ask()["messages"] * 2}, {"messages": ask()["messages"] * 3}, 400),
    "text_chars": (10, twice("12345"), twice("123456"), 400),
    "pictures": (2, several(*[data_url()] * 2), several(*[data_url()] * 3), 400),
    "picture_bytes": (picture_bytes(data_url()), show(data_url()), show(data_url(NOISE)), 400),
    "picture_pixels": (48, show(data_url(size=(8, 6))), show(data_url(size=(7, 7))), 400),
    "picture_side": (8, show(data_url(size=(8, 8))), show(data_url(size=(9, 1))), 400),
    "total_pixels": (96, several(*[data_url(size=(8, 6))] * 2), several(*[data_url(size=(7, 7))] * 2), 400),
    "answer_tokens": (20, ask(max_tokens=20), ask(max_tokens=21), 400),
    "stops": (1, ask(stop=["a"]), ask(stop=["a", "b"]), 400),
    "stop_chars": (3, ask(stop="abc"), ask(stop="abcd"), 400),
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


def test_body_limit_without_a_declared_length():
    def pieces():
        yield json.dumps(ask("a" * 400)).encode()

    headers = {"content-type": "application/json"}
    refused(client_with(body_bytes=300).post(PATH, content=pieces(), headers=headers), 413)
    assert client_with(body_bytes=600).post(PATH, content=pieces(), headers=headers).status_code == 200


def test_body_seconds_ends_a_slow_client():
    with running(make_app(limits=Limits(body_seconds=1))) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as slow:
            lines = [
                f"POST {PATH} HTTP/1.1",
                f"Host: {parts.netloc}",
                "Content-Type: application/json",
                "Content-Length: 90",
            ]
            slow.sendall("\r\n".join([*lines, "", "{"]).encode())
            began = time.monotonic()
            slow.settimeout(10)
            assert b" 408 " in slow.recv(4096)
            assert 0.5 < time.monotonic() - began < 5


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


def test_open_requests_limit():
    engine = FakeEngine(lambda m: "word " * 100, pause=0.05)
    app = make_app(engine, limits=Limits(open_requests=1))

    async def two():
        from starlette.testclient import httpx  # httpx or its successor, whichever is installed

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            first = asyncio.create_task(client.post(PATH, json=ask(max_tokens=20)))
            while not engine.submitted:
                await asyncio.sleep(0.01)
            second = await client.post(PATH, json=ask())
            return await first, second

    first, second = asyncio.run(two())
    assert first.status_code == 200
    refused(second, 503)
    assert second.headers["retry-after"] == "1"
    assert app.state.places.taken == 0
    assert TestClient(app).post(PATH, json=ask(max_tokens=1)).status_code == 200


def test_every_limit_has_a_test():
    tested = {*BODIES, "body_seconds", "boxes", "open_requests", "drain_seconds"}
    assert {row[0] for row in table()} == tested


def test_limits_come_from_the_environment():
    assert Limits.from_env({"PUNA_MAX_PICTURES": "3", "HOME": "/"}) == Limits(pictures=3)
    assert Limits.from_env({}) == Limits() != Limits(pictures=3)
    for environ, says in [
        ({"PUNA_MAX_PICTURE": "3"}, "unknown limit PUNA_MAX_PICTURE"),
        ({"PUNA_MAX_PICTURES": "many"}, "PUNA_MAX_PICTURES must be a positive integer"),
        ({"PUNA_MAX_PICTURES": "0"}, "pictures must be a positive integer"),
    ]:
        with pytest.raises(PunaError, match=says):
            Limits.from_env(environ)
    assert len({row[2] for row in table()}) == len(dataclasses.fields(Limits)) and all(row[3] for row in table())
