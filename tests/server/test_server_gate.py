"""What holds for every address: security headers, unknown addresses, the page's files. (Methods, origins, hosts and
keys are cases of F.4: test_cases_http.py.)"""

import pytest
from server_fakes import PATH, refused


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/style.css", "/health", "/v1/models", "/nowhere", PATH])
def test_security_headers_everywhere(client, path):
    headers = client.get(path).headers
    policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'self'"] and policy["img-src"] == ["'self'", "blob:", "data:"]
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not [name for name in headers if name.startswith("access-control")]
    assert "server" not in headers or "uvicorn" not in headers["server"]


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat/completions/", "/docs", "/redoc", "/health/"])
def test_unknown_addresses(client, path):
    assert refused(client.get(path), 404)["type"] == "not_found_error"


def test_page_files_have_their_types(client):
    for path, kind in [
        ("/", "text/html"),
        ("/page/app.js", "javascript"),
        ("/page/style.css", "text/css"),
        ("/page/icon.svg", "svg"),
    ]:
        assert kind in client.get(path).headers["content-type"]
