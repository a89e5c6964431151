"""Tools through the official client: offered, called, answered, streamed; and what is refused."""

import contextlib
import json

import openai
import pytest
from server_fakes import PATH, FakeEngine, ask, make_app, refused, running
from starlette.testclient import TestClient

from puna.processor.tools import FORMS, Call, offer, write_calls

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "clock"}},
]
CALLS = [Call("add", {"a": [1, {"b": "größe ]})"}]}), Call("clock")]


def results(*ids):
    """A conversation in which `add` (id 1) and `clock` (id 2) were called and results came in the order of `ids`."""
    calls = [{"id": str(i), "type": "function", "function": {"name": n, "arguments": a}}
             for i, n, a in ((1, "add", '{"a": 1}'), (2, "clock", "{}"))]  # fmt: skip
    return [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": i, "content": f"result {i}"} for i in ids),
    ]


@contextlib.contextmanager
def official(engine):
    with (
        running(make_app(engine)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client.chat.completions


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_round(form):
    """The answer's calls run, the message goes back as it came, the results behind it, and the model answers."""
    engine = FakeEngine(
        lambda messages: "It is 2." if messages[-1]["role"] == "tool" else f"Wait.\n{write_calls(CALLS, form)}"
    )
    messages = [{"role": "user", "content": "1 + 1?"}]
    with official(engine) as completions:
        answer = completions.create(model="tiny", messages=messages, tools=TOOLS).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content == "Wait.\n"
        called = answer.message.tool_calls
        assert [(c.function.name, json.loads(c.function.arguments)) for c in called] == [
            (c.name, c.arguments) for c in CALLS
        ]
        assert len({c.id for c in called}) == 2
        messages.append(answer.message)
        messages += [{"role": "tool", "tool_call_id": c.id, "content": c.function.name} for c in reversed(called)]
        final = completions.create(model="tiny", messages=messages, tools=TOOLS, tool_choice="auto").choices[0]
    assert (final.message.content, final.finish_reason, final.message.tool_calls) == ("It is 2.", "stop", None)
    first, second = (submitted[0] for submitted in engine.submitted)
    assert first[0] == second[0] == {"role": "system", "content": [{"type": "text", "text": offer(TOOLS)}]}
    assert [m["role"] for m in second] == ["system", "user", "assistant", "tool", "tool"]
    assert [m["content"][0]["text"] for m in second[3:]] == ["add", "clock"]  # in the order of the calls
    assert [c["function"]["name"] for c in second[2]["tool_calls"]] == ["add", "clock"]


@pytest.mark.parametrize("form", FORMS)
def test_streamed(form):
    text = f"See [1]: {write_calls(CALLS[:1], form)} and {write_calls(CALLS[1:], form)}"
    with official(FakeEngine(lambda m: text)) as completions:
        content, calls, reasons = "", {}, []
        for chunk in completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], tools=TOOLS, stream=True
        ):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            calls |= {call.index: call for call in delta.tool_calls or ()}
            reasons.append(chunk.choices[0].finish_reason)
    assert content == "See [1]:  and " and reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}
    assert {i: (c.function.name, json.loads(c.function.arguments)) for i, c in calls.items()} == {
        0: (CALLS[0].name, CALLS[0].arguments), 1: (CALLS[1].name, {}),
    }  # fmt: skip
    assert all(c.id and c.type == "function" for c in calls.values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("tools", "choice"), [(TOOLS, "none"), (None, None), ([], None), (TOOLS[1:], None)])
def test_what_was_not_offered_is_text(stream, tools, choice):
    """Also a call of a function that does not exist, and text that stays half a call."""
    engine = FakeEngine(lambda m: "[add(a=1)] [add(")
    with TestClient(make_app(engine)) as client:
        response = client.post(PATH, json=ask(tools=tools, tool_choice=choice, stream=stream))
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        content = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        assert not any("tool_calls" in c["choices"][0]["delta"] for c in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        message = response.json()["choices"][0]["message"]
        content = message["content"]
        assert "tool_calls" not in message
    assert content == "[add(a=1)] [add("
    assert len(engine.submitted[0][0]) == (2 if tools and choice != "none" else 1)


def test_an_answer_cut_short_keeps_its_reason():
    with TestClient(make_app(FakeEngine(lambda m: write_calls(CALLS[1:]) + " and so on and on"))) as client:
        choice = client.post(PATH, json=ask(tools=TOOLS, max_tokens=4)).json()["choices"][0]
    assert choice["finish_reason"] == "length" and len(choice["message"]["tool_calls"]) == 1


def called(arguments):
    """A conversation with one call and its result."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [results()[0], asked, {"role": "tool", "tool_call_id": "1", "content": "2"}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (results(), "messages[1].role"),
        (results("1"), "messages[2].role"),
        (results("1", "1"), "messages[3].tool_call_id"),
        (results("1", "2", "2"), "messages[4].tool_call_id"),
        (results("3"), "messages[2].tool_call_id"),
        ([*results("1"), {"role": "user", "content": "x"}], "messages[3].role"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id"),
        ([{"role": "assistant"}, {"role": "user", "content": "x"}], "messages[0].content"),
        (
            [results()[0], {"role": "assistant", "tool_calls": results()[1]["tool_calls"][:1] * 2}],
            "messages[1].tool_calls",
        ),
        (called("{"), "messages[1].tool_calls"),
        (called("[]"), "messages[1].tool_calls"),
        (called('{"a": "%s"}' % ("x" * 400_000)), "messages[1].tool_calls[0].function.arguments"),
    ],
)
def test_conversations_that_are_refused(client, messages, param):
    refused(client.post(PATH, json={"messages": messages, "tools": TOOLS}), 400, param)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": "x"}, "tools", ""),
        ({"tools": [{}]}, "tools[0].type", ""),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "tool 1"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two functions"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
            "",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict", ""),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 600_000}}]},
            "tools",
            "characters",
        ),
    ],
)
def test_tools_that_are_refused(client, fields, param, says):
    refused(client.post(PATH, json=ask(**fields)), 400, param, says)
