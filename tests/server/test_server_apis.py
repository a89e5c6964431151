"""The further addresses: log-probabilities, n, completions, responses, tokenize, metrics, the OpenAPI document."""

import json
import math
import re

import pytest
from server_fakes import PATH, FakeEngine, ask, data_url, make_app, official, refused
from starlette.testclient import TestClient

from puna.engine import Engine
from puna.engine.constrain import Constraint, Grammars
from puna.processor.tools import FORMS, Call, offer, write_calls
from puna.serve.limits import Limits
from puna.serve.schemas import ChatRequest, parse
from puna.serve.shape import constraint
from puna.serve.stream import Reader

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"


def engine_alone(real):
    """A second engine with the same model: the server's own belongs to its thread."""
    return Engine(real.engine.engine.model, real.engine.engine.processor)


def chunks(response):
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ---------------------------------------------------------------- log-probabilities and n
@pytest.mark.usefixtures("real_still_well")
def test_logprobs_are_the_models_own(real):
    """Whole and streamed they agree, spell the answer, and are the engine's own numbers."""
    body = ask("Where is the cat?", max_tokens=12, logprobs=True, top_logprobs=3)
    whole = real.post(PATH, json=body).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert len(entries) == 12 and whole["logprobs"]["refusal"] is None
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spelled.decode("utf-8", "replace") == whole["message"]["content"]
    [alone] = engine_alone(real).generate([body["messages"]], max_tokens=12)
    assert [e["logprob"] for e in entries] == pytest.approx(alone.logprobs, abs=1e-6)
    for entry in entries:
        top = [each["logprob"] for each in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry["logprob"] <= top[0] + 1e-6  # greedy, but for control tokens, which are never said
    streamed = [c["choices"][0] for c in chunks(real.post(PATH, json={**body, "stream": True}))]
    assert [e for c in streamed if c["logprobs"] for e in c["logprobs"]["content"]] == entries
    plain = real.post(PATH, json=ask("Where is the cat?", max_tokens=12)).json()["choices"][0]
    assert plain["logprobs"] is None and plain["message"] == whole["message"]


@pytest.mark.usefixtures("real_still_well")
def test_n_answers_are_those_of_n_seeds(real):
    body = ask("Name a word.", max_tokens=12, temperature=1.0)
    three = real.post(PATH, json={**body, "n": 3, "seed": 5}).json()
    alone = [real.post(PATH, json={**body, "seed": 5 + i}).json()["choices"][0]["message"] for i in range(3)]
    assert [c["message"] for c in three["choices"]] == alone and len({str(m) for m in alone}) == 3
    assert [c["index"] for c in three["choices"]] == [0, 1, 2] and three["usage"]["completion_tokens"] == 36
    texts = ["", "", ""]
    for chunk in chunks(real.post(PATH, json={**body, "n": 3, "seed": 5, "stream": True})):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [message["content"] for message in alone]


@pytest.mark.usefixtures("real_still_well")
@pytest.mark.parametrize(
    "fields",
    [{"logit_bias": {"300": 100}}, {"repetition_penalty": 9},
     {"temperature": 2, "seed": 1, "min_p": 0.5}, {"regex": "[0-9]{8}"}],
)  # fmt: skip
def test_sampling_fields_change_the_answer(real, fields):
    base = {key: value for key, value in fields.items() if key in ("temperature", "seed")}
    before = real.post(PATH, json=ask("Where is the cat?", max_tokens=24, **base)).json()["choices"][0]["message"]
    after = real.post(PATH, json=ask("Where is the cat?", max_tokens=24, **fields)).json()["choices"][0]["message"]
    assert before != after


# ---------------------------------------------------------------- completions
@pytest.mark.usefixtures("real_still_well")
def test_completions_continue_a_text(real):
    tokenizer = real.engine.engine.processor.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode("The quick brown")]
    [alone] = engine_alone(real).generate([ids], max_tokens=16)
    for prompt in ("The quick brown", ["The quick brown"], ids, [ids]):
        body = real.post(COMPLETIONS, json={"prompt": prompt}).json()
        assert body["object"] == "text_completion" and body["choices"][0]["text"] == alone.text
        assert body["usage"]["prompt_tokens"] == len(ids) and body["usage"]["completion_tokens"] == 16
    two = real.post(COMPLETIONS, json={"prompt": ["The quick brown", "O rato"], "n": 2, "max_tokens": 4}).json()
    assert [c["index"] for c in two["choices"]] == [0, 1, 2, 3]
    assert two["choices"][0]["text"] == two["choices"][1]["text"] == alone.text[: len(two["choices"][0]["text"])]
    assert two["choices"][2]["text"] != two["choices"][0]["text"]


