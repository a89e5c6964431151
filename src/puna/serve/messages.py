"""From a checked request to the processor's messages: who may speak when, how much text, and which pictures.

Pictures come only as data URLs, inside the request. A server that fetches addresses can be made to fetch its own
network's secrets (SSRF), and one that opens paths its own files; this one does neither, so the whole class is absent
(serving-and-evaluation.md, F.1). A picture's declared size is read and bounded before a single pixel is decoded.

Text is passed on as plain text. Whether it says `<|eot|>` or anything else, the processor encodes it apart from the
template's own control tokens (`Processor.encode_chat`), so it can never become one.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

from PIL import Image

from puna.errors import PunaError
from puna.processor.image import open_picture
from puna.processor.tools import offer, read_calls, with_tools
from puna.serve.errors import ApiError
from puna.serve.limits import Limits
from puna.serve.schemas import ChatRequest

_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
_ONLY_DATA = (
    "pictures must be data URLs (data:image/png;base64,... or jpeg, webp, gif); addresses and paths are refused"
)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def to_processor(request: ChatRequest, limits: Limits, sees: bool = True) -> list[dict]:
    """Messages for `Processor.encode_chat`, pictures opened. `sees`: whether the model has a vision part.

    Raises ApiError 400 for an impossible order of roles, too much text, or a picture that is refused."""
    order(request)
    budget = _Budget(limits, sees)
    messages = [_message(m, f"messages[{i}]", budget) for i, m in enumerate(request.messages)]
    _sort_results(messages)
    if not request.offered:
        return messages
    try:
        budget.text(offer(request.offered), "tools")
    except PunaError as error:
        raise ApiError(400, str(error), "tools", "invalid_value") from None
    return with_tools(messages, request.offered)


def order(request: ChatRequest) -> None:
    """At most one system message, first; every tool call answered right behind it, once; the last word is the user's
    or a tool's, so that there is something to answer."""
    waiting: list[str] = []  # ids of calls without a result
    for i, message in enumerate(request.messages):
        if message.role == "system" and i > 0:
            raise ApiError(400, "only the first message may be a system message", f"messages[{i}].role")
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                name = f"messages[{i}].tool_call_id"
                raise ApiError(400, "a tool message must answer a call of the assistant message before it, once", name)
            waiting.remove(message.tool_call_id)
        elif waiting:
            text = f"the tool call {waiting[0][:64]!r} has no tool message behind it"
            raise ApiError(400, text, f"messages[{i}].role")
        elif message.role == "assistant":
            waiting = [call.id for call in message.tool_calls or ()]
            if len(set(waiting)) < len(waiting):
                raise ApiError(400, "two tool calls have the same id", f"messages[{i}].tool_calls")
            if message.content is None and not waiting:
                raise ApiError(400, "content is missing", f"messages[{i}].content", "missing_parameter")
    last = len(request.messages) - 1
    if request.messages[last].role not in ("user", "tool") or waiting:
        raise ApiError(400, "the last message must be the user's, or the last tool's", f"messages[{last}].role")


def _sort_results(messages: list[dict]) -> None:
    """Brings tool results into the order of their calls: the model's format has no ids that could tell them apart."""
    calls: list[str] = []
    begin = 0
    for i, message in enumerate([*messages, {}]):
        if message.get("role") == "tool":
            continue
        messages[begin:i] = sorted(messages[begin:i], key=lambda m: calls.index(m["tool_call_id"]))
        calls, begin = [call["id"] for call in message.get("tool_calls") or ()], i + 1


class _Budget:
    """What is left of a request's allowance of text and pictures."""

    def __init__(self, limits: Limits, sees: bool):
        self.limits, self.sees = limits, sees
        self.chars = self.pictures = self.pixels = 0

    def text(self, text: str, name: str) -> str:
        if "\0" in text:
            raise ApiError(400, f"{name} holds a NUL character", name)
        self.chars += len(text)
        if self.chars > self.limits.text_chars:
            raise ApiError(400, f"more than {self.limits.text_chars} characters of text in one request", name)
        return text

    def picture(self, url: str, name: str) -> Image.Image:
        if not self.sees:
            raise ApiError(400, "this model reads text only; it cannot see pictures", name)
        self.pictures += 1
        if self.pictures > self.limits.pictures:
            raise ApiError(400, f"more than {self.limits.pictures} pictures in one request", name)
        data = _decode(url, name, self.limits.picture_bytes)
        width, height = _size(data, name)
        if max(width, height) > self.limits.picture_side:
            raise ApiError(400, f"a picture's side may have at most {self.limits.picture_side} pixels", name)
        if width * height > self.limits.picture_pixels:
            raise ApiError(400, f"a picture may have at most {self.limits.picture_pixels} pixels", name)
        self.pixels += width * height
        if self.pixels > self.limits.total_pixels:
            raise ApiError(400, f"the pictures have more than {self.limits.total_pixels} pixels together", name)
        try:
            return open_picture(data)
        except PunaError as error:
            raise ApiError(400, str(error), name, "invalid_picture") from None


def _message(message, name: str, budget: _Budget) -> dict:
    calls = [call.model_dump() for call in message.tool_calls or ()] if message.role == "assistant" else []
    ids = {"tool_call_id": message.tool_call_id} if message.role == "tool" else {}
    try:
        read_calls(calls)
    except PunaError as error:
        raise ApiError(400, str(error), f"{name}.tool_calls", "invalid_value") from None
    for i, call in enumerate(calls):
        budget.text(call["function"]["arguments"], f"{name}.tool_calls[{i}].function.arguments")
    content, name = message.content, f"{name}.content"
    if isinstance(content, str):
        parts = [{"type": "text", "text": budget.text(content, name)}]
    else:
        parts = [_part(part, f"{name}[{i}]", budget) for i, part in enumerate(content or ())]
    pictures = any(part["type"] == "image" for part in parts)
    if message.role == "user" and not pictures and not any(part["text"].strip() for part in parts):
        raise ApiError(400, f"{name} is empty", name)
    asked = {"tool_calls": calls} if calls else {}
    return {"role": message.role, "content": parts, **asked, **ids}


def _part(part, name: str, budget: _Budget) -> dict:
    if part.type == "text":
        return {"type": "text", "text": budget.text(part.text, f"{name}.text")}
    return {"type": "image", "image": budget.picture(part.image_url.url, f"{name}.image_url.url")}


def _decode(url: str, name: str, most: int) -> bytes:
    match = _DATA_URL.match(url)
    if match is None:
        raise ApiError(400, _ONLY_DATA, name, "invalid_picture")
    text = url[match.end() :]
    if len(text) * 3 // 4 > most + 2:
        raise ApiError(400, f"a picture may have at most {most} bytes", name)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the picture's base64 is broken", name, "invalid_picture") from None
    if not data:
        raise ApiError(400, "the picture is empty", name, "invalid_picture")
    if len(data) > most:
        raise ApiError(400, f"a picture may have at most {most} bytes", name)
    return data


def _size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height from the file's header alone; nothing is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, smaller limit speaks instead
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                return picture.size
    except Image.DecompressionBombError:
        raise ApiError(400, "the picture has too many pixels", name, "invalid_picture") from None
    except (OSError, ValueError, SyntaxError):
        raise ApiError(400, "the picture is not a readable PNG, JPEG, WebP or GIF file", name) from None
