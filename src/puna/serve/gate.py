"""What holds for every address: security headers, whose pages may call, and how much body is read.

* Content-Security-Policy: scripts, styles and connections from this server alone, nothing inline; pictures also from
  `blob:` and `data:` (previews). Text of a model that slipped into markup could then still run nothing.
* No CORS header is ever sent, a foreign `Origin` is refused, and on a loopback server a foreign `Host` too: another
  site's page in the user's browser cannot talk to the model, not even by rebinding its own name to 127.0.0.1.
* A body is read up to a limit of bytes and seconds, whatever Content-Length claims.

Plain ASGI, not the framework's `BaseHTTPMiddleware`, which would hide a client's disconnect from the handlers.
"""

from __future__ import annotations

import asyncio
import ipaddress
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from puna.serve.errors import ApiError, response
from puna.serve.limits import Limits

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


class Gate:
    """ASGI middleware: refuses foreign hosts and origins, adds the security headers to every response."""

    def __init__(self, app, loopback_only: bool = False):
        self.app, self.loopback_only = app, loopback_only

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refuse(Headers(scope=scope))
        app = self.app if refusal is None else response(refusal)
        await app(scope, receive, send_with_headers)

    def refuse(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self.loopback_only and not is_loopback(hostname(host)):
            return ApiError(403, "this server answers only as localhost", code="foreign_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit_netloc(origin) != host.lower():
            return ApiError(403, "pages of other sites may not call this server", code="foreign_origin")
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


async def read_body(request: Request, limits: Limits) -> bytes:
    """The JSON body. Raises ApiError: 415 for another type or a compressed body, 413 past the limit, 408 when slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the request as content-type application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not accepted")
    too_long = ApiError(413, f"the body is longer than {limits.body_bytes} bytes", headers={"connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds} seconds"
        raise ApiError(408, message, headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left while sending") from None
    return bytes(data)