@pytest.mark.usefixtures("real_still_well")
def test_completions_echo_logprobs_and_streams(real):
    tokenizer = real.engine.engine.processor.tokenizer
    body = {"prompt": "The quick", "max_tokens": 8}
    plain = real.post(COMPLETIONS, json=body).json()["choices"][0]
    assert plain["logprobs"] is None
    echo = real.post(COMPLETIONS, json={**body, "echo": True}).json()["choices"][0]
    assert echo["text"] == "The quick" + plain["text"]
    ids = tokenizer.encode("The quick")
    echoed = real.post(COMPLETIONS, json={"prompt": ids, "echo": True}).json()["choices"][0]["text"]
    assert echoed.startswith("The quick")
    whole = real.post(COMPLETIONS, json={**body, "logprobs": 2}).json()["choices"][0]
    numbers = whole["logprobs"]
    assert {len(v) for v in numbers.values()} == {8} and whole["text"] == plain["text"]
    assert all(len(top) in (1, 2) and max(top.values()) >= lp - 1e-6
               for top, lp in zip(numbers["top_logprobs"], numbers["token_logprobs"], strict=True))  # fmt: skip
    assert numbers["text_offset"] == sorted(numbers["text_offset"])
    fields = {**body, "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    streamed = chunks(real.post(COMPLETIONS, json=fields))
    assert "".join(c["choices"][0]["text"] for c in streamed if c["choices"]) == echo["text"]
    assert streamed[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
     ({"prompt": 7}, "prompt"), ({"prompt": ["a", 1]}, "prompt"), ({"prompt": [1.5]}, "prompt"),
     ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "best_of": 2}, "best_of"),
     ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"), ({"prompt": "a", "logprobs": 21}, "logprobs"),
     ({"prompt": ["a"] * 5, "n": 2}, "n"), ({"prompt": ["a"] * 9}, "prompt"), ({"prompt": "a", "tools": []}, "tools"),
     ({"prompt": "a" * 400_001}, "prompt")],
)  # fmt: skip
def test_completions_that_are_refused(client, fields, param):
    refused(client.post(COMPLETIONS, json=fields), 400, param)


@pytest.mark.usefixtures("real_still_well")
@pytest.mark.parametrize("ids", [[10**6], [-1], [2**70]])
def test_token_ids_out_of_range(real, ids):
    refused(real.post(COMPLETIONS, json={"prompt": ids}), 400)
    refused(real.post(COMPLETIONS, json={"prompt": ids, "echo": True}), 400)


