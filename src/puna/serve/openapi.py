"""The API as an OpenAPI document, GET /openapi.json: written from the same schemas that check the requests.

The handlers read bodies themselves (body.py: bounds, strict JSON), so the framework cannot know their types; here they
are put beside their addresses. Tests let schemathesis make up requests from it.
"""

from __future__ import annotations

from functools import cache

from pydantic.json_schema import models_json_schema

from puna.serve.responses import ResponseRequest
from puna.serve.schemas import ChatRequest, CompletionRequest, TokenizeRequest

POSTS = {
    "/v1/chat/completions": (ChatRequest, "Answer a conversation; pictures and videos as data URLs"),
    "/v1/completions": (CompletionRequest, "Continue a text"),
    "/v1/responses": (ResponseRequest, "Answer an input, stateless"),
    "/tokenize": (TokenizeRequest, "The token ids of a text or a conversation"),
}
GETS = {
    "/v1/models": "The one model, with its size, checkpoint hash and limits", "/health": "Can the engine answer?",
    "/ready": "Would a request be taken now?", "/metrics": "Counters in Prometheus' text format",
    "/openapi.json": "This document",
}  # fmt: skip
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_EVENT = {  # each of a stream
    "type": "object", "required": ["data"], "additionalProperties": False,
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}  # fmt: skip
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "additionalProperties": False,
        "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
    }},
}  # fmt: skip
_REFUSALS = {
    "400": "A field is wrong; `param` names it", "401": "The API key is missing or wrong",
    "403": "Another site's page, or another host's name", "404": "There is no such model",
    "405": "Another method", "408": "The body came too slowly", "413": "The body is too long",
    "415": "The body is not application/json", "429": "Too many requests; see Retry-After",
    "500": "The engine failed on this request alone", "503": "The server is stopping",
    "504": "The answer took too long",
}  # fmt: skip


@cache
def document(version: str) -> dict:
    """The OpenAPI 3.1 document."""
    models = [(kind, "validation") for kind, _ in POSTS.values()]
    names, schemas = models_json_schema(models, ref_template="#/components/schemas/{model}")
    refusal = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {status: {"description": text, "content": refusal} for status, text in _REFUSALS.items()}
    paths: dict = {}
    for path, (kind, summary) in POSTS.items():
        content: dict = {"application/json": {"schema": {"type": "object"}}}
        if path in STREAMED:
            content["text/event-stream"] = {"schema": _EVENT}
        body = {"required": True, "content": {"application/json": {"schema": names[(kind, "validation")]}}}
        responses = {"200": {"description": "The answer", "content": content}, **refusals}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, summary in GETS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        content = {kind: {"schema": {"type": "string"} if path == "/metrics" else {"type": "object"}}}
        responses = {"200": {"description": "So it is", "content": content}, **refusals}
        if path in ("/health", "/ready"):
            responses["503"] = {"description": "No", "content": {"application/json": {"schema": {"type": "object"}}}}
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    return {
        "openapi": "3.1.0", "info": {"title": "puna", "version": version}, "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": _ERROR}},
    }  # fmt: skip
