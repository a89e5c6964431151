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

A video is the pictures of its frames, each behind its time, as in "[0:01.5]".

Ends of turns: <|eot|>; <|eom|> ("end of message, I expect an answer from a tool") behind an assistant's tool calls and
wherever a tool message follows. A tool's own message ends in <|eot|>, as in Hugging Face's template (Meta's code says
<|eom|> there). Functions and their calls are `puna.processor.tools`. No system message is ever added but to offer
functions: Meta's suggested one is left to the caller.

Source: llama4-facts.md §3.4, §4.2; serving-and-evaluation.md C.4, F.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from puna.errors import PunaError
from puna.processor.image import ImageProcessor
from puna.processor.tokenizer import Tokenizer, check_text
from puna.processor.tools import FORMS, OFFER, read_calls, with_tools, write_calls
from puna.processor.video import FRAMES, read_video

HEADERS = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython"}
_KEYS = {"role", "content", "name", "tool_call_id"}  # the last two are of other formats and say nothing to Llama 4

CHAT_TEMPLATE = r"""{#- Llama 4's chat format. Special strings inside message text are NOT neutralised by a template:
encode untrusted text apart, as puna's own processor does. tool_form: pythonic (default), json or function. -#}
{%- macro literal(value) -%}
  {%- if value is none -%}
    {{- 'None' -}}
  {%- elif value is boolean -%}
    {{- 'True' if value else 'False' -}}
  {%- elif value is string or value is number -%}
    {{- value | tojson -}}
  {%- elif value is mapping -%}
    {{- '{' -}}
    {%- for key, each in value.items() -%}
      {{- key | tojson ~ ': ' ~ literal(each) ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- '}' -}}
  {%- else -%}
    {{- '[' -}}
    {%- for each in value -%}
      {{- literal(each) ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ']' -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro call(function, form) -%}
  {%- if form == 'json' -%}
    {{- '{"name": ' ~ function.name | tojson ~ ', "parameters": ' ~ function.arguments | tojson ~ '}' -}}
  {%- elif form == 'function' -%}
    {{- '<function=' ~ function.name ~ '>' ~ function.arguments | tojson ~ '</function>' -}}
  {%- else -%}
    {{- function.name ~ '(' -}}
    {%- for key, value in function.arguments.items() -%}
      {{- key ~ '=' ~ literal(value) ~ ('' if loop.last else ', ') -}}
    {%- endfor -%}
    {{- ')' -}}
  {%- endif -%}
{%- endmacro -%}
{%- set offers = OFFERS -%}
{%- set form = tool_form | default('pythonic', true) -%}
{%- if form not in offers -%}
  {{- raise_exception('unknown tool_form ' ~ form) -}}
{%- endif -%}
{%- set offer = '' -%}
{%- if tools -%}
  {%- set offer = offers[form] ~ tools | map(attribute='function') | list | tojson -%}
{%- endif -%}
{{- '<|begin_of_text|>' -}}
{%- if offer and messages[0].role != 'system' -%}
  {{- '<|header_start|>system<|header_end|>\n\n' ~ offer ~ '<|eot|>' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
    {{- raise_exception('unknown role in message ' ~ loop.index) -}}
  {%- endif -%}
  {{- '<|header_start|>' ~ ('ipython' if message.role == 'tool' else message.role) ~ '<|header_end|>\n\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- elif message.content or not message.tool_calls -%}
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
  {%- if offer and loop.first and message.role == 'system' -%}
    {{- '\n\n' ~ offer -}}
  {%- endif -%}
  {%- if message.tool_calls -%}
    {{- '[' if form == 'pythonic' -}}
    {%- for each in message.tool_calls -%}
      {%- if each.function.arguments is not mapping -%}
        {{- raise_exception('the arguments of a tool call must be an object, not JSON text') -}}
      {%- endif -%}
      {{- call(each.function, form) -}}
      {{- {'pythonic': ', ', 'json': '; ', 'function': ''}[form] if not loop.last -}}
    {%- endfor -%}
    {{- ']' if form == 'pythonic' -}}
  {%- endif -%}
  {{- '<|eom|>' if message.role == 'assistant' and (message.tool_calls or
      (loop.nextitem is defined and loop.nextitem.role == 'tool')) else '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
{%- endif -%}
""".replace("OFFERS", json.dumps({form: OFFER.format(form=text) for form, text in FORMS.items()}))
"""The same format as a Jinja template for other software, to ship with exports. ``<|image|>`` marks a picture, as the
Hugging Face processor expects; arguments of tool calls are objects there, never JSON text. Equal token ids, unless a
message begins with white space that holds a line end (one string merges it with the header's) or contains control
strings (which only segment-wise encoding defuses)."""


@dataclass
class Encoded:
    """A tokenised conversation or document of N tokens: `tokens` int32 [N]; `loss` bool [N], True where a model
    learns to predict the token; `pictures` in the order of their patch tokens."""

    tokens: np.ndarray
    loss: np.ndarray
    pictures: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