# ---------------------------------------------------------------- responses
def test_responses_through_the_official_client():
    engine = FakeEngine(lambda m: 'Here: <box label="cat">1,2,3,4</box>.')
    with official(engine) as client:
        image = {"type": "input_image", "image_url": data_url(), "detail": "auto"}
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Where?"}, image]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "There.", "annotations": []}]},
            {"role": "user", "content": "Show me."},
        ]
        options = {"model": "tiny", "instructions": "Be brief.", "input": items, "store": False}
        answer = client.responses.create(**options, max_output_tokens=50, temperature=0.5)
        assert answer.output_text == engine.script(None) and answer.status == "completed" and answer.store is False
        assert answer.output[0].content[0].boxes == [{"label": "cat", "x1": 1, "y1": 2, "x2": 3, "y2": 4}]
        assert answer.usage.output_tokens == 10 and answer.instructions == "Be brief."
        messages, sampling, _ = engine.submitted[-1]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
        assert [p["type"] for p in messages[1]["content"]] == ["text", "image"]
        assert (sampling.max_tokens, sampling.temperature) == (50, 0.5)
        short = client.responses.create(**options, max_output_tokens=2)
        assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        events = list(client.responses.create(**options, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]  # fmt: skip
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(e.delta for e in events if e.type.endswith("text.delta")) == engine.script(None)
    final = events[-1].response
    assert final.output_text == answer.output_text and final.usage.output_tokens == 10
    assert events[2].item.id == final.output[0].id == events[5].item_id


@pytest.mark.parametrize("form", FORMS)
def test_responses_call_functions(form):
    """A whole round: offered, called, answered; the streamed events hold the same call."""
    calls = [Call("add", {"a": 1}), Call("clock")]
    engine = FakeEngine(lambda m: "It is 2." if m[-1]["role"] == "tool" else f"Wait. {write_calls(calls, form)}")
    tools = [
        {"type": "function", "name": "add", "description": "sums", "parameters": {"type": "object"}, "strict": False},
        {"type": "function", "name": "clock", "parameters": {}, "strict": None},
    ]
    with official(engine) as client:
        items: list = [{"role": "user", "content": "1 + 1?"}]
        answer = client.responses.create(model="tiny", input=items, tools=tools)
        assert [item.type for item in answer.output] == ["message", "function_call", "function_call"]
        assert [(c.name, json.loads(c.arguments)) for c in answer.output[1:]] == [("add", {"a": 1}), ("clock", {})]
        events = list(client.responses.create(model="tiny", input=items, tools=tools, stream=True))
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        assert [json.loads(e.arguments) for e in done] == [{"a": 1}, {}]
        assert [e.output_index for e in done] == [1, 2] and events[-1].type == "response.completed"
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        items += [{"type": "function_call_output", "call_id": c.call_id, "output": c.name} for c in answer.output[1:]]
        assert client.responses.create(model="tiny", input=items, tools=tools).output_text == "It is 2."
    messages = engine.submitted[-1][0]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "tool"]
    chat = [{"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}}},
            {"type": "function", "function": {"name": "clock", "parameters": {}}}]  # fmt: skip
    assert messages[0]["content"][0]["text"] == offer(chat)
    assert [c["function"]["name"] for c in messages[2]["tool_calls"]] == ["add", "clock"]


PICTURE = {"type": "input_image", "image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({}, "input"), ({"input": []}, "input"), ({"input": 1}, "input"), ({"input": " "}, "input.content"),
     ({"input": "a", "store": True}, "store"),
     ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
     ({"input": "a", "truncation": "auto"}, "truncation"), ({"input": "a", "n": 2}, "n"),
     ({"input": "a", "max_output_tokens": 5000}, "max_output_tokens"), ({"input": "a", "include": ["x"]}, "include[0]"),
     ({"input": "a", "top_logprobs": 2}, "top_logprobs"), ({"input": "a", "max_tokens": 2}, "max_tokens"),
     ({"input": [{"type": "reasoning"}]}, "input[0].type"), ({"input": [{"role": "user"}]}, "input[0].content"),
     ({"input": [{"role": "user", "content": "a", "x": 1}]}, "input[0].x"),
     ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
     ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0]"),
     ({"instructions": "x", "input": [{"role": "user", "content": [PICTURE]}]}, "input[0].content[0].image_url"),
     ({"input": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "input[1].role"),
     ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[0].tool_call_id"),
     ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
     ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format.schema"),
     ({"input": "a", "text": {"format": {"type": "text", "name": "x"}}}, "text.format"),
     ({"input": "a", "text": {"verbosity": "low"}}, "text.verbosity"),
     ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
     ({"input": "a", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice")],
)  # fmt: skip
def test_responses_that_are_refused(client, fields, param):
    error = refused(client.post(RESPONSES, json=fields), 400, param)
    assert "messages[" not in error["message"]


def test_responses_fail_as_events(client, engine):
    engine.script = lambda messages: RuntimeError("secret")
    refused(client.post(RESPONSES, json={"input": "a"}), 500)
    last = client.post(RESPONSES, json={"input": "a", "stream": True}).text.strip().split("\n\n")[-1]
    name, data = last.split("\n")
    data = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and data["response"]["status"] == "failed"
    assert data["response"]["error"]["code"] == "internal_error" and "secret" not in last


@pytest.mark.usefixtures("real_still_well")
def test_responses_are_the_chats_answers(real):
    text = real.post(PATH, json=ask("Where is the cat?", max_tokens=12)).json()["choices"][0]["message"]["content"]
    fields = {"input": "Where is the cat?", "max_output_tokens": 12}
    body = real.post(RESPONSES, json=fields).json()
    assert body["output"][0]["content"][0]["text"] == text != ""
    body = real.post(RESPONSES, json={**fields, "include": ["message.output_text.logprobs"], "top_logprobs": 2}).json()
    assert [len(e["top_logprobs"]) for e in body["output"][0]["content"][0]["logprobs"]] == [2] * 12
    shaped = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["left", "right"]}}}
    body = real.post(RESPONSES, json={**fields, "text": shaped}).json()
    assert json.loads(body["output"][0]["content"][0]["text"]) in ("left", "right")


