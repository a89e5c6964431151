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
from collections.abc import Sequence

from PIL import Image

from puna.errors import PunaError
from puna.processor.image import open_picture
from puna.processor.tools import offer, read_calls, with_tools
from puna.processor.video import film_size
from puna.serve.errors import ApiError
from puna.serve.limits import Limits

_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
_ONLY_DATA = (
    "pictures must be data URLs (data:image/png;base64,... or jpeg, webp, gif); addresses and paths are refused"
)
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_FILM = re.compile(r"data:(video/(mp4|webm)|image/(gif|webp));base64,", re.IGNORECASE)
_ONLY_FILM = "videos must be data URLs (data:video/mp4;base64,... or video/webm, image/gif, image/webp)"


def to_processor(
    messages: Sequence, tools: Sequence[dict], limits: Limits, sees: bool = True, form: str = "pythonic"
) -> list[dict]:
    """A request's messages for `Processor.encode_chat`: pictures opened, `tools` offered in a `form`.

    sees: whether the model has a vision part. Raises ApiError 400 for an impossible order of roles, too much text, or a
    picture that is refused."""
    order(messages)
    budget = _Budget(limits, sees)
    found = [_message(m, f"messages[{i}]", budget) for i, m in enumerate(messages)]
    _sort_results(found)
    if not tools:
        return found
    try:
        budget.text(offer(tools, form), "tools")
    except PunaError as error:
        raise ApiError(400, str(error), "tools", "invalid_value") from None
    return with_tools(found, tools, form)


def order(messages: Sequence) -> None:
    """At most one system message, first; every tool call answered right behind it, once; the last word is the user's
    or a tool's, so that there is something to answer."""
    waiting: list[str] = []  # ids of calls without a result
    for i, message in enumerate(messages):
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
    last = len(messages) - 1
    if messages[last].role not in ("user", "tool") or waiting:
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
        data = _decode(url, name, self.limits.picture_bytes, _DATA_URL, _ONLY_DATA)
        self.area(*_size(data, name), name)
        try:
            return open_picture(data)
        except PunaError as error:
            raise ApiError(400, str(error), name, "invalid_picture") from None

    def video(self, url: str, frames: int, name: str) -> dict:
        """A content part with the file's bytes. What a decoder could be made to do is bounded from its header on."""
        if not self.sees:
            raise ApiError(400, "this model reads text only; it cannot see videos", name)
        self.pictures += frames
        if self.pictures > self.limits.pictures:
            raise ApiError(400, f"more than {self.limits.pictures} pictures and frames in one request", name)
        data = _decode(url, f"{name}.url", self.limits.picture_bytes, _FILM, _ONLY_FILM)
        try:
            width, height, count = film_size(data)
        except PunaError as error:
            raise ApiError(400, str(error), f"{name}.url", "invalid_picture") from None
        if count > self.limits.film_frames:
            raise ApiError(400, f"a video may have at most {self.limits.film_frames} frames", f"{name}.url")
        for _ in range(frames):
            self.area(width, height, f"{name}.url")
        return {"type": "video", "video": data, "frames": frames}

    def area(self, width: int, height: int, name: str) -> None:
        """Counts a picture's pixels. Raises ApiError 400 for too many."""
        if max(width, height) > self.limits.picture_side:
            raise ApiError(400, f"a picture's side may have at most {self.limits.picture_side} pixels", name)
        if width * height > self.limits.picture_pixels:
            raise ApiError(400, f"a picture may have at most {self.limits.picture_pixels} pixels", name)
        self.pixels += width * height
        if self.pixels > self.limits.total_pixels:
            raise ApiError(400, f"the pictures have more than {self.limits.total_pixels} pixels together", name)


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
    pictures = any(part["type"] != "text" for part in parts)
    if message.role == "user" and not pictures and not any(part["text"].strip() for part in parts):
        raise ApiError(400, f"{name} is empty", name)
    asked = {"tool_calls": calls} if calls else {}
    return {"role": message.role, "content": parts, **asked, **ids}


def _part(part, name: str, budget: _Budget) -> dict:
    if part.type == "text":
        return {"type": "text", "text": budget.text(part.text, f"{name}.text")}
    if part.type == "video_url":
        return budget.video(part.video_url.url, part.video_url.frames, f"{name}.video_url")
    return {"type": "image", "image": budget.picture(part.image_url.url, f"{name}.image_url.url")}


def _decode(url: str, name: str, most: int, form: re.Pattern, otherwise: str) -> bytes:
    match = form.match(url)
    if match is None:
        raise ApiError(400, otherwise, name, "invalid_picture")
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