class Given(str):
    """Text of a document that is read and not learnt, such as the name of what is asked for."""


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


def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    generation_prompt: bool = False,
    tools: Sequence[dict] | None = None,
    tool_form: str = "pythonic",
    tile: int | None = None,
) -> Iterator[Segment]:
    """A conversation as segments; `tile`: the side in pixels that a video's frames must fit in. Raises `PunaError`
    naming the message (counted from 1) that is wrong."""
    if isinstance(messages, (str, bytes, dict)) or not isinstance(messages, Sequence):
        raise PunaError("messages must be a list of {role, content}")
    if not messages:
        raise PunaError("messages is empty: give at least one message")
    given = len(messages)
    messages = with_tools(messages, tools, tool_form) if tools else messages
    first = given - len(messages) + 1  # a system message put in front is number 0
    roles = [_role(message, number, first) for number, message in enumerate(messages, first)]
    if generation_prompt and roles[-1] == "assistant":
        raise PunaError(f"message {given} is already the assistant's: leave it out to have an answer generated")
    yield Segment("control", tokenizer.bos)
    for i, (message, role) in enumerate(zip(messages, roles, strict=True)):
        learn = role == "assistant"
        yield from _header(tokenizer, role)
        for part in _parts(message, role, i + first, tool_form, tile):
            yield Segment("text" if isinstance(part, str) else "picture", part, learn)
        calls_tool = learn and (bool(message.get("tool_calls")) or roles[i + 1 : i + 2] == ["tool"])
        yield Segment("control", tokenizer.eom if calls_tool else tokenizer.eot, learn)
    if generation_prompt:
        yield from _header(tokenizer, "assistant")


def _header(tokenizer: Tokenizer, role: str) -> Iterator[Segment]:
    yield Segment("control", tokenizer.header_start)
    yield Segment("text", HEADERS[role])
    yield Segment("control", tokenizer.header_end)
    yield Segment("text", "\n\n")


def _role(message: dict, number: int, first: int) -> str:
    if not isinstance(message, dict):
        raise PunaError(f"message {number} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in HEADERS:
        raise PunaError(f"message {number} has the unknown role {str(role)[:40]!r}: use {', '.join(HEADERS)}")
    if role == "system" and number > first:
        raise PunaError(f"message {number}: a system message can only be the first one")
    # Clients send the keys they do not use as null or as an empty list.
    known = _KEYS | {"tool_calls"} if role == "assistant" else _KEYS
    unknown = sorted(str(key) for key, value in message.items() if key not in known and value not in (None, [], {}))
    if unknown:
        raise PunaError(f"message {number} has the unsupported key {unknown[0][:40]!r}: use role and content")
    return role


def _parts(message: dict, role: str, number: int, form: str, tile: int | None) -> list:
    """The text strings and pictures of one message's content, and its calls."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str):
        found = [content]
    elif isinstance(content, (list, tuple)):
        found = [piece for part in content for piece in _part(part, role, number, tile)]
    elif content is None and calls:
        found = []
    else:
        raise PunaError(f"message {number}: content must be a string or a list of parts, not {type(content).__name__}")
    try:
        found += [write_calls(read_calls(calls), form)] if calls else []
        for part in found:
            if isinstance(part, str):
                check_text(part)
    except PunaError as error:
        raise PunaError(f"message {number}: {error}") from error
    parts: list = []
    for part in found:
        if parts and isinstance(part, str) and isinstance(parts[-1], str):
            parts[-1] += part  # neighbouring texts are one text, as in any template
        else:
            parts.append(part)
    # An assistant may have nothing to say and a tool nothing to report; the others' messages must hold something.
    if role in ("system", "user") and not any(not isinstance(part, str) or part.strip() for part in parts):
        raise PunaError(f"message {number} is empty: give it some text" + (" or a picture" if role == "user" else ""))
    return parts


def _part(part: object, role: str, number: int, tile: int | None) -> list:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PunaError(f"message {number}: a text part must hold a string under 'text'")
        return [part["text"]]
    if kind in ("image", "video") and role != "user":
        raise PunaError(f"message {number}: pictures can stand in user messages only, not in {role} messages")
    if kind == "image":
        if not is_picture(part.get("image")):
            raise PunaError(f"message {number}: an image part must hold a picture under 'image'; see open_picture")
        return [part["image"]]
    if kind == "video":
        try:
            frames = read_video(part.get("video"), part.get("frames", FRAMES), tile)
        except PunaError as error:
            raise PunaError(f"message {number}: {error}") from error
        return [piece for frame in frames for piece in (f"[{frame.time}]", frame.picture)]
    raise PunaError(f"message {number}: unknown content part {str(kind)[:40]!r}: use 'text', 'image' or 'video'")
