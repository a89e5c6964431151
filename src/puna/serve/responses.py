"""POST /v1/responses, stateless: OpenAI's newer API as another way to write a chat request and its answer.

    {"instructions": "Be brief.", "input": [                          {"messages": [{"role": "system", ...},
      {"role": "user", "content": "1 + 1?"},                             {"role": "user", ...},
      {"type": "function_call", "call_id": "c1", "name": "add", ...},    {"role": "assistant", "tool_calls": [...]},
      {"type": "function_call_output", "call_id": "c1", ...}]}           {"role": "tool", "tool_call_id": "c1", ...}]}

So a `ResponseRequest` becomes a `ChatRequest` and meets the same checks; errors name the input item. Nothing is kept:
`store: true` and `previous_response_id` are refused.

A stream is a sequence of named events, each with a sequence_number:

    response.created, response.in_progress
    response.output_item.added, response.content_part.added          a message begins
    response.output_text.delta ...                                   (with `boxes`, our addition, where one is complete)
    response.output_text.done, response.content_part.done, response.output_item.done
    response.output_item.added, response.function_call_arguments.delta, ….done, response.output_item.done       a call
    response.completed, response.incomplete (cut at max_output_tokens) or response.failed
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from puna.serve.answers import Piece
from puna.serve.chat import Counts
from puna.serve.errors import ApiError
from puna.serve.limits import Limits
from puna.serve.schemas import ChatRequest, JsonSchema, Many, Sampled, Strict, Text, parse
from puna.serve.stream import Reader, Speller, event, guarded


class FunctionTool(Strict):
    """A function, in this API's flat form."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    type: Literal["function"]
    name: Text


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Strict):
    format: TextFormat | None = None


