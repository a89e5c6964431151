"""One error type, one shape: every failure leaves the server as OpenAI's `{"error": {message, type, param, code}}`.

Clients (the official `openai` package among them) pick their exception class from the status and print `message`;
`param` names the field that was wrong. Nothing else is said: no stack, no path, no object address ever reaches a
client.
"""

from __future__ import annotations

import json
import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from puna.errors import PunaError

log = logging.getLogger("puna.serve")

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MESSAGES = {
    404: "there is nothing at this address; /openapi.json lists what there is",
    405: "this address does not answer this method",
}


class ApiError(Exception):
    """A request that is refused: HTTP status, one-line message, the field at fault, a short machine-readable code."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


def content(error: ApiError) -> dict:
    """The JSON object of an error, as OpenAI's API has it."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def response(error: ApiError) -> JSONResponse:
    """The error as an HTTP response. Lone surrogates in quoted input cannot break it: the JSON is pure ASCII."""
    return AsciiJSON(content(error), status_code=error.status, headers=error.headers)


class AsciiJSON(JSONResponse):
    """JSON escaped to ASCII, so that text of any kind (lone surrogates too) can be sent."""

    def render(self, content) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def install(app: FastAPI) -> None:
    """Give `app` the handlers: ours, the framework's 404 and 405, and every unforeseen exception as a bare 500."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError):
        return response(error)

    @app.exception_handler(PunaError)
    async def refused_inside(request: Request, error: PunaError):
        return response(ApiError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        message = _MESSAGES.get(error.status_code, str(error.detail))
        return response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception):
        log.error("unforeseen error", exc_info=error)
        return response(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))
