"""What a chat request may say: parsed once, at the edge, into a checked `ChatRequest`; whatever is unknown is refused.

Servers that ignore what they don't understand answer a different question from the one asked (a `response_format` that
is silently dropped, a temperature of "0.5" read as 0). Here every field is checked strictly, and an unknown or not yet
supported one is a 400 that names it. JSON itself is read strictly too: no duplicate keys, no NaN, no bottomless
nesting, no lone surrogates.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError

from puna.serve.errors import ApiError
from puna.serve.limits import Limits

# Fields of OpenAI's API that exist but that this server does not do. Naming them apart gives a truer error message.
UNSUPPORTED = (
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "metadata", "modalities",
    "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "reasoning_effort", "response_format",
    "safety_identifier", "service_tier", "store", "top_logprobs", "user", "verbosity",
    "web_search_options",
)  # fmt: skip

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
INT64 = 2**63 - 1
COOLEST = 0.01  # below this, dividing logits by the temperature overflows; 0 is greedy


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Text = Annotated[str, StringConstraints(strict=True)]


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    """A picture as `data:image/...;base64,...`; addresses are refused (see messages.py)."""

    url: Text
    detail: Literal["auto"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL


# Pydantic puts the tag of a union's branch into an error's location. Ours begin with ~ so that `where` can drop them.
def _part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"~{kind}" if isinstance(kind, str) else None


def _content(value: Any) -> str | None:
    return "~string" if isinstance(value, str) else "~parts" if isinstance(value, list) else None


def _message(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"~{role}" if isinstance(role, str) else None


def _choice(function, message: str):
    return Discriminator(function, custom_error_type="choice", custom_error_message=message)


Part = Annotated[
    Annotated[TextPart, Tag("~text")] | Annotated[ImagePart, Tag("~image_url")],
    _choice(_part, "a content part must be an object of type 'text' or 'image_url'"),
]
TextOnly = Annotated[
    Annotated[TextPart, Tag("~text")],
    Field(description="a text part"),
]
UserContent = Annotated[
    Annotated[Text, Tag("~string")] | Annotated[list[Part], Tag("~parts")],
    _choice(_content, "content must be a string or a list of parts"),
]
PlainContent = Annotated[
    Annotated[Text, Tag("~string")] | Annotated[list[TextOnly], Tag("~parts")],
    _choice(_content, "content must be a string or a list of text parts; only user messages may hold pictures"),
]


class SystemMessage(Strict):
    role: Literal["system"]
    content: PlainContent


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent


class CalledFunction(Strict):
    name: Text
    arguments: Text  # JSON


class ToolCall(Strict):
    id: Text
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: PlainContent | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None  # these two because clients send answers back as they came
    boxes: list[dict[str, Any]] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: PlainContent
    tool_call_id: Text


Message = Annotated[
    Annotated[SystemMessage, Tag("~system")]
    | Annotated[UserMessage, Tag("~user")]
    | Annotated[AssistantMessage, Tag("~assistant")]
    | Annotated[ToolMessage, Tag("~tool")],
    _choice(_message, "a message must be an object whose role is 'system', 'user', 'assistant' or 'tool'"),
]


class Function(Strict):
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema, shown to the model
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    """POST /v1/chat/completions. Defaults are the engine's: greedy, the whole distribution, no stop strings."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: Text | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=INT64)] | None = None
    stop: Text | list[Text] | None = None
    n: Literal[1] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    @property
    def limit(self) -> int | None:
        """The number of tokens asked for, under either of its two names."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def offered(self) -> list[dict]:
        """The tools the model may call, without what the client left out or what only a server heeds."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools or ()]


def read_json(raw: bytes, limits: Limits) -> dict:
    """The body as a JSON object. Raises ApiError 400 with what was wrong, never more than the parser's own words."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"the key {twice[:64]!r} is given twice", twice[:64])
    return found


def _constant(name: str):
    raise ApiError(400, f"{name} is not JSON")


def where(location: tuple) -> str:
    """A field's name as users write it: ("messages", 0, "~user", "content") -> "messages[0].content"."""
    name = ""
    for step in location:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not step.startswith("~"):
            name += f".{step}" if name else step
    return name[:200]


def parse(raw: bytes, limits: Limits) -> ChatRequest:
    """Bytes of a request body -> ChatRequest. Raises ApiError 400 naming the field at fault."""
    fields = read_json(raw, limits)
    for name in fields:
        if name in UNSUPPORTED:
            raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
        if name not in ChatRequest.model_fields:
            raise ApiError(400, f"unknown field {name[:64]!r}", name[:64], "unknown_parameter")
    if isinstance(fields.get("messages"), list) and len(fields["messages"]) > limits.messages:
        raise ApiError(400, f"more than {limits.messages} messages", "messages")
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _first(error) from None
    _check(request, limits)
    return request


def _first(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints as ours; a union's remaining branches would only repeat it."""
    complaint = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = complaint["loc"]
    if location and location[0] == "stop":
        return ApiError(400, "stop must be a string or a list of strings", "stop")
    name = where(location)
    if complaint["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
    if complaint["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_parameter")
    return ApiError(400, f"{name}: {complaint['msg']}", name, "invalid_value")


def _check(request: ChatRequest, limits: Limits) -> None:
    """The rules that span fields, and the limits."""
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same; give one", "max_completion_tokens")
    name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
    if request.limit is not None and request.limit > limits.answer_tokens:
        raise ApiError(400, f"{name} may be at most {limits.answer_tokens}", name)
    if request.temperature is not None and 0 < request.temperature < COOLEST:
        raise ApiError(400, f"temperature must be 0 (greedy) or at least {COOLEST}", "temperature")
    if len(request.stops) > limits.stops:
        raise ApiError(400, f"at most {limits.stops} stop strings", "stop")
    for stop in request.stops:
        if not stop or len(stop) > limits.stop_chars:
            raise ApiError(400, f"a stop string must have 1 to {limits.stop_chars} characters", "stop")
