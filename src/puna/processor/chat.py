r"""Conversations and documents as token ids: Llama 4's chat format.

    <|begin_of_text|>
    <|header_start|>user<|header_end|>\n\nhi<|eot|>
    <|header_start|>assistant<|header_end|>\n\n            <- the generation prompt ends here

A conversation is first *rendered* into segments: control ids set by this program, text that somebody wrote, pictures.
Each segment is encoded on its own, text always through `Tokenizer.encode`, which knows no control tokens. So no user,
no tool result and no earlier answer can open a header, end a turn or pretend to be a picture. Rendering to one string
and encoding that, as chat templates do, cannot give this guarantee.

A picture stands where its content part stands, as (llama4-facts.md §3.4)

    one tile:    <|image_start|> <|image|> patch*n <|image_end|>
    R x C tiles: <|image_start|> (tiles of patch*n with <|tile_x_separator|> between, then <|tile_y_separator|>) * R
                 <|image|> patch*n (the global tile) <|image_end|>

Ends of turns: <|eot|>; <|eom|> ("end of message, I expect an answer from a tool") when a tool message follows.

Source: llama4-facts.md §3.4, §4.2; serving-and-evaluation.md C.4, F.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from puna.errors import PunaError
from puna.processor.image import ImageProcessor
from puna.processor.tokenizer import Tokenizer, check_text

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
_KEYS = {"role", "content", "name", "tool_call_id"}  # the last two are of other formats and say nothing to Llama 4

CHAT_TEMPLATE = r"""{#- Llama 4's chat format. Special strings inside message text are NOT neutralised by a template:
encode untrusted text apart, as puna's own processor does. -#}
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
    {{- raise_exception('unknown role in message ' ~ loop.index) -}}
  {%- endif -%}
  {{- '<|header_start|>' ~ ('ipython' if message.role == 'tool' else message.role) ~ '<|header_end|>\n\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type == 'image' and message.role == 'user' -%}
        {{- '<|image|>' -}}
      {%- else -%}
        {{- raise_exception('wrong content part in message ' ~ loop.index) -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|eom|>' if message.role == 'assistant' and loop.nextitem is defined and loop.nextitem.role == 'tool'
      else '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
{%- endif -%}
"""
"""The same format as a Jinja template for other software, to ship with exports. ``<|image|>`` marks a picture, as the
Hugging Face processor expects. Equal token ids, unless a message begins with white space that holds a line end (one
string merges it with the header's) or contains control strings (which only segment-wise encoding defuses)."""


@dataclass
class Encoded:
    """A tokenised conversation or document of N tokens: `tokens` int32 [N]; `loss` bool [N], True where a model
    learns to predict the token; `pictures` in the order of their patch tokens."""

    tokens: np.ndarray
    loss: np.ndarray
    pictures: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: `kind` "control" (`value`: an id), "text" (a string) or "picture"."""

    kind: str
    value: Any
    loss: bool = False


def is_picture(thing: object) -> bool:
    """Whether `thing` is a picture: a Pillow image or anything with `.size` and `.open()`."""
    return isinstance(thing, Image.Image) or (hasattr(thing, "size") and callable(getattr(thing, "open", None)))


def layout(tokenizer: Tokenizer, image: ImageProcessor, size: tuple[int, int]) -> list[int]:
    """The ids that stand for a picture of `size` (w, h) pixels: `image.tokens(w, h)` of them."""
    canvas = image.plan(*size)
    patches = [tokenizer.patch] * image.tokens_per_tile
    ids = [tokenizer.image_start]
    if canvas.rows * canvas.cols > 1:
        row = [*patches, *([tokenizer.tile_x, *patches] * (canvas.cols - 1)), tokenizer.tile_y]
        ids += row * canvas.rows
    return [*ids, tokenizer.image, *patches, tokenizer.image_end]


def render(tokenizer: Tokenizer, messages: Sequence[dict], generation_prompt: bool = False) -> Iterator[Segment]:
    """A conversation as segments. Raises `PunaError` naming the message (counted from 1) that is wrong."""
    if isinstance(messages, (str, bytes, dict)) or not isinstance(messages, Sequence):
        raise PunaError("messages must be a list of {role, content}")
    if not messages:
        raise PunaError("messages is empty: give at least one message")
    roles = [_role(message, number) for number, message in enumerate(messages, 1)]
    if generation_prompt and roles[-1] == "assistant":
        raise PunaError(f"message {len(roles)} is already the assistant's: leave it out to have an answer generated")
    yield Segment("control", tokenizer.bos)
    for number, (message, role) in enumerate(zip(messages, roles, strict=True), 1):
        learn = role == "assistant"
        yield from _header(tokenizer, role)
        for part in _parts(message.get("content"), role, number):
            yield Segment("text" if isinstance(part, str) else "picture", part, learn)
        calls_tool = learn and roles[number : number + 1] == ["tool"]
        yield Segment("control", tokenizer.eom if calls_tool else tokenizer.eot, learn)
    if generation_prompt:
        yield from _header(tokenizer, "assistant")


def _header(tokenizer: Tokenizer, role: str) -> Iterator[Segment]:
    yield Segment("control", tokenizer.header_start)
    yield Segment("text", HEADERS[role])
    yield Segment("control", tokenizer.header_end)
    yield Segment("text", "\n\n")


def _role(message: dict, number: int) -> str:
    if not isinstance(message, dict):
        raise PunaError(f"message {number} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in HEADERS:
        raise PunaError(f"message {number} has the unknown role {str(role)[:40]!r}: use {', '.join(HEADERS)}")
    if role == "system" and number > 1:
        raise PunaError(f"message {number}: a system message can only be the first one")
    # Clients send the keys they do not use as null or as an empty list.
    unknown = sorted(str(key) for key, value in message.items() if key not in _KEYS and value not in (None, [], {}))
    if unknown:
        raise PunaError(f"message {number} has the unsupported key {unknown[0][:40]!r}: use role and content")
    return role


def _parts(content: object, role: str, number: int) -> list:
    """The text strings and pictures of one message's content."""
    if isinstance(content, str):
        parts = [content]
    elif isinstance(content, (list, tuple)):
        parts = []
        for part in (_part(part, role, number) for part in content):
            if parts and isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += part  # neighbouring texts are one text, as in any template
            else:
                parts.append(part)
    else:
        raise PunaError(f"message {number}: content must be a string or a list of parts, not {type(content).__name__}")
    for part in parts:
        if isinstance(part, str):
            try:
                check_text(part)
            except PunaError as error:
                raise PunaError(f"message {number}: {error}") from error
    # An assistant may have nothing to say and a tool nothing to report; the others' messages must hold something.
    if role in ("system", "user") and not any(not isinstance(part, str) or part.strip() for part in parts):
        raise PunaError(f"message {number} is empty: give it some text" + (" or a picture" if role == "user" else ""))
    return parts


def _part(part: object, role: str, number: int) -> object:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PunaError(f"message {number}: a text part must hold a string under 'text'")
        return part["text"]
    if kind == "image":
        if role != "user":
            raise PunaError(f"message {number}: pictures can stand in user messages only, not in {role} messages")
        if not is_picture(part.get("image")):
            raise PunaError(f"message {number}: an image part must hold a picture under 'image'; see open_picture")
        return part["image"]
    raise PunaError(f"message {number}: unknown content part {str(kind)[:40]!r}: use 'text' or 'image'")
