"""The body of a request, from the wire to a JSON object: bounded in bytes and time, and read strictly.

A body is read up to a limit of bytes and seconds, whatever Content-Length claims, and all bodies together up to
another, so that a thousand slow senders hold no more memory than one table row says. JSON is taken at its word: no
duplicate keys, no NaN, no bottomless nesting, no millions of values (each may become an error message), no lone
surrogates, since what two parsers read differently is how checks are passed by.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from puna.serve.errors import ApiError
from puna.serve.limits import Limits

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Bodies:
    """Reads bodies; `held` counts the bytes of those that are being read."""

    def __init__(self, limits: Limits):
        self.limits, self.held = limits, 0

    async def json(self, request: Request) -> dict:
        """The body as a JSON object. Raises ApiError: 415 for another type or a compressed body, 413 past the limit,
        408 when slow, 429 where all bodies together are too many bytes, 400 for what is no JSON object."""
        limits = self.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the request as content-type application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "compressed bodies are not accepted")
        close = {"connection": "close"}
        too_long = ApiError(413, f"the body is longer than {limits.body_bytes} bytes", headers=close)
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limits.body_bytes:
            raise too_long
        data = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for piece in request.stream():
                    data += piece
                    self.held += len(piece)
                    if len(data) > limits.body_bytes:
                        raise too_long
                    if self.held > limits.held_bytes:
                        text = f"more than {limits.held_bytes} bytes of requests are arriving; try again shortly"
                        raise ApiError(429, text, code="overloaded", headers=close | {"retry-after": "1"})
        except TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds} seconds"
            raise ApiError(408, message, headers=close) from None
        except ClientDisconnect:
            raise ApiError(400, "the client left while sending") from None
        finally:
            self.held -= len(data)
        if len(data) < 2**16:
            return read_json(bytes(data), limits)
        return await asyncio.to_thread(read_json, bytes(data), limits)  # long ones don't hold up the streams


def read_json(raw: bytes, limits: Limits) -> dict:
    """The body as a JSON object. Raises ApiError 400 with what was wrong, never more than the parser's own words."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    if text.count(",") > limits.json_values:
        raise ApiError(400, f"the body has more than {limits.json_values} commas: too many values")
    if _depth(text, limits.json_depth) > limits.json_depth:
        raise ApiError(400, f"the body nests deeper than {limits.json_depth} levels")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except ValueError:  # Python refuses integers of more than 4,300 digits
        raise ApiError(400, "the body holds a number too long to read") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from None
    return value


def _depth(text: str, enough: int) -> int:
    """Deepest nesting of brackets outside strings; stops counting just past `enough`, so the cost is one pass."""
    depth = deepest = 0
    inside = escaped = False
    if text.count("[") + text.count("{") <= enough:
        return 0
    for character in text:
        if inside:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                inside = False
        elif character == '"':
            inside = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > enough:
                break
        elif character in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ApiError(400, f"the key {twice[:64]!r} is given twice", twice[:64])
    return found


def _constant(name: str):
    raise ApiError(400, f"{name} is not JSON")


