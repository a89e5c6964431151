"""What holds for every address: methods, security headers, foreign origins and hosts, the page's files."""

import pytest
from server_fakes import PATH, ask, make_app, refused
from starlette.testclient import TestClient


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/style.css", "/health", "/v1/models", "/nowhere", PATH])
def test_security_headers_everywhere(client, path):
    headers = client.get(path).headers
    policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'self'"] and policy["img-src"] == ["'self'", "blob:", "data:"]
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.startswith("access-control")]
    assert "server" not in headers or "uvicorn" not in headers["server"]


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1", "/v1/completions", "/v1/chat/completions/", "/docs", "/openapi.json", "/health/"]
)
def test_unknown_addresses(client, path):
    assert refused(client.get(path), 404)["type"] == "not_found_error"


@pytest.mark.parametrize(
    "method, path",
    [("GET", PATH), ("PUT", PATH), ("DELETE", PATH), ("OPTIONS", PATH), ("POST", "/health"), ("POST", "/v1/models"),
    ("POST", "/"),
     ("POST", "/page/app.js"), ("PATCH", "/v1/models/tiny")],
)  # fmt: skip
def test_other_methods(client, method, path):
    refused(client.request(method, path), 405)


def test_head_on_completions_is_refused(client):
    assert client.head(PATH).status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/page/../api.py",
        "/page/%2e%2e/api.py",
        "/page/..%2fapi.py",
        "/page//etc/passwd",
        "/page/%00",
        "/page/",
        "/page/x.js",
    ],
)
def test_no_way_out_of_the_page_folder(client, path):
    response = client.get(path)
    assert response.status_code in (400, 404) and b"def " not in response.content
    refused(response, response.status_code)


def test_page_files_have_their_types(client):
    for path, kind in [
        ("/", "text/html"),
        ("/page/app.js", "javascript"),
        ("/page/style.css", "text/css"),
        ("/page/icon.svg", "svg"),
    ]:
        assert kind in client.get(path).headers["content-type"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://testserver.evil", "http://testserver:81", "file://", "http://["]
)
def test_foreign_origins(client, origin):
    refused(client.post(PATH, json=ask(), headers={"origin": origin}), 403)


def test_own_origin(client):
    assert client.post(PATH, json=ask(), headers={"origin": "http://testserver"}).status_code == 200


@pytest.mark.parametrize("host, status", [
    ("localhost:8000", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("evil.example", 403),
    ("localhost.evil.example", 403),
    ("", 403), ("[::1", 403), ("192.168.1.5:8000", 403),
])  # fmt: skip
def test_hosts_of_a_loopback_server(host, status):
    client = TestClient(make_app(loopback_only=True))
    assert client.get("/health", headers={"host": host}).status_code == status
    assert TestClient(make_app()).get("/health", headers={"host": host}).status_code == 200