class ResponseRequest(Sampled):
    """The fields of POST /v1/responses."""

    UNSUPPORTED = (
        "background", "conversation", "max_tool_calls", "metadata", "previous_response_id", "prompt",
        "prompt_cache_key", "reasoning", "safety_identifier", "service_tier", "stream_options", "user",
    )  # fmt: skip
    LENGTHS = ("max_output_tokens",)

    input: Text | Annotated[Many[dict[str, Any]], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=2**63 - 1)] | None = None
    text: TextOptions | None = None
    tools: Many[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Many[Literal["message.output_text.logprobs"]] | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs and not self.include:
            text = 'top_logprobs needs include: ["message.output_text.logprobs"]'
            raise ApiError(400, text, "top_logprobs")


def parse_response(fields: dict, limits: Limits) -> tuple[ResponseRequest, ChatRequest, list[str]]:
    """A JSON object -> the checked request, the chat request that asks the same, and for each of its messages the name
    it has here. Raises ApiError 400."""
    if fields.get("store"):
        raise ApiError(400, "nothing is kept here: store must be false", "store", "unsupported_parameter")
    request = parse(fields, ResponseRequest, limits)
    chat, names = _as_chat(request)
    with renaming(names):
        return request, parse(chat, ChatRequest, limits), names


@contextlib.contextmanager
def renaming(names: Sequence[str]):
    """An ApiError about a field of the chat request becomes one about this API's field: messages[i] is names[i]."""
    try:
        yield
    except ApiError as error:
        found = re.match(r"messages\[(\d+)\](.*)", error.param or "")
        if found is None:
            renames = {"max_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}
            param = renames.get(error.param, (error.param or "").replace("response_format.json_schema", "text.format"))
        else:
            rest = found[2].replace(".image_url.url", ".image_url").replace(".tool_calls[0].function", "")
            param = names[int(found[1])] + rest
        message = error.message.replace(error.param or "\0", param)
        raise ApiError(error.status, message, param or None, error.code, error.headers) from None


def _as_chat(request: ResponseRequest) -> tuple[dict, list[str]]:
    """(a chat request's JSON object, the name in this request of each of its messages)."""
    messages: list[dict] = []
    names: list[str] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        names.append("instructions")
    items = request.input if isinstance(request.input, list) else [{"role": "user", "content": request.input}]
    for i, item in enumerate(items):
        name = f"input[{i}]" if isinstance(request.input, list) else "input"
        message = _message(item, name)
        calls = message.get("tool_calls")
        if calls and messages and messages[-1]["role"] == "assistant":  # one turn, in several items here
            messages[-1] = messages[-1] | {"tool_calls": messages[-1].get("tool_calls", []) + calls}
        else:
            messages.append(message)
            names.append(name)
    same = (
        "model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "frequency_penalty",
        "presence_penalty", "repetition_penalty", "logit_bias", "regex", "parallel_tool_calls",
    )  # fmt: skip
    chat: dict = {name: value for name in same if (value := getattr(request, name)) is not None}
    chat |= {"messages": messages, "max_tokens": request.limit, "response_format": _format(request)}
    if request.top is not None:
        chat |= {"logprobs": True, "top_logprobs": request.top}
    if request.tools is not None:
        flat = [tool.model_dump(exclude_none=True) for tool in request.tools]
        chat["tools"] = [{"type": tool.pop("type"), "function": tool} for tool in flat]
    if isinstance(request.tool_choice, FunctionChoice):
        chat["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.name}}
    else:
        chat["tool_choice"] = request.tool_choice
    return chat, names


def _format(request: ResponseRequest) -> dict | None:
    form = request.text.format if request.text is not None else None
    if form is None:
        return None
    given = form.model_dump(exclude_none=True, by_alias=True, exclude={"type"})
    if form.type != "json_schema":
        if given:
            raise ApiError(400, f"text.format of type {form.type!r} has no {next(iter(given))}", "text.format")
        return {"type": form.type}
    if form.schema_ is None:
        raise ApiError(400, "text.format.schema is missing", "text.format.schema", "missing_parameter")
    return {"type": "json_schema", "json_schema": given}


_FIELDS = {  # of an input item, by its type
    "message": {"type", "role", "content", "id", "status"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
}
_PART_FIELDS = {
    "input_text": {"type", "text"}, "output_text": {"type", "text", "annotations", "logprobs", "boxes"},
    "input_image": {"type", "image_url", "detail"},
}  # fmt: skip


def _message(item: dict, name: str) -> dict:
    """An input item as a chat message; what the chat request checks is not checked here."""
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ApiError(400, f"{name}.type must be {', '.join(_FIELDS)}", f"{name}.type", "invalid_value")
    _known(item, _FIELDS[kind], name)
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{name}.content[{i}]") for i, part in enumerate(content)]
    role = item.get("role")
    if role == "tool":
        raise ApiError(400, f"{name}.role: a tool's result is an item of type function_call_output", f"{name}.role")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(part: object, name: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PART_FIELDS:
        raise ApiError(400, f"{name} must be an object of type {', '.join(_PART_FIELDS)}", name, "invalid_value")
    _known(part, _PART_FIELDS[kind], name)
    if kind == "input_image":
        extra = {"detail": part["detail"]} if part.get("detail") is not None else {}
        return {"type": "image_url", "image_url": {"url": part.get("image_url"), **extra}}
    return {"type": "text", "text": part.get("text")}


def _known(item: dict, fields: set[str], name: str) -> None:
    for field in item:
        if field not in fields:
            raise ApiError(400, f"unknown field {name}.{field[:64]}", f"{name}.{field[:64]}", "unknown_parameter")


class Response:
    """The frame of one answer, and the objects and events made of its pieces."""

    def __init__(
        self, request: ResponseRequest, model: str, prompt_tokens: int, most_boxes: int, tools: Sequence[str] = (),
        speller: Speller | None = None,
    ):  # fmt: skip
        self.request, self.model, self.prompt_tokens, self.speller = request, model, prompt_tokens, speller
        self.id, self.created, self.counts = f"resp_{uuid.uuid4().hex}", int(time.time()), Counts(1)
        self.reader = Reader(most_boxes, tools)
        self.output: list[dict] = []  # finished and unfinished items
        self.sequence = -1

    def body(self, status: str, error: dict | None = None) -> dict:
        """The response object."""
        given, done = self.request, status in ("completed", "incomplete")
        tokens = {
            "input_tokens": self.prompt_tokens, "input_tokens_details": {"cached_tokens": self.counts.cached[0]},
            "output_tokens": self.counts.total, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.counts.total,
        }  # fmt: skip
        choice = given.tool_choice
        form = given.text.format if given.text is not None else None
        return {
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model, "status": status,
            "error": error, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": given.instructions, "max_output_tokens": given.max_output_tokens,
            "output": list(self.output), "parallel_tool_calls": given.parallel_tool_calls is not False,
            "previous_response_id": None, "store": False, "truncation": "disabled", "metadata": {},
            "temperature": given.temperature, "top_p": given.top_p,
            "text": {"format": form.model_dump(exclude_none=True, by_alias=True) if form else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
            "tools": [tool.model_dump() for tool in given.tools or ()], "usage": tokens if done else None,
        }  # fmt: skip

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict:
        """The response of a request that does not stream: the same events, of which only the last one counts."""
        return [data async for _, data in self._events(pieces)][-1]["response"]

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """The named events of a streamed response. A failure becomes response.failed, the last one."""

        async def lines():
            async for name, data in self._events(pieces):
                yield event(data, name)

        def failed(error: ApiError) -> bytes:
            cause = {"code": error.code or "server_error", "message": error.message}
            name, data = self._made("response.failed", response=self.body("failed", cause))
            return event(data, name)

        async for line in guarded(lines(), failed):
            yield line

    def _made(self, name: str, /, **fields) -> tuple[str, dict]:
        self.sequence += 1
        return name, {"type": name, "sequence_number": self.sequence, **fields}

    async def _events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[str, dict]]:
        yield self._made("response.created", response=self.body("in_progress"))
        yield self._made("response.in_progress", response=self.body("in_progress"))
        spelled: list[dict] = []  # log-probabilities of tokens whose text is not out yet
        reason = "stop"
        async for _, piece in pieces:
            self.counts.take(0, piece)
            reason = piece.finish_reason or reason
            if self.speller is not None and piece.token is not None:
                spelled.append(self.speller.choice(piece))
            text, calls, boxes = self.reader.read(piece.text, bool(piece.finish_reason))
            if text:
                for made in self._more(text, boxes, spelled):
                    yield made
                spelled = []
            for call in calls:
                for made in (*self._close("completed"), *self._call(call)):
                    yield made
        status = "incomplete" if reason == "length" else "completed"
        if not self.output:  # an empty answer is a message, too
            for made in self._open():
                yield made
        for made in self._close(status):
            yield made
        yield self._made(f"response.{status}", response=self.body(status))

    def _open(self) -> list[tuple[str, dict]]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": [], "boxes": []}
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        self.output.append({**item, "content": []})
        at = {"output_index": len(self.output) - 1}
        made = [self._made("response.output_item.added", **at, item={**item, "content": []})]
        self.output[-1]["content"].append(part)
        blank = {**part, "logprobs": [], "annotations": [], "boxes": []}
        return [
            *made, self._made("response.content_part.added", **at, item_id=item["id"], content_index=0, part=blank)
        ]  # fmt: skip

    def _more(self, text: str, boxes: list[dict], spelled: list[dict]) -> list[tuple[str, dict]]:
        opened = [] if self._writing() else self._open()
        item = self.output[-1]
        part = item["content"][0]
        part["text"] += text
        part["logprobs"] += spelled
        part["boxes"] += boxes
        extra = {"boxes": boxes} if boxes else {}
        at = {"item_id": item["id"], "output_index": len(self.output) - 1, "content_index": 0}
        delta = self._made("response.output_text.delta", **at, delta=text, logprobs=spelled, **extra)
        return [*opened, delta]

    def _writing(self) -> bool:
        last = self.output[-1] if self.output else {}
        return last.get("type") == "message" and last["status"] == "in_progress"

    def _close(self, status: str) -> list[tuple[str, dict]]:
        """Ends the message that is being written, if one is."""
        if not self._writing():
            return []
        item = self.output[-1]
        item["status"] = status
        part, index = item["content"][0], len(self.output) - 1
        at = {"item_id": item["id"], "output_index": index, "content_index": 0}
        return [
            self._made("response.output_text.done", **at, text=part["text"], logprobs=part["logprobs"]),
            self._made("response.content_part.done", **at, part=part),
            self._made("response.output_item.done", output_index=index, item=item),
        ]

    def _call(self, call: dict) -> list[tuple[str, dict]]:
        """A call came whole, so its arguments are one delta."""
        item = {
            "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"], "name": call["name"],
            "arguments": call["arguments"], "status": "completed",
        }  # fmt: skip
        self.output.append(item)
        index = len(self.output) - 1
        at = {"item_id": item["id"], "output_index": index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        name, arguments = call["name"], call["arguments"]
        return [
            self._made("response.output_item.added", output_index=index, item=begun),
            self._made("response.function_call_arguments.delta", **at, delta=arguments),
            self._made("response.function_call_arguments.done", **at, name=name, arguments=arguments),
            self._made("response.output_item.done", output_index=index, item=item),
        ]