# ---------------------------------------------------------------- tool_choice, by grammar
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object", "additionalProperties": False, "required": ["city", "days"],
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "maxProperties": 0}}}


@pytest.mark.usefixtures("real_still_well")
@pytest.mark.parametrize(
    ("choice", "stream"),
    [("required", False), ({"type": "function", "function": {"name": "weather"}}, True)],
    ids=["required", "named"],
)  # fmt: skip
def test_a_demanded_call_is_made_and_keeps_to_its_schema(real, choice, stream):
    """A random model, which has never seen a call, makes valid ones; without the demand it makes none."""
    tools = [WEATHER, CLOCK]
    for seed in range(2):
        fields = {"tools": tools, "max_tokens": 160, "temperature": 1.0, "seed": seed, "stream": stream}
        fields |= {"parallel_tool_calls": False}
        response = real.post(PATH, json=ask("Where is it warm?", tool_choice=choice, **fields))
        if stream:
            deltas = [c["choices"][0] for c in chunks(response)]
            calls = [call for c in deltas for call in c["delta"].get("tool_calls", ())]
            reason = deltas[-1]["finish_reason"]
        else:
            answer = response.json()["choices"][0]
            calls, reason = answer["message"]["tool_calls"], answer["finish_reason"]
        assert reason == "tool_calls" and len(calls) == 1
        name, arguments = calls[0]["function"]["name"], json.loads(calls[0]["function"]["arguments"])
        if choice != "required":
            assert name == "weather"
        if name == "weather":
            assert set(arguments) == {"city", "days"} and arguments["city"] in ("Rome", "Oslo")
            assert 1 <= arguments["days"] <= 9
        else:
            assert (name, arguments) == ("clock", {})
    free = real.post(PATH, json=ask("Where is it warm?", tools=tools, max_tokens=20)).json()["choices"][0]
    assert "tool_calls" not in free["message"]


@pytest.mark.usefixtures("real_still_well")
def test_several_calls_may_be_demanded_at_once(real):
    """Without parallel_tool_calls: false the grammar of "required" is a list of calls, and that is how it is read."""
    asked = parse(ask(tools=[WEATHER, CLOCK], tool_choice="required"), ChatRequest, Limits())
    engine = real.engine.engine
    grammar = Grammars(engine.processor.tokenizer, engine.config.vocab_size).start(
        Constraint(*constraint(asked, Limits()))
    )
    made = [{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}, {"name": "clock", "parameters": {}}]
    wrong = [{"name": "weather", "parameters": {"city": "Paris", "days": 3}}]
    tokens, others = (engine.processor.tokenizer.encode(json.dumps(calls)) for calls in (made, wrong))
    assert grammar.follow(tokens) == tokens and len(grammar.follow(others)) < len(others)
    _, calls, _ = Reader(9, ["weather", "clock"]).read(json.dumps(made), True)
    assert [{"name": c["name"], "parameters": json.loads(c["arguments"])} for c in calls] == made


