"""From a checked request to the engine's `Sampling`: how tokens are chosen, and what shape the answer must have.

Three fields shape an answer: `response_format`, `regex`, and a `tool_choice` that demands a call, a schema as well:

    {"anyOf": [{"type": "object", "properties": {"name": {"const": "add"}, "parameters": <add's schema>}, ...}, ...]}

that is Llama 4's JSON form of a call (llama4-facts.md §4.2), offered to the model in the same words and read back by
the same parser. The engine compiles the constraint in the caller's thread, so an impossible one is refused before
anything is queued.

Schemas come from strangers. They are read here first: references stay inside the document and lead somewhere, and
nothing is ever fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from puna.engine.constrain import Constraint
from puna.engine.sampler import Sampling
from puna.serve.errors import ApiError
from puna.serve.limits import Limits
from puna.serve.schemas import ChatRequest, JsonObject, Sampled, SchemaFormat

_TYPES = frozenset(("null", "boolean", "object", "array", "number", "integer", "string"))
_ONE = ("additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
DEFAULT_TOKENS = 512  # max_tokens of a request that names none


def samplings(request: Sampled, limits: Limits, n: int) -> list[Sampling]:
    """One `Sampling` for each of n answers to a prompt: seeds count up from the request's. max_tokens None: what is
    left of the context. Raises ApiError, or PunaError for what the engine itself refuses."""
    names = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.biases:
        given["logit_bias"] = request.biases
    if request.top:
        given["top_logprobs"] = request.top
    if (shape := constraint(request, limits)) is not None:
        given["constraint"] = Constraint(*shape)
    seeds = [None if request.seed is None else (request.seed + i) % 2**63 for i in range(n)]
    return [Sampling(max_tokens=request.limit, stop=request.stops, seed=seed, **given) for seed in seeds]


def constraint(request: Sampled, limits: Limits) -> tuple[str, str] | None:
    """(kind, text) of the grammar that the request's answers keep to; None: any text."""
    if request.regex is not None:
        return "regex", request.regex
    if not isinstance(request, ChatRequest):
        return None
    if isinstance(request.response_format, JsonObject):
        return "json_object", ""
    if isinstance(request.response_format, SchemaFormat):
        schema = request.response_format.json_schema.schema_
        return "json_schema", _text(schema, "response_format.json_schema.schema", limits)
    if request.forced:
        return "json_schema", _text(_call_schema(request, limits), "tools", limits)
    return None


def _call_schema(request: ChatRequest, limits: Limits) -> dict:
    """Calls of the functions that tool_choice demands: one object, or a list of them where several may be called."""
    calls, definitions = [], {}
    for tool in request.forced:
        name, parameters = tool["function"]["name"], tool["function"].get("parameters") or {}
        definitions[name] = {"type": "object"} | _moved(parameters, f"#/$defs/{name}")
        fields = {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}}
        calls.append(
            {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        )
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    one = request.parallel_tool_calls is False or request.tool_choice != "required"
    shape = call if one else {"type": "array", "items": call, "minItems": 1, "maxItems": limits.tools}
    return shape | {"$defs": definitions}


def _moved(schema: object, root: str) -> object:
    """A schema whose references count from `root`, since it is now a part of another document."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:] if key == "$ref" and isinstance(value, str) else _moved(value, root)
        for key, value in schema.items()
    }


def check_tools(request: ChatRequest, limits: Limits) -> None:
    """Every tool's parameters are a schema, though nobody may have to keep to it. Raises ApiError 400."""
    for i, tool in enumerate(request.tools or ()):
        if tool.function.parameters is not None:
            name = f"tools[{i}].function.parameters"
            _text(tool.function.parameters, name, limits)
            if tool.function.parameters.get("type", "object") != "object":
                raise ApiError(400, f"{name} must describe an object", name, "invalid_value")


def _text(schema: dict, name: str, limits: Limits) -> str:
    """The schema as JSON, checked. Raises ApiError 400 naming the place in it."""
    text = json.dumps(schema, ensure_ascii=False)
    if len(text) > limits.schema_chars:
        raise ApiError(400, f"{name} has more than {limits.schema_chars} characters", name, "invalid_value")
    for place, part in _parts(schema, name):
        if not isinstance(part, (dict, bool)):
            raise ApiError(400, f"{place} must be a JSON schema, an object", name, "invalid_value")
        if isinstance(part, bool):
            continue
        kinds = part.get("type", [])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
            raise ApiError(400, f"{place}.type must be of {', '.join(sorted(_TYPES))}", name, "invalid_value")
        for key in ("required", "enum", *_LISTS):
            if not isinstance(part.get(key, []), list):
                raise ApiError(400, f"{place}.{key} must be a list", name, "invalid_value")
        if "$ref" in part:
            _follow(schema, part, place, name)
    return text


def _parts(schema: object, name: str) -> Iterator[tuple[str, object]]:
    """(place, schema) for a schema and all schemas inside it. The body's own depth bounds the recursion."""
    yield name, schema
    if not isinstance(schema, dict):
        return
    for key in _ONE:
        if key in schema:
            yield from _parts(schema[key], f"{name}.{key}")
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            for i, each in enumerate(schema[key]):
                yield from _parts(each, f"{name}.{key}[{i}]")
    for key in _MAPS:
        if key in schema:
            if not isinstance(schema[key], dict):
                yield f"{name}.{key}", None
                continue
            for word, each in schema[key].items():
                yield from _parts(each, f"{name}.{key}.{word[:40]}")


def _follow(root: dict, part: dict, place: str, name: str) -> None:
    """References from `part` on lead to a schema that is none, within the document and without going round."""
    seen = set()
    while isinstance(part, dict) and "$ref" in part:
        target = part["$ref"]
        if not isinstance(target, str) or not target.startswith("#"):
            raise ApiError(400, f"{place}.$ref must begin with #: nothing is fetched", name, "invalid_value")
        if target in seen:
            raise ApiError(400, f"{place}.$ref goes round in a circle", name, "invalid_value")
        seen.add(target)
        part = root
        for step in target[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            part = part.get(step) if isinstance(part, dict) else None
        if not isinstance(part, (dict, bool)):
            raise ApiError(400, f"{place}.$ref leads nowhere", name, "invalid_value")
