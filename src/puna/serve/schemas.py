"""What a request may say: parsed once, at the edge, into a checked object; whatever is unknown is refused.

Servers that ignore what they don't understand answer a different question from the one asked (a `response_format` that
is silently dropped, a temperature of "0.5" read as 0). Here every field is checked strictly, and an unknown or
unsupported one is a 400 that names it.

    POST /v1/chat/completions   ChatRequest         POST /tokenize    TokenizeRequest
    POST /v1/completions        CompletionRequest   POST /v1/responses is in responses.py, on top of a ChatRequest
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError

from puna.serve.errors import ApiError
from puna.serve.limits import Limits

INT64 = 2**63 - 1
COOLEST = 0.01  # below this, dividing logits by the temperature overflows; 0 is greedy


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


T = TypeVar("T")
Text = Annotated[str, StringConstraints(strict=True)]
Many = Annotated[list[T], Field(fail_fast=True)]  # the first wrong one of a million items is enough
Penalty = Annotated[float, Field(ge=-2, le=2)]


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


class VideoURL(Strict):
    """A video as `data:video/mp4;base64,...` (webm, too, and image/gif and image/webp), shown as so many `frames`."""

    url: Text
    frames: Annotated[int, Field(ge=1)] = 8


class VideoPart(Strict):
    type: Literal["video_url"]
    video_url: VideoURL


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
    Annotated[TextPart, Tag("~text")]
    | Annotated[ImagePart, Tag("~image_url")]
    | Annotated[VideoPart, Tag("~video_url")],
    _choice(_part, "a content part must be an object of type 'text', 'image_url' or 'video_url'"),
]
TextOnly = Annotated[
    Annotated[TextPart, Tag("~text")],
    Field(description="a text part"),
]
UserContent = Annotated[
    Annotated[Text, Tag("~string")] | Annotated[Many[Part], Tag("~parts")],
    _choice(_content, "content must be a string or a list of parts"),
]
PlainContent = Annotated[
    Annotated[Text, Tag("~string")] | Annotated[Many[TextOnly], Tag("~parts")],
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
    tool_calls: Many[ToolCall] | None = None
    refusal: None = None  # these two because clients send answers back as they came
    boxes: Many[dict[str, Any]] | None = None


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
    strict: bool | None = None  # true: tool_choice must be one that the grammar can enforce


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: Text


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # the answer keeps to the schema either way


class PlainText(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[PlainText, Tag("~text")]
    | Annotated[JsonObject, Tag("~json_object")]
    | Annotated[SchemaFormat, Tag("~json_schema")],
    _choice(_part, "response_format must be an object of type 'text', 'json_object' or 'json_schema'"),
]


class StreamOptions(Strict):
    include_usage: bool = False


class Sampled(Strict):
    """What every request for an answer may say about how its tokens are chosen. Defaults are the engine's: greedy, the
    whole distribution, no stop strings."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ()  # OpenAI's fields that this server does not do: a truer error message

    model: Text | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, le=INT64)] | None = None
    stop: Text | Many[Text] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    regex: Text | None = None  # ours: the whole answer matches it

    LENGTHS: ClassVar[tuple[str, ...]] = ("max_tokens",)  # the names of the one limit of an answer

    @property
    def limit(self) -> int | None:
        """The number of tokens asked for, under whichever of its names."""
        return next((n for name in self.LENGTHS if (n := getattr(self, name)) is not None), None)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def biases(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def top(self) -> int | None:
        """How many likeliest tokens are reported with each token; None: no log-probabilities at all."""
        return None

    def check(self, limits: Limits) -> None:
        """The rules that span fields, and the limits. Raises ApiError 400."""
        given = [name for name in self.LENGTHS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)} are the same; give one", given[-1])
        if given and self.limit > limits.answer_tokens:
            raise ApiError(400, f"{given[0]} may be at most {limits.answer_tokens}", given[0])
        if self.temperature is not None and 0 < self.temperature < COOLEST:
            raise ApiError(400, f"temperature must be 0 (greedy) or at least {COOLEST}", "temperature")
        if len(self.stops) > limits.stops:
            raise ApiError(400, f"at most {limits.stops} stop strings", "stop")
        for stop in self.stops:
            if not stop or len(stop) > limits.stop_chars:
                raise ApiError(400, f"a stop string must have 1 to {limits.stop_chars} characters", "stop")
        for token in self.logit_bias or ():
            if not re.fullmatch(r"\d{1,9}", token, re.ASCII):
                raise ApiError(400, "the keys of logit_bias must be token ids, such as \"1234\"", "logit_bias")
        if self.regex is not None and not 1 <= len(self.regex) <= limits.schema_chars:
            raise ApiError(400, f"regex must have 1 to {limits.schema_chars} characters", "regex")


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    UNSUPPORTED = (
        "audio", "function_call", "functions", "metadata", "modalities", "prediction", "prompt_cache_key",
        "reasoning_effort", "safety_identifier", "service_tier", "store", "user", "verbosity", "web_search_options",
    )  # fmt: skip
    LENGTHS = ("max_tokens", "max_completion_tokens")

    messages: Annotated[Many[Message], Field(min_length=1)]
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Many[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[dict]:
        """The tools the model may call, without what the client left out or what only a server heeds."""
        return [] if self.tool_choice == "none" else offered(self.tools)

    @property
    def forced(self) -> list[dict]:
        """The tools of which one must be called, by tool_choice; none: the model may choose to say something."""
        if self.tool_choice == "required":
            return self.offered
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return [tool for tool in self.offered if tool["function"]["name"] == name]

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if (self.n or 1) > limits.answers:
            raise ApiError(400, f"n may be at most {limits.answers}", "n")
        if self.tool_choice in ("auto", "required") and not self.tools:
            raise ApiError(400, f"tool_choice {self.tool_choice!r} needs tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and not self.forced:
            name = self.tool_choice.function.name[:64]
            raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
        if self.forced and self.stops:
            raise ApiError(400, "stop strings would cut the call that tool_choice demands; leave them out", "stop")
        if self.parallel_tool_calls is False and self.offered and not self.forced:
            text = "parallel_tool_calls: false is enforced only where tool_choice demands a call; leave it out"
            raise ApiError(400, text, "parallel_tool_calls", "unsupported_parameter")
        for i, tool in enumerate(self.tools or ()):
            if tool.function.strict and not self.forced:
                text = "strict is enforced only where tool_choice is 'required' or names a function; leave it out"
                raise ApiError(400, text, f"tools[{i}].function.strict", "unsupported_parameter")
        constraints = [name for name in ("regex", "response_format") if self._constrains(name)]
        if len(constraints) > 1:
            raise ApiError(400, "regex and response_format exclude each other; give one", "regex")
        if constraints and self.offered:
            text = f"{constraints[0]} and tools exclude each other: a call has a form of its own"
            raise ApiError(400, text, constraints[0])

    def _constrains(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and not isinstance(value, PlainText)


class CompletionRequest(Sampled):
    """POST /v1/completions, the older API: text (or token ids) goes on as text, without a conversation's form."""

    UNSUPPORTED = ("best_of", "suffix", "user")

    prompt: Text | Many[Text] | Many[int] | Many[Many[int]]
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default here

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        return self.prompt if several else [self.prompt]

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if not self.prompts or any(len(prompt) == 0 for prompt in self.prompts):
            raise ApiError(400, "a prompt must not be empty", "prompt")
        if len(self.prompts) * (self.n or 1) > limits.answers:
            raise ApiError(400, f"prompts times n may be at most {limits.answers}", "n" if self.n else "prompt")
        if sum(len(prompt) for prompt in self.prompts) > limits.text_chars:
            raise ApiError(400, f"more than {limits.text_chars} characters or token ids in one request", "prompt")
        if self.echo and self.logprobs is not None:
            text = "log-probabilities of a prompt are not supported: leave out echo or logprobs"
            raise ApiError(400, text, "echo", "unsupported_parameter")


class TokenizeRequest(Strict):
    """POST /tokenize: the token ids of a text, or of a conversation as the model reads it."""

    UNSUPPORTED: ClassVar[tuple[str, ...]] = ()

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: Many[Tool] | None = None

    def check(self, limits: Limits) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if self.tools is not None and self.messages is None:
            raise ApiError(400, "tools need messages", "tools")
        if len(self.prompt or "") > limits.text_chars:
            raise ApiError(400, f"more than {limits.text_chars} characters of text in one request", "prompt")


def offered(tools: list[Tool] | None) -> list[dict]:
    """Tools as `puna.processor.tools` takes them."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ()]


Request = TypeVar("Request", bound=Strict)
# What to say where a field is a choice of types: pydantic would list what each of them found wrong.
_CHOICES = {
    "stop": "must be a string or a list of strings",
    "input": "must be a string or a list of items, not empty",
    "prompt": "must be a string, a list of strings, a list of token ids, or a list of such lists",
    "tool_choice": "must be 'none', 'auto', 'required' or {\"type\": \"function\", \"function\": {\"name\": ...}}",
}


def parse(fields: dict, kind: type[Request], limits: Limits) -> Request:
    """A JSON object -> `kind`. Raises ApiError 400 naming the field at fault."""
    known = {field.alias or name for name, field in kind.model_fields.items()}
    for name in fields:
        if name in kind.UNSUPPORTED:
            raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
        if name not in known:
            raise ApiError(400, f"unknown field {name[:64]!r}", name[:64], "unknown_parameter")
    for name, kind_of, most in (("messages", list, limits.messages), ("input", list, limits.messages),
                                ("tools", list, limits.tools), ("logit_bias", dict, limits.biases)):  # fmt: skip
        if isinstance(fields.get(name), kind_of) and len(fields[name]) > most:
            raise ApiError(400, f"more than {most} entries of {name}", name)
    request = validated(fields, kind)
    request.check(limits)
    return request


def validated(fields: dict, kind: type[Request]) -> Request:
    """`kind` from a JSON object whose fields are known. Raises ApiError 400 with the first of pydantic's complaints."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first(error) from None


def where(location: tuple) -> str:
    """A field's name as users write it: ("messages", 0, "~user", "content") -> "messages[0].content"."""
    name = ""
    for step in location:
        if isinstance(step, int):
            name += f"[{step}]"
        elif not step.startswith("~"):
            name += f".{step}" if name else step
    return name[:200]


def _first(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints as ours; a union's remaining branches would only repeat it."""
    complaint = error.errors(include_url=False, include_input=False, include_context=False)[0]
    location = complaint["loc"]
    if location and location[0] in _CHOICES and complaint["type"] != "missing":
        return ApiError(400, f"{location[0]} {_CHOICES[location[0]]}", location[0], "invalid_value")
    name = where(location[:1] if location[:1] == ("logit_bias",) else location)  # its keys are the client's
    if complaint["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {name!r}", name, "unknown_parameter")
    if complaint["type"] == "missing":
        return ApiError(400, f"{name} is missing", name, "missing_parameter")
    return ApiError(400, f"{name}: {complaint['msg']}", name, "invalid_value")
