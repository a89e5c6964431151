"""One row of somebody's chat data, in the two shapes people have it, as the messages the processor reads.

    OpenAI     {"messages": [{"role": "user", "content": "hi" or [parts]}, ...], "tools": [...]}
               parts: {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}},
               {"type": "image", "image" or "path" or "url": ...}
    ShareGPT   {"conversations": [{"from": "human", "value": "hi"}, ...], "system": "...", "image" or "images": ...}
               `<image>` in a human's text stands for the next picture of the list; `function_call` says JSON

A picture is a path (relative to the file the row is in) or a data URL; nothing is ever fetched. It is opened once while
the rows are checked, for its size and to know that it can be opened; afterwards a `UserPicture` says where to find it:
a million rows hold no pixels in memory, and none of them in the packed rows' files.

Bad rows are collected (`BadRows`), so that one run tells about all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image

from puna.errors import PunaError
from puna.processor import open_picture
from puna.processor.chat import HEADERS
from puna.tasks.pictures import PictureRef

ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant",
}  # fmt: skip
MARK = "<image>"
PICTURE_KEYS = ("image", "path", "url")


class BadRows:
    """What is wrong with rows, told together: the first `SHOWN` in words, all in number."""

    SHOWN = 5

    def __init__(self) -> None:
        self.count, self.first = 0, []

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Takes a PunaError of the block as a mistake of this row."""
        try:
            yield
        except PunaError as error:
            self.count += 1
            if self.count <= self.SHOWN:
                self.first.append(f"{where}: {error}")

    def check(self) -> None:
        """PunaError if there was any."""
        if self.count:
            more = f"; and {self.count - self.SHOWN} more rows" if self.count > self.SHOWN else ""
            raise PunaError("; ".join(self.first) + more)


@dataclass(frozen=True)
class Chat:
    """A conversation as `Processor.encode_chat` takes it, and where it was written."""

    messages: list[dict]
    where: str
    tools: list[dict] | None = None


@dataclass(frozen=True)
class UserPicture(PictureRef):
    """A picture file, or the `number`th picture of the row that begins at byte `offset` of a JSONL file."""

    kind: ClassVar[str] = "user"
    path: str
    width: int
    height: int
    offset: int | None = None
    number: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def open(self) -> Image.Image:
        if self.offset is None:
            return open_picture(Path(self.path))
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                record = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise PunaError(f"{self.path} was changed since its rows were packed ({error}): run again") from error
        return open_picture(_sources(record)[self.number])


def chat(record: dict, file: Path, offset: int, where: str) -> Chat:
    """The conversation of a row. PunaError says what is wrong with it; what is wrong inside a message (an empty one,
    unknown parts) the processor says when it encodes it."""
    pictures = _Pictures(file, offset)
    messages = _openai(record, pictures) if "messages" in record else _sharegpt(record, pictures)
    for number, message in enumerate(messages, 1):
        if not isinstance(message["role"], str) or message["role"] not in HEADERS:
            raise PunaError(
                f"message {number} has the unknown role {str(message['role'])[:40]!r}: use {', '.join(HEADERS)}"
            )
    if messages[-1]["role"] != "assistant":
        raise PunaError("the last message must be the assistant's: there is nothing to learn behind it")
    return Chat(messages, where, _tools(record.get("tools")))


def _tools(value: object) -> list[dict] | None:
    """Functions to offer, in OpenAI's form; ShareGPT's have them as JSON text, and without the type around them."""
    tools = _json(value, "tools") if isinstance(value, str) and value else value
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise PunaError(f"'tools' must be a list of functions, not {str(value)[:40]!r}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or []] or None


def _json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise PunaError(f"{what}: not JSON ({error})") from None


class _Pictures:
    """Opens the pictures of one row in their order."""

    def __init__(self, file: Path, offset: int):
        self.file, self.offset, self.number = file, offset, 0

    def __call__(self, source: object) -> dict:
        """The content part of the next picture."""
        self.number += 1
        if not isinstance(source, str) or not source:
            raise PunaError(f"picture {self.number} must be a path or a data URL, not {str(source)[:40]!r}")
        inside = source[:5].lower() == "data:" or "://" in source[:12]
        path = self.file.parent / source
        try:
            width, height = open_picture(source if inside else path).size
        except PunaError as error:
            raise PunaError(f"picture {self.number}: {error}" + ("" if inside else f" ({source[:80]})")) from None
        place = (str(self.file), width, height, self.offset, self.number - 1)
        picture = UserPicture(*place) if inside else UserPicture(str(path), width, height)
        return {"type": "image", "image": picture}


def _openai(record: dict, pictures: _Pictures) -> list[dict]:
    messages = _list(record, "messages")
    return [
        {**message, "role": "system" if message.get("role") == "developer" else message.get("role"),
         "content": _parts(message.get("content"), pictures)}
        for message in messages
    ]  # fmt: skip


def _parts(content: object, pictures: _Pictures) -> object:
    """Content whose pictures are opened; all else is left to the processor to judge."""
    if not isinstance(content, list):
        return content
    return [pictures(_picture(part)) if _is_picture(part) else part for part in content]


def _is_picture(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _picture(part: dict) -> object:
    """Where a part's picture is: a string, if the part is right."""
    value = part.get("image_url") if part["type"] == "image_url" else None
    if value is None:
        value = next((part[key] for key in PICTURE_KEYS if part.get(key)), None)
    return value.get("url") if isinstance(value, dict) else value


def _sharegpt(record: dict, pictures: _Pictures) -> list[dict]:
    turns, waiting = _list(record, "conversations"), _listed(record)
    messages = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for number, turn in enumerate(turns, 1):
        role, value = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in ROLES:
            raise PunaError(f"turn {number} is from the unknown {str(role)[:40]!r}: use {', '.join(ROLES)}")
        if not isinstance(value, str):
            raise PunaError(f"turn {number}: 'value' must be text, not {type(value).__name__}")
        if role == "function_call":
            call = _json(value, f"turn {number}")
            calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            continue
        content: object = value
        if waiting and ROLES[role] == "user" and MARK in value:
            content = []
            for i, text in enumerate(value.split(MARK)):
                if i:
                    if not waiting:
                        raise PunaError(f"turn {number}: more {MARK} marks than pictures under 'images'")
                    content.append(pictures(waiting.pop(0)))
                if text.strip("\n"):
                    content.append({"type": "text", "text": text.strip("\n") if i else text})
        messages.append({"role": ROLES[role], "content": content})
    if waiting:
        raise PunaError(f"{len(waiting)} of the pictures under 'images' have no {MARK} mark in a human's text")
    return messages


def _listed(record: dict) -> list:
    value = record.get("images") or record.get("image") or []
    return list(value) if isinstance(value, list) else [value]


def _list(record: dict, key: str) -> list[dict]:
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise PunaError(f'"{key}" must be a list of messages, and not empty')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise PunaError(f"message {number} must be an object, not {type(message).__name__}")
    return messages


def _sources(record: dict) -> list:
    """All pictures of a row, in the order in which `_Pictures` met them."""
    if "messages" not in record:
        return _listed(record)
    lists = (message["content"] for message in record["messages"] if isinstance(message.get("content"), list))
    return [_picture(part) for parts in lists for part in parts if _is_picture(part)]
