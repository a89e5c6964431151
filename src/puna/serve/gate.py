"""What holds for every address: security headers, whose pages may call, who has a key, and the last call.

* Content-Security-Policy: scripts, styles and connections from this server alone, nothing inline; pictures also from
  `blob:` and `data:` (previews). Text of a model that slipped into markup could then still run nothing.
* No CORS header is ever sent, a foreign `Origin` is refused, and on a loopback server a foreign `Host` too: another
  site's page in the user's browser cannot talk to the model, not even by rebinding its own name to 127.0.0.1.
* Where there are API keys, every address but /health wants one: `Authorization: Bearer KEY`, or as the password of HTTP
  Basic, which is how a browser can show the page. All keys are compared, as hashes, in constant time.
* A server that is stopping finishes what it has begun and answers new requests with 503.

Plain ASGI, not the framework's `BaseHTTPMiddleware`, which would hide a client's disconnect from the handlers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders

from puna.errors import PunaError
from puna.serve.errors import ApiError, response

CSP = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",
}


OPEN = ("/health",)  # answered without a key, and while the server stops
TENANT = "puna.tenant"  # scope key: the hash of the request's API key, which salts the prefix cache


class Keys:
    """The API keys of a server; none: everybody may ask. Only their SHA-256 is kept.

    A comparison that stops at the first wrong byte tells, by its time, how much of a guess was right. Here both sides
    are hashed, so the bytes compared are not the guesser's, `hmac.compare_digest` takes the same time for all of them,
    and every key is tried whether or not an earlier one fitted.
    """

    def __init__(self, keys: Iterable[str] = (), most: int = 512):
        keys, self.most = tuple(keys), most
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key or len(key) > most:
                raise PunaError(f"an API key must be 1 to {most} printable ASCII characters without spaces")
        self.hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def tenant(self, header: str) -> str | None:
        """The hash (hex) of the key in an Authorization header; None if it holds no valid one."""
        given = self._key(header)
        digest = hashlib.sha256(given.encode("utf-8", "replace")).digest()
        fits = [hmac.compare_digest(digest, each) for each in self.hashes]
        return digest.hex() if any(fits) else None

    def _key(self, header: str) -> str:
        scheme, _, value = header.partition(" ")
        if scheme.lower() == "basic" and len(value) <= 2 * self.most:
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return ""
        elif scheme.lower() != "bearer":
            return ""
        return value.strip()[: self.most + 1]


class Gate:
    """ASGI middleware: refuses foreign hosts and origins, wrong keys, and new work while stopping (`draining`); adds
    the security headers to every response."""

    def __init__(self, app, loopback_only: bool = False, keys: Keys | None = None, state=None):
        """state: has an attribute `draining`, true from the moment the server was told to stop."""
        self.app, self.loopback_only, self.keys, self.state = app, loopback_only, keys or Keys(), state

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refuse(Headers(scope=scope), scope)
        app = self.app if refusal is None else response(refusal)
        await app(scope, receive, send_with_headers)

    def refuse(self, headers: Headers, scope: dict) -> ApiError | None:
        host = headers.get("host", "")
        if self.loopback_only and not is_loopback(hostname(host)):
            return ApiError(403, "this server answers only as localhost", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit_netloc(origin) != host.lower():
            return ApiError(403, "pages of other sites may not call this server", code="foreign_origin")
        if scope["path"] in OPEN:
            return None
        if self.keys.hashes:
            scope[TENANT] = self.keys.tenant(headers.get("authorization", ""))
            if scope[TENANT] is None:
                message = "this server wants an API key: send the header Authorization: Bearer KEY"
                challenge = {"www-authenticate": 'Bearer, Basic realm="puna", charset="UTF-8"'}
                return ApiError(401, message, code="invalid_api_key", headers=challenge)
        if getattr(self.state, "draining", False) and scope["method"] == "POST":
            away = {"retry-after": "5", "connection": "close"}
            return ApiError(503, "this server is stopping; it takes no new requests", code="stopping", headers=away)
        return None


def urlsplit_netloc(origin: str) -> str | None:
    """`http://localhost:8000` -> `localhost:8000`; None for "null" and whatever is no web origin."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else None


def hostname(host: str) -> str:
    """The Host header without its port: `[::1]:80` -> `::1`."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
