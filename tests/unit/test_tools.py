"""Tool calls: three forms written and read, nested values, text before a call, and streams cut anywhere."""

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.processor.tools import DEPTH, FORMS, Call, CallParser, offer, parse_calls, read_calls, with_tools, write_calls

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(['"', "\\", "]})", "</function>", "'", "[f(a=1)]", '{"name": "f", "parameters": {}}', "\n\t\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NAMES = st.sampled_from(["f", "get_weather", "os.path-join", "_x1"])
CALLS = st.lists(
    st.builds(Call, NAMES, st.dictionaries(st.sampled_from(["a", "city", "_b2", "größe"]), VALUES, max_size=3)),
    min_size=1, max_size=3,
)  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für 2 Tage", "parameters": {"type": "object"}},
}


@settings(max_examples=150, deadline=None)
@given(CALLS, st.sampled_from(list(FORMS)), st.sampled_from(["", "Sure.\n\n", "1 < 2, [x] and {y}: "]))
def test_what_is_written_is_read(calls, form, before):
    assert parse_calls(before + write_calls(calls, form)) == (before, calls)


@pytest.mark.parametrize(
    ("text", "before", "calls"),
    [
        ('[f(a=1, b=[1, {"x": 2}])]', "", [Call("f", {"a": 1, "b": [1, {"x": 2}]})]),
        ("[f(a=1), g(b=[[1, [2]], []], c={'k': {'l': None}})]", "",
         [Call("f", {"a": 1}), Call("g", {"b": [[1, [2]], []], "c": {"k": {"l": None}}})]),
        ("Let me look.\n[ f ()  ,]", "Let me look.\n[ f ()  ,]", []),
        ("Let me look.\n[ f( ) , g( a = 'it\\'s' , ) , ] \n", "Let me look.\n", [Call("f"), Call("g", {"a": "it's"})]),
        ("[f(a=True, b=false, c=null, d=-1.5e3, e=0.5)]", "",
         [Call("f", {"a": True, "b": False, "c": None, "d": -1500.0, "e": 0.5})]),
        (r'[f(a="\u00e9\ud83d\ude00\x41\n\q\/")]', "", [Call("f", {"a": "é😀A\n\\q/"})]),
        ('{"name": "f", "parameters": {"a": {"b": [1]}}}', "", [Call("f", {"a": {"b": [1]}})]),
        ('{"type": "function", "name": "f", "parameters": {}}', "", [Call("f")]),
        ('{"parameters": {"a": 1}, "name": "f"}; {"name": "g", "arguments": {}}', "", [Call("f", {"a": 1}), Call("g")]),
        ('[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]', "", [Call("f"), Call("g")]),
        ('<function=f>{"a": "</function>"}</function>\n<function=g>{}</function>', "",
         [Call("f", {"a": "</function>"}), Call("g")]),
        ("[f(a=1)] and [g()] done", " and  done", [Call("f", {"a": 1}), Call("g")]),
        ("[f(a= see [g(x=1)]", "[f(a= see ", [Call("g", {"x": 1})]),
        ("[f(a=\"line\nbreak\")]", "", [Call("f", {"a": "line\nbreak"})]),
    ],
)  # fmt: skip
def test_read(text, before, calls):
    assert parse_calls(text) == (before, calls)


@pytest.mark.parametrize(
    "text",
    [
        "", "no call", "[]", "{}", "[1, 2, 3]", "[see f(x)]", "[f(1)]", "[f(a=1, a=2)]", "[f(a=x)]", "[f(a=1)",
        "[f(a=1",        "[link](http://x.y)", "[f(a=1) for a in b]", "if (a < b) { return [c(d)]; }", '{"name": "f"}',
        '{"name": 5, "parameters": {}}', '{"name": "f", "parameters": []}', '{"answer": {"name": "f"}}',
        '{"type": "object", "name": "f", "parameters": {}}', "<function=f>[1]</function>", "<function=f>{}</functions>",
        "<function>f</function>", "[f(a='x]", "[f(a=1e999)]", r'[f(a="\ud83d")]', "[f(a=1 b=2)]", "[f(a={1: 2})]",
        "[f(a=" + "[" * (DEPTH + 1) + "]" * (DEPTH + 1) + ")]", "[f(a=" + "9" * 5000 + ")]", "[9f()]", "[f(a=1)}",
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert parse_calls(text) == (text, [])


def test_only_known_names_are_calls_where_they_are_known():
    text = 'As in [g(x=1)]: [f(x=1)]; {"name": "g", "parameters": {}} <function=g>{}</function>'
    assert parse_calls(text, ["f"]) == (
        'As in [g(x=1)]: ; {"name": "g", "parameters": {}} <function=g>{}</function>', [Call("f", {"x": 1})]
    )  # fmt: skip
    assert len(parse_calls(text)[1]) == 4


def shown(found):
    return "".join(piece if isinstance(piece, str) else f"\0{piece}\0" for piece in found)


def whole(text):
    parser = CallParser()
    return shown([*parser.push(text), *parser.flush()])


FRAGMENTS = st.lists(
    st.sampled_from(
        ["[", "]", "{", "}", "<", ">", "(", ")", "f", "g", "a", "=", ",", ";", ":", " ", "\n", '"', "'", "\\", "1",
         "-.5", "true", "[f(", "a=", '{"name": "f", ', '"parameters": {', "}}", "<function=", "</function>",
         "[f(a=[1,{'b':2}])]",
         '{"name":"g","parameters":{"x":[]}}', "<function=f>{}</function>", "é", "text", "\\u0041"]
    ) | st.text(max_size=3),
    max_size=24,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(FRAGMENTS | st.builds(lambda t, c, f: t + write_calls(c, f), FRAGMENTS, CALLS, st.sampled_from(list(FORMS))),
       st.data())  # fmt: skip
def test_any_cut_of_a_stream_gives_what_the_whole_gives(text, data):
    expected = whole(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for borders in ([0, *cuts, len(text)], range(len(text) + 1)):  # some cuts; every character alone
        parser, found = CallParser(), []
        for begin, end in itertools.pairwise(borders):
            found += parser.push(text[begin:end])
            assert expected.startswith(shown(found))  # nothing that was given out is taken back
            assert parser.pending or shown(found) == whole(text[:end])  # nothing is held that can't be a call's
        assert shown(found + parser.flush()) == expected and not parser.pending


def test_every_prefix_of_an_answer_says_what_it_is():
    text, parser, states = "Yes [1]. [f(a=[1])] ok", CallParser(), []
    for character in text:
        found = parser.push(character)
        states.append(
            ("." if found and isinstance(found[0], str) else "C" if found else "?") + "+-"[not parser.pending]
        )
    #                    Y    e    s   ' '   [    1    ]    .   ' '
    assert states[:9] == [".-", ".-", ".-", ".-", "?+", ".-", ".-", ".-", ".-"]
    assert states[9:19] == ["?+"] * 9 + ["C-"]  # held from [ on, complete at the last ]
    assert states[19:] == ["?+", ".-", ".-"]  # a blank behind a call could part it from the next
    assert parser.flush() == []


@pytest.mark.parametrize(
    "piece", ["[f(a=[", "[", "{", '{"name": "f", "parameters": ', '{"parameters": {"a": [', '[f(a="', "<function="]
)
def test_long_nonsense_takes_little_time(piece):
    text = piece * (15_000 // len(piece))
    start = time.perf_counter()
    assert whole(text) == text
    parser = CallParser()
    for i in range(0, len(text), 3):
        parser.push(text[i : i + 3])
    parser.flush()
    assert time.perf_counter() - start < 20


def test_a_long_argument_streams_in_linear_time():
    call = Call("write", {"text": "word [f(a=1)] " * 8000})
    parser, found, text = CallParser(), [], write_calls([call])
    start = time.perf_counter()
    for i in range(0, len(text), 4):
        found += parser.push(text[i : i + 4])
    assert found == [call] and time.perf_counter() - start < 20


# ---------------------------------------------------------------- offering
def test_tools_are_offered_in_the_system_message():
    text = offer([WEATHER])
    assert json.loads(text[text.index("\n\n") :]) == [WEATHER["function"]] and "[name(argument=value" in text
    assert len({offer([WEATHER], form) for form in FORMS}) == 3
    user = {"role": "user", "content": "hi"}
    assert with_tools([user], [WEATHER]) == [{"role": "system", "content": [{"type": "text", "text": text}]}, user]
    parts = with_tools([{"role": "system", "content": "Be kind."}, user], [WEATHER])[0]["content"]
    assert [part["text"] for part in parts] == ["Be kind.", f"\n\n{text}"]


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("x", "tools must be a list"), ([5], "tool 1 must"), ([WEATHER, {"type": "function"}], "tool 2 must"),
        ([WEATHER, WEATHER], "two functions weather"),
        ([{"type": "function", "function": {"name": "two words"}}], "tool 1 must"),
        ([{"type": "code", "function": {"name": "f"}}], "tool 1 must"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tool 1: parameters"),
        ([{"type": "function", "function": {"name": "f", "strict": float("nan")}}], "not JSON"),
    ],
)  # fmt: skip
def test_wrong_tools_are_told(tools, said):
    with pytest.raises(PunaError, match=said):
        offer(tools)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("x", "must be a list"), ([{}], "tool call 1"), ([{"function": {"name": "a b"}}], "tool call 1"),
        ([{"function": {"name": "f", "arguments": "{"}}], "tool call 1: .*not JSON"),
        ([{"function": {"name": "f", "arguments": "[]"}}], "JSON object"),
        ([{"function": {"name": "f", "arguments": {"a b": 1}}}], "'a b'.*form json"),
        ([{"function": {"name": "f", "arguments": {"a": float("inf")}}}], "not JSON"),
        ([{"function": {"name": "f", "arguments": {"a": {1: 2}}}}], "not a string"),
        ([{"function": {"name": "f", "arguments": {"a": {1, 2}}}}], "not JSON"),
    ],
)  # fmt: skip
def test_wrong_calls_are_told(calls, said):
    with pytest.raises(PunaError, match=said):
        write_calls(read_calls(calls))


def test_arguments_come_as_json_text_or_as_an_object():
    for arguments in ('{"a": [1]}', {"a": [1]}):
        assert read_calls([{"id": "x", "function": {"name": "f", "arguments": arguments}}]) == [Call("f", {"a": [1]})]
    assert read_calls([{"function": {"name": "f", "arguments": ""}}]) == [Call("f")]
    with pytest.raises(PunaError, match="unknown form"):
        write_calls([], "xml")
