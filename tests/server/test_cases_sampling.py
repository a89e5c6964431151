"""Cases 21 to 34 (sampling) and 68 to 72 (structured output) of serving-and-evaluation.md F.4, each with the status it
must get; the server is well after it."""

import json
import re
import time

import pytest
from server_fakes import JSON, PATH, ask, case, refused

pytestmark = pytest.mark.usefixtures("still_well")
BAD = {
    (21, "temperature"): (-1, 2.1, 1e30, 1e-9, "0.5", True, [], {}),
    (22, "top_p"): (0, -0.1, 1.01, "1"),
    (23, "top_k"): (-5, 1.5, 2**70, "3", True),
    (24, "max_tokens"): (0, -1, 2**63, 1e3, "5", True, 5000),
    (24, "max_completion_tokens"): (0, 5000),
    (26, "n"): (0, -1, 10**6, "1", 1.5, 9),
    (27, "seed"): (2**63, -1, 0.5, "1"),
    (28, "stop"): ("", [""], ["a"] * 5, [1], 7, {"a": 1}, "x" * 65, [None]),
    (29, "logit_bias"): (
        {"1": 101}, {"1": -101}, {"-1": 1}, {"x": 1}, {"1": "1"}, [1], {"1.5": 1}, {"": 0}, {"٣": 1},
        {str(i): 1 for i in range(10**5)},
    ),
    (30, "top_logprobs"): (3, 21, -1, "5", True),
    (30, "logprobs"): (1, "true", 5),
    (31, "frequency_penalty"): (2.1, -2.1, "0", True),
    (31, "presence_penalty"): (1e300, -3, []),
    (31, "repetition_penalty"): (0, -1, 11, "1"),
    (31, "min_p"): (-0.1, 1.1, "0"),
    (33, "stream_options"): ({}, {"include_usage": True}, [], 1),
    (34, "min_tokens"): (1, 100),
    (32, "stream"): ("true", 1),
    (32, "model"): (1, [], {}),
    (70, "regex"): (1, "", "a" * 70_000, ["a"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "field, value",
    [case(n, f"{field}-{str(value)[:12]}", field, value) for (n, field), values in BAD.items() for value in values],
)
def test_fields_out_of_range(client, field, value):
    refused(client.post(PATH, json=ask(**{field: value})), 400, field)


@pytest.mark.parametrize(
    "field, text",
    [
        case(21, "overflow", "temperature", "1e999"), case(22, "overflow", "top_p", "1e999"),
        case(21, "nan", "temperature", "NaN"), case(31, "inf", "frequency_penalty", "1e999"),
        case(31, "minus-inf", "presence_penalty", "-1e999"), case(31, "nan", "repetition_penalty", "NaN"),
        case(29, "nan", "logit_bias", '{"1": NaN}'), case(29, "inf", "logit_bias", '{"1": 1e999}'),
        case(31, "min_p-nan", "min_p", "NaN"),
    ],
)  # fmt: skip
def test_numbers_that_are_none(client, field, text):
    body = json.dumps(ask(**{field: "HERE"})).replace('"HERE"', text).encode()
    refused(client.post(PATH, content=body, headers=JSON), 400, None if text.count("NaN") else field)


@pytest.mark.parametrize(
    "fields",
    [
        case(24, "null", {"max_tokens": None}), case(26, "two", {"n": 2}), case(28, "empty-list", {"stop": []}),
        case(28, "special", {"stop": ["<|eot|>", "<|header_start|>"]}), case(21, "zero", {"temperature": 0}),
        case(29, "bounds", {"logit_bias": {"1": -100, "2": 100}}),
        case(30, "most", {"logprobs": True, "top_logprobs": 20}),
        case(31, "bounds", {"frequency_penalty": 2, "presence_penalty": -2.0, "repetition_penalty": 1.1}),
        case(33, "with", {"stream": True, "stream_options": {"include_usage": True}}),
        case(32, "null", dict.fromkeys(("model", "stream_options", "temperature", "tools", "tool_choice", "regex"))),
    ],
)  # fmt: skip
def test_what_looks_odd_and_is_fine(client, fields):
    assert client.post(PATH, json=ask(**fields)).status_code == 200


def test_24_both_names_of_one_limit(client):
    refused(client.post(PATH, json=ask(max_tokens=1, max_completion_tokens=1)), 400, "max_completion_tokens")


def test_25_prompt_and_answer_longer_than_the_context(client):
    error = refused(client.post(PATH, json=ask("a" * 990, max_tokens=11)), 400, "messages", "context")
    assert error["code"] == "context_length_exceeded"


def test_25_default_length_gives_way_to_a_long_prompt(client):
    choice = client.post(PATH, json=ask("a" * 998)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "Hello th")
    refused(client.post(PATH, json=ask("a" * 1000)), 400, "messages", "context")


@pytest.mark.usefixtures("real_still_well")
def test_29_a_bias_beyond_the_vocabulary(real):
    refused(real.post(PATH, json=ask(logit_bias={"600000": 1})), 400, "logit_bias")


UNSUPPORTED = {
    PATH: ("audio", "functions", "function_call", "user", "store", "service_tier", "reasoning_effort"),
    "/v1/completions": ("suffix", "best_of", "user"),
    "/v1/responses": ("previous_response_id", "background", "conversation", "reasoning", "prompt", "metadata"),
}


@pytest.mark.parametrize(
    "path, field", [case(32, f"{path[4:]}-{f}", path, f) for path, fields in UNSUPPORTED.items() for f in fields]
)
def test_known_but_unsupported_fields(client, path, field):
    error = refused(client.post(path, json={field: None}), 400, field, "not supported")
    assert error["code"] == "unsupported_parameter"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}


@pytest.mark.parametrize(
    "body, param",
    [
        case(32, "top", ask(temprature=1), "temprature"),
        case(32, "message", {"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
        case(32, "part", ask([{"type": "text", "text": "a", "extra": 1}]), "messages[0].content[0].extra"),
        case(32, "url", ask([{**IMAGE, "image_url": {"url": "", "x": 1}}]), "messages[0].content[0].image_url.x"),
        case(32, "options", ask(stream=True, stream_options={"other": True}), "stream_options.other"),
        case(32, "template", ask(chat_template="{{ messages }}"), "chat_template"),
        case(32, "embeds", ask(prompt_embeds="AAAA"), "prompt_embeds"),
        case(32, "format", ask(response_format={"type": "text", "x": 1}), "response_format.x"),
    ],
)
def test_unknown_fields_at_every_level(client, body, param):
    assert refused(client.post(PATH, json=body), 400, param)["code"] == "unknown_parameter"


# ---------------------------------------------------------------- structured output
def schema(value):
    return ask("Give me JSON.", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


AT = "response_format"


@pytest.mark.parametrize(
    "body, param",
    [
        case(68, "contradiction", schema({"allOf": [{"type": "string"}, {"type": "number"}]}), AT),
        case(68, "no-value", schema({"enum": []}), AT),
        case(68, "type", schema({"type": "strnig"}), f"{AT}.json_schema.schema"),
        case(68, "properties", schema({"properties": [1]}), f"{AT}.json_schema.schema"),
        case(68, "remote", schema({"$ref": "http://127.0.0.1/x.json"}), f"{AT}.json_schema.schema"),
        case(68, "circle", schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
             f"{AT}.json_schema.schema"),
        case(68, "nowhere", schema({"$ref": "#/$defs/b"}), f"{AT}.json_schema.schema"),
        case(68, "no-schema", ask("JSON", response_format={"type": "json_schema"}), f"{AT}.json_schema"),
        case(68, "list", ask("JSON", response_format=[]), AT),
        case(68, "kind", ask("JSON", response_format={"type": "yaml"}), AT),
        case(69, "long", schema({"enum": [f"value number {i}" for i in range(10_000)]}), f"{AT}.json_schema.schema"),
        case(70, "unclosed", ask(regex="(a"), "regex"),
        case(70, "lookahead", ask(regex="(?=a)b"), "regex"),
        case(72, "no-word", ask("Hello", response_format={"type": "json_object"}), "messages"),
        case(71, "two", schema({"type": "string"}) | {"regex": "a"}, "regex"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("real_still_well")
def test_grammars_that_are_refused(real, body, param):
    began = time.monotonic()
    refused(real.post(PATH, json={**body, "max_tokens": 4}), 400, param)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "body, check",
    [
        case(69, "numbers", schema({"enum": list(range(10_000))}), lambda text: int(text) in range(10_000)),
        case(70, "catastrophic", ask(regex="((a|a)*)*b|(x+x+)+y"), lambda text: set(text) <= set("abxy")),
        case(70, "powers", ask(regex="((a{1,500}){1,500}){1,500}"), lambda text: set(text) == {"a"}),
        case(70, "plain", ask(regex="(yes|no), [0-9]{3}"), lambda text: re.fullmatch("(yes|no), [0-9]{3}", text)),
        case(72, "word", ask("JSON please", response_format={"type": "json_object"}), lambda text: text[0] == "{"),
        case(
            68, "tree",
            schema({"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
                    "required": ["next"], "additionalProperties": False}),
            lambda text: re.sub(r"\s", "", text).startswith('{"next":'),
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("real_still_well")
def test_grammars_that_are_kept_to(real, body, check):
    began = time.monotonic()
    choice = real.post(PATH, json={**body, "max_tokens": 40, "temperature": 1, "seed": 3}).json()["choices"][0]
    assert check(choice["message"]["content"]), choice
    assert time.monotonic() - began < 20


@pytest.mark.usefixtures("real_still_well")
def test_71_a_schema_cut_by_its_length_or_a_stop_string(real):
    """finish_reason tells, and what is there is the beginning of the answer that would have been valid."""
    body = schema({"type": "array", "items": {"enum": ["left", "right"]}, "minItems": 3, "maxItems": 3})
    whole = real.post(PATH, json={**body, "max_tokens": 100}).json()["choices"][0]
    assert len(json.loads(whole["message"]["content"])) == 3 and whole["finish_reason"] == "stop"
    cut = real.post(PATH, json={**body, "max_tokens": 4}).json()["choices"][0]
    assert cut["finish_reason"] == "length" and whole["message"]["content"].startswith(cut["message"]["content"])
    stopped = real.post(PATH, json={**body, "max_tokens": 100, "stop": ","}).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == whole["message"]["content"].partition(",")[0]
