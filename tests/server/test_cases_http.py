"""Cases 1 to 20 of serving-and-evaluation.md F.4: HTTP. Each with the status it must get; after it the server is
well."""

import asyncio
import base64
import gzip
import hmac
import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest
from server_fakes import JSON, PATH, FakeEngine, ask, case, make_app, refused, running, until
from starlette.testclient import TestClient

from puna.errors import PunaError
from puna.serve.limits import Limits

pytestmark = pytest.mark.usefixtures("still_well")


@pytest.mark.parametrize(
    "body, status, says",
    [
        case(1, "unclosed", b"{", 400, "not JSON"),
        case(1, "trailing", b'{"messages": []} x', 400, "not JSON"),
        case(2, "array", b"[]", 400, "must be a JSON object"),
        case(2, "string", b'"text"', 400, "must be a JSON object"),
        case(2, "null", b"null", 400, "must be a JSON object"),
        case(2, "number", b"1", 400, "must be a JSON object"),
        case(3, "empty", b"", 400, "not JSON"),
        case(7, "lists", b"[" * 10_000, 400, "deeper"),
        case(7, "objects", b'{"a":' * 10_000, 400, "deeper"),
        case(8, "top", b'{"messages": [], "messages": []}', 400, "twice"),
        case(8, "inside", b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', 400, "twice"),
        case(9, "nan", b'{"messages": NaN}', 400, "NaN is not JSON"),
        case(9, "infinity", b'{"temperature": -Infinity}', 400, "-Infinity is not JSON"),
        case(10, "no-utf8", b"\xff\xfe", 400, "not UTF-8"),
        case(10, "surrogate", b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}', 400, "surrogate"),
        case(10, "surrogate-key", b'{"messages": [], "\\ud800": 1}', 400, "surrogate"),
        case(11, "nul", b'{"messages": [{"role": "user", "content": "a\\u0000b"}]}', 400, "NUL"),
        case(11, "raw-nul", b'{"messages": "\0"}', 400, "not JSON"),
        case(8, "last-of-many", b"{%s}" % b",".join(b'"%d": 1' % i for i in [*range(90_000), 5]), 400, "twice"),
        case(12, "values", b'{"messages": [%s 1]}' % (b"1," * 600_000), 400, "too many values"),
        case(12, "parts", b'{"messages": [{"role": "user", "content": [%s 1]}]}' % (b"1," * 400_000), 400, "part"),
        case(12, "digits", b'{"seed": ' + b"9" * 5000 + b"}", 400, "too long to read"),
        case(12, "top_k", json.dumps(ask(top_k=2**70)).encode(), 400, "top_k"),
    ],
)
def test_bodies(client, body, status, says):
    refused(client.post(PATH, content=body, headers=JSON), status, says=says)


def test_10_a_whole_surrogate_pair_is_a_character(client, engine):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert client.post(PATH, content=body, headers=JSON).status_code == 200
    assert engine.submitted[-1][0][0]["content"][0]["text"] == "😀"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_04_content_types(client, kind):
    refused(client.post(PATH, content=json.dumps(ask()), headers={"content-type": kind}), 415)


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/responses", "/tokenize"])
def test_05_bodies_over_the_limit(path):
    def pieces():
        yield json.dumps(ask("a" * 400)).encode()

    client = TestClient(make_app(limits=Limits(body_bytes=300)))
    refused(client.post(path, json=ask("a" * 400)), 413)
    refused(client.post(path, content=pieces(), headers=JSON), 413)  # without a declared length


def test_06_gzip_bomb(client):
    bomb = gzip.compress(b" " * 2**26)
    refused(client.post(PATH, content=bomb, headers={**JSON, "content-encoding": "gzip"}), 415)
    refused(client.post(PATH, content=bomb, headers=JSON), 400)


def send(url, *lines):
    """A connection over which `lines` of a request have been sent, and no more."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.settimeout(10)
    head = [f"POST {PATH} HTTP/1.1", f"Host: {parts.netloc}", "Content-Type: application/json", *lines]
    connection.sendall("\r\n".join(head).encode())
    return connection


def test_13_slow_headers_end_in_a_closed_connection():
    with running(make_app(limits=Limits(header_seconds=1))) as url:
        parts, began = urlsplit(url), time.monotonic()
        with send(url, "X-Slow: ") as slow, socket.create_connection((parts.hostname, parts.port)) as silent:
            silent.settimeout(10)
            assert slow.recv(100) == b"" and silent.recv(100) == b""
            assert 0.5 < time.monotonic() - began < 5
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
        for _ in range(2):  # a connection that is used is not cut
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.7)
        connection.sock.sendall(b"GET /health HTT")
        assert connection.sock.recv(100) == b""  # the second request is held to its time as well


def test_13_a_slow_body_is_408():
    with running(make_app(limits=Limits(body_seconds=1))) as url:
        began = time.monotonic()
        with send(url, "Content-Length: 90", "", "{") as slow:
            assert b" 408 " in slow.recv(4096)
            assert 0.5 < time.monotonic() - began < 5


def key(value):
    return {"authorization": f"Bearer {value}"}


def basic(value):
    return {"authorization": "Basic " + base64.b64encode(f"anyone:{value}".encode()).decode()}


KEYS = ("first-key", "second-key")


@pytest.mark.parametrize(
    "headers, status",
    [
        case(14, "missing", {}, 401), case(14, "wrong", key("first-kex"), 401), case(14, "empty", key(""), 401),
        case(14, "no-scheme", {"authorization": "first-key"}, 401), case(14, "prefix", key("first-ke"), 401),
        case(14, "longer", key("first-key1"), 401), case(14, "very-long", key("x" * 50_000), 401),
        case(14, "very-long-basic", basic("x" * 40_000), 401),
        case(14, "not-base64", {"authorization": "Basic !"}, 401),
        case(14, "not-ascii", {"authorization": "Bearer schlüssel".encode("latin-1")}, 401),
        case(14, "first", key("first-key"), 200), case(14, "second", key("second-key"), 200),
        case(14, "browser", basic("second-key"), 200), case(14, "browser-wrong", basic("second"), 401),
    ],
)  # fmt: skip
def test_api_keys(headers, status):
    client = TestClient(make_app(keys=KEYS))
    for path in ("/", "/page/app.js", "/v1/models", "/metrics", "/ready", "/openapi.json", "/nowhere"):
        response = client.get(path, headers=headers)
        assert response.status_code == (401 if status == 401 else 404 if path == "/nowhere" else 200), path
    for path, good in ((PATH, 200), ("/tokenize", 400), ("/v1/responses", 400)):
        assert client.post(path, json=ask(extra=1) if good == 400 else ask(), headers=headers).status_code == (
            good if status == 200 else 401
        )
    if status == 401:
        error = refused(client.post(PATH, json=ask(), headers=headers), 401, says="API key")
        assert error["code"] == "invalid_api_key" and "first" not in str(error)
    assert client.get("/health").status_code == 200


def test_14_keys_are_compared_in_constant_time(monkeypatch):
    """Equal work for any guess: every key is compared, by compare_digest, as a hash of one length."""
    seen, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    client = TestClient(make_app(keys=KEYS))
    for guess in ("first-key", "f", "x" * 300, ""):
        client.get("/v1/models", headers=key(guess))
    assert seen == [(32, 32)] * 8
    for bad in ("", "a b", "ß", "x" * 600):
        with pytest.raises(PunaError, match="API key"):
            make_app(keys=[bad])


def test_14_tenants_have_caches_of_their_own():
    engine = FakeEngine()
    client = TestClient(make_app(engine, keys=KEYS))
    for name in (*KEYS, KEYS[0]):
        client.post(PATH, json=ask(), headers=key(name))
    first, second, again = engine.salts
    assert first == again != second and len(first) == 64


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://testserver.evil", "http://testserver:81", "file://", "http://["]
)
def test_15_foreign_origins(client, origin):
    refused(client.post(PATH, json=ask(), headers={"origin": origin}), 403)


def test_15_own_origin(client):
    assert client.post(PATH, json=ask(), headers={"origin": "http://testserver"}).status_code == 200


@pytest.mark.parametrize("host, status", [
    ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("evil.example", 403),
    ("localhost.evil.example", 403), ("", 403), ("[::1", 403), ("192.168.1.5:8000", 403),
])  # fmt: skip
def test_15_hosts_of_a_loopback_server(host, status):
    client = TestClient(make_app(loopback_only=True))
    assert client.get("/health", headers={"host": host}).status_code == status
    assert TestClient(make_app()).get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "method, path",
    [("GET", PATH), ("PUT", PATH), ("DELETE", PATH), ("OPTIONS", PATH), ("HEAD", PATH), ("POST", "/health"),
     ("POST", "/v1/models"), ("POST", "/"), ("POST", "/page/app.js"), ("PATCH", "/v1/models/tiny"),
     ("GET", "/v1/responses"), ("OPTIONS", "/v1/completions"), ("TRACE", "/tokenize"), ("PUT", "/metrics")],
)  # fmt: skip
def test_16_other_methods(client, method, path):
    response = client.request(method, path)
    assert response.status_code == 405 and not [n for n in response.headers if n.startswith("access-control")]
    if method != "HEAD":
        refused(response, 405)


@pytest.mark.parametrize(
    "path",
    ["/page/../api.py", "/page/%2e%2e/api.py", "/page/..%2fapi.py", "/page//etc/passwd", "/page/%00", "/page/",
     "/page/x.js", "/page/..%5capi.py", "/page/%2e%2e%2f%2e%2e%2fpyproject.toml"],
)  # fmt: skip
def test_17_no_way_out_of_the_page_folder(client, path):
    response = client.get(path)
    assert response.status_code in (400, 404) and b"def " not in response.content
    refused(response, response.status_code)


def test_18_a_thousand_parallel_connections():
    """All are answered: as many as there are places with 200, the others with 429 and a time to come back."""
    engine = FakeEngine(lambda m: "word " * 4, pause=0.1)
    body = json.dumps(ask()).encode()
    request = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        PATH.encode(), len(body), body,
    )  # fmt: skip

    async def one(parts, opened, everybody):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        opened.append(1)
        if len(opened) == 1000:
            everybody.set()
        await everybody.wait()
        writer.write(request)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        writer.close()
        return head

    async def all_of_them(url):
        opened, everybody = [], asyncio.Event()  # all are connected before the first one asks
        return await asyncio.gather(*(one(urlsplit(url), opened, everybody) for _ in range(1000)))

    app = make_app(engine, limits=Limits(running=10, waiting=30))
    with running(app) as url:
        heads = asyncio.run(all_of_them(url))
        statuses = [int(head.split()[1]) for head in heads]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 40
        assert all(b"retry-after: 1" in head for head in heads if b" 429 " in head)
        until(lambda: app.state.places.taken == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_19_a_client_that_leaves_frees_its_place(stream):
    engine = FakeEngine(lambda m: "word " * 400, pause=0.02, context=2000)
    app = make_app(engine)
    with running(app) as url:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        connection.request("POST", PATH, json.dumps(ask(stream=stream, n=2)), JSON)
        if stream:
            connection.getresponse().read(100)
        until(lambda: len(engine.submitted) == 2)
        handles = [handle for _, _, handle in engine.submitted]
        time.sleep(0.1)
        assert not any(h.aborted.is_set() for h in handles) and app.state.places.taken == 2
        connection.sock.close() if connection.sock else connection.close()
        connection.close()
        until(lambda: all(h.aborted.is_set() for h in handles) and app.state.places.taken == 0, 1)


def test_19_leaving_before_the_first_token_frees_the_place_too():
    engine = FakeEngine(lambda m: "word", pause=3)
    with running(make_app(engine)) as url:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port)
        connection.request("POST", PATH, json.dumps(ask(stream=True)), JSON)
        until(lambda: engine.submitted)
        time.sleep(0.1)
        connection.close()
        until(engine.submitted[0][2].aborted.is_set, 1)


def test_20_a_client_that_never_reads_loses_its_place_and_holds_up_nobody():
    """4 MB of answer fill the sockets' buffers; then nothing more is sent, and after `read_seconds` it is over."""
    engine = FakeEngine(lambda m: "w" * 4_000_000, context=10_000_000)
    engine.size = 4000  # characters of a token
    app = make_app(engine, limits=Limits(read_seconds=1, running=1, waiting=1, answer_tokens=4096))
    with running(app) as url:
        body = json.dumps(ask(stream=True, max_tokens=4096))
        with send(url, f"Content-Length: {len(body)}", "", body):
            until(lambda: app.state.places.taken == 1)
            assert TestClient(app).post(PATH, json=ask("quick", max_tokens=1)).status_code == 200
            until(lambda: app.state.places.taken == 0, 10)
            assert engine.submitted[0][2].aborted.is_set()