# ---------------------------------------------------------------- numbers and descriptions
def test_metrics_count_what_happens(client, engine):
    def read():
        text = client.get("/metrics").text
        return {m[1]: float(m[2]) for m in re.finditer(r"^(\w+(?:\{[^}]*\})?) ([\d.e+-]+|NaN)$", text, re.M)}

    before = read()
    client.post(PATH, json=ask(n=2))
    client.post(PATH, json=ask(max_tokens=1))
    client.post(PATH, json=ask(temperature=-1))
    client.get("/made/up/by/a/stranger")
    after = read()

    def more(name):
        return after.get(name, 0) - before.get(name, 0)

    assert more('puna_responses_total{path="/v1/chat/completions",status="200"}') == 2
    assert more('puna_responses_total{path="/v1/chat/completions",status="400"}') == 1
    assert more('puna_responses_total{path="other",status="404"}') == 1
    assert more('puna_answers_total{finish_reason="stop"}') == 2
    assert more('puna_answers_total{finish_reason="length"}') == 1
    assert more("puna_answer_tokens_total") == 3 + 3 + 1 and more("puna_prompt_tokens_total") == 10
    assert more("puna_first_token_seconds_count") == 3 and more("puna_answer_seconds_count") == 3
    assert after["puna_engine_active"] == 0 and after["puna_server_places_taken"] == 0
    assert after["process_resident_memory_bytes"] > 1e6
    assert not any("stranger" in name for name in after) and not any(math.isnan(v) for v in after.values())
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_the_model_says_what_a_page_may_set(client):
    model = client.get("/v1/models").json()["data"][0]
    assert set(model["sampling"]) <= set(ChatRequest.model_fields) and "min_p" in model["sampling"]
    assert model["limits"]["text_chars"] == client.app.state.limits.text_chars


def test_ready_follows_places_and_the_engine(client, engine):
    assert client.get("/ready").json() == {"status": "ready"}
    client.app.state.places.taken = client.app.state.places.most
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
    client.app.state.places.taken = 0
    engine.alive = False
    assert client.get("/ready").status_code == client.get("/health").status_code == 503


@pytest.mark.usefixtures("real_still_well")
def test_tokenize_is_what_the_engine_reads(real):
    engine = real.engine.engine
    body = real.post("/tokenize", json=ask("Where is the cat?")).json()
    assert body["tokens"] == engine.prepare(ask("Where is the cat?")["messages"]).tokens.tolist()
    assert body["count"] == len(body["tokens"]) and "max_model_len" in body
    usage = real.post(PATH, json=ask("Where is the cat?", max_tokens=1)).json()["usage"]
    assert usage["prompt_tokens"] == body["count"]
    for fields, param in [({}, "prompt"), ({"prompt": "a", **ask()}, "prompt"), ({"prompt": "a", "tools": []}, "tools"),
                          ({"prompt": 1}, "prompt"), ({"messages": []}, "messages"), ({"x": "a"}, "x")]:  # fmt: skip
        refused(real.post("/tokenize", json=fields), 400, param)


def test_the_document_names_every_address(client):
    document = client.get("/openapi.json").json()
    routes = {(route.path, method.lower()) for route in client.app.routes for method in getattr(route, "methods", ())
              if method != "HEAD" and route.path not in ("/", "/v1/models/{name:path}")}  # fmt: skip
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == routes
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "min_p", "response_format", "regex"} <= set(fields)


def test_without_a_tokenizer_what_needs_one_is_refused():
    client = TestClient(make_app())
    refused(client.post(PATH, json=ask(logprobs=True)), 400, "logprobs", "tokenizer")
    refused(client.post(COMPLETIONS, json={"prompt": "a"}), 400, "prompt", "tokenizer")
    refused(client.post("/tokenize", json={"prompt": "a"}), 400, "prompt", "tokenizer")
