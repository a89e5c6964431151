"""Functions a model may call: how they are offered, and calls written and read, whole or while they stream in.

Llama 4 writes calls as plain text, in one of three forms (llama4-facts.md §4.2):

    pythonic   [weather(city="Rome", days=[1, 2]), clock()]                    Meta's first choice, and ours
    json       {"name": "weather", "parameters": {"city": "Rome"}}; {...}
    function   <function=weather>{"city": "Rome"}</function>

Functions are offered in the system message: a sentence on the form, then their definitions as a JSON list. Messages
have OpenAI's shape (`tools`, `tool_calls`, role `tool`); Llama 4's format has no ids of calls, so results must stand
in the order of the calls.

**Reading** is a grammar, not a search for brackets: nested lists and objects, quotes and brackets inside strings, and
text before a call cost nothing. A call may begin at every `[`, `{` and `<`; from there the grammar is followed
character by character, and the first one that does not fit makes the beginning plain text again. The grammar is
written as generators: where the text ends for now, they wait. So a stream is read by the same code as a whole answer,
in linear time, and gives the same however it is cut: only text that can't be part of a call is ever let go.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.errors import PunaError

FORMS = {
    "pythonic": "a list of calls, [name(argument=value, ...), ...], with values as in Python",
    "json": 'one JSON object a call, {"name": name, "parameters": {argument: value, ...}}, with "; " between calls',
    "function": "<function=name>{argument: value, ...}</function> for each call, the arguments as JSON",
}
"""Form -> how the system message describes it."""
OFFER = "You can call the functions below. Where a call helps, write {form}; its result comes next. Else answer.\n\n"
DEPTH = 32  # of nested lists and objects in a call
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_KEYWORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Call:
    """A function's `name` and its `arguments` as JSON values by name."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class NotACall(Exception):
    """What looked like the beginning of a call is text."""


# ---------------------------------------------------------------- offering and writing
def offer(tools: Sequence[dict], form: str = "pythonic") -> str:
    """The text that offers `tools` (OpenAI's: {"type": "function", "function": {"name", "description", "parameters"}})
    to the model. Raises `PunaError` naming the tool that is wrong."""
    names(tools)
    functions = [tool["function"] for tool in tools]
    return OFFER.format(form=FORMS[_checked(form)]) + _json(functions, "the tools' definitions")


def names(tools: object) -> list[str]:
    """The names of `tools`, checked."""
    if not isinstance(tools, (list, tuple)):
        raise PunaError('tools must be a list of {"type": "function", "function": {"name": ...}}')
    found: list[str] = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PunaError(
                f'tool {number} must be {{"type": "function", "function": {{"name": ...}}}}, the name of letters, '
                "digits, _, - and dots, at most 64"
            )
        if name in found:
            raise PunaError(f"tool {number}: there are two functions {name}")
        if not isinstance(function.get("parameters", {}), dict):
            raise PunaError(f"tool {number}: parameters must be a JSON schema, an object")
        found.append(name)
    return found


def with_tools(messages: Sequence[dict], tools: Sequence[dict], form: str = "pythonic") -> list[dict]:
    """`messages` whose system message ends with the offer of `tools`; one is put in front where there is none."""
    text = offer(tools, form)
    first = messages[0] if messages else None
    if not isinstance(first, dict) or first.get("role") != "system":
        return [{"role": "system", "content": [{"type": "text", "text": text}]}, *messages]
    content = first.get("content")
    parts = list(content) if isinstance(content, (list, tuple)) else [{"type": "text", "text": content}]
    return [first | {"content": [*parts, {"type": "text", "text": f"\n\n{text}"}]}, *messages[1:]]


def read_calls(tool_calls: object) -> list[Call]:
    """A message's `tool_calls` ([{"function": {"name", "arguments"}}], arguments as JSON text or an object)."""
    if not isinstance(tool_calls, (list, tuple)):
        raise PunaError("tool_calls must be a list")
    calls = []
    for number, call in enumerate(tool_calls, 1):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PunaError(f'tool call {number} must be {{"function": {{"name": ..., "arguments": ...}}}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise PunaError(f"tool call {number}: its arguments are not JSON ({error})") from error
        if not isinstance(arguments, dict):
            raise PunaError(f"tool call {number}: arguments must be a JSON object")
        calls.append(Call(name, arguments))
    return calls


def write_calls(calls: Iterable[Call], form: str = "pythonic") -> str:
    """The text of `calls` in a form. Raises `PunaError` for values that are not JSON, or arguments that are no names
    in the pythonic form."""
    calls = list(calls)
    if _checked(form) == "json":
        return "; ".join(_json({"name": call.name, "parameters": call.arguments}, call.name) for call in calls)
    if form == "function":
        return "".join(f"<function={call.name}>{_json(call.arguments, call.name)}</function>" for call in calls)
    written = []
    for call in calls:
        _json(call.arguments, call.name)
        for key in call.arguments:
            if not _KEYWORD.fullmatch(key):
                raise PunaError(f"{call.name}: the argument {key[:40]!r} can't be written as name=value: use form json")
        written.append(f"{call.name}({', '.join(f'{key}={_literal(v)}' for key, v in call.arguments.items())})")
    return f"[{', '.join(written)}]" if written else ""


def _checked(form: str) -> str:
    if form not in FORMS:
        raise PunaError(f"unknown form of tool calls {form!r}: use {', '.join(FORMS)}")
    return form


def _json(value: object, what: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if json.loads(text) != value:  # keys that are no strings
            raise ValueError("a key is not a string")
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise PunaError(f"{what}: not JSON values ({error})") from error


def _literal(value: object) -> str:
    """Python's notation of a JSON value, strings as JSON writes them (which Python reads the same)."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value) if value is None or isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- reading
def parse_calls(text: str, known: Iterable[str] | None = None) -> tuple[str, list[Call]]:
    """(the text around the calls, the calls) of a whole answer. known: the only names that are calls; None: all."""
    parser = CallParser(known)
    found = [*parser.push(text), *parser.flush()]
    return "".join(p for p in found if isinstance(p, str)), [p for p in found if isinstance(p, Call)]


_PLAIN = re.compile(r"[^\[{<]*")
_BETWEEN = re.compile(r"[\s;,]*")  # may separate calls, and is dropped if it does
_SPACE = re.compile(r"\s*")
_NAME_RUN = re.compile(r"[A-Za-z0-9_.-]*")
_WORD_RUN = re.compile(r"[\w.+-]*")
_INSIDE = {quote: re.compile(rf"[^{quote}\\]*") for quote in "\"'"}
_NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00[01][0-9a-fA-F]{5}|[\s\S])")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", **{c: c for c in "\"'\\/"}}

Step = Generator[None, None, Any]  # waits for more text at each yield; returns what it read


class CallParser:
    """Text in, piece by piece; text and `Call`s out, in order.

    push: the text that is surely no part of a call, and the calls completed. flush: the rest, at the end. All pieces
    together are `parse_calls` of the whole, wherever it was cut.
    """

    def __init__(self, known: Iterable[str] | None = None) -> None:
        self._known = None if known is None else frozenset(known)
        self._text = ""
        self._at = 0  # read so far
        self._held = 0  # decided and given out so far
        self._ended = False
        self._found: list[str | Call] = []
        self._machine = self._answer()

    @property
    def pending(self) -> bool:
        """Whether a call may be beginning: some text is held back."""
        return self._held < len(self._text)

    def push(self, piece: str) -> list[str | Call]:
        self._text += piece
        next(self._machine, None)
        found, self._found = self._found, []
        if not self.pending:
            self._text, self._at, self._held = "", 0, 0
        return found

    def flush(self) -> list[str | Call]:
        self._ended = True
        return self.push("")

    # ---------------------------------------------------------------- the grammar
    def _answer(self) -> Step:
        called = False
        while True:
            if called:
                yield from self._run(_BETWEEN)
            else:
                self._at = _PLAIN.match(self._text, self._at).end()
                self._say(self._at)
            if self._at == len(self._text):
                if self._ended:
                    self._held = self._at  # white space behind the last call
                    return
                yield
            elif self._text[self._at] not in "[{<":
                called = False
            else:
                begin = self._at
                try:
                    calls = yield from self._calls()
                except NotACall:
                    self._at, called = begin + 1, False
                    self._say(self._at)
                else:
                    self._found += calls
                    self._held, called = self._at, True

    def _calls(self) -> Step:
        if self._text[self._at] == "<":
            yield from self._word("<function=")
            name = yield from self._name()
            yield from self._mark(">")
            yield from self._run(_SPACE)
            arguments = yield from self._object(1)
            yield from self._run(_SPACE)
            yield from self._word("</function>")
            return [Call(name, arguments)]
        if self._text[self._at] == "{":
            return [(yield from self._json_call())]
        return (yield from self._list("[]", self._listed_call))

    def _listed_call(self) -> Step:
        if (yield from self._peek()) == "{":
            return (yield from self._json_call())
        name = yield from self._name()
        arguments = yield from self._list("()", self._keyword)
        if len(dict(arguments)) < len(arguments):
            raise NotACall
        return Call(name, dict(arguments))

    def _keyword(self) -> Step:
        key = yield from self._run(_WORD_RUN)
        if not _KEYWORD.fullmatch(key):
            raise NotACall
        yield from self._run(_SPACE)
        yield from self._mark("=")
        yield from self._run(_SPACE)
        return key, (yield from self._value(1))

    def _json_call(self) -> Step:
        fields = dict((yield from self._list("{}", lambda: self._field(_JSON_FIELDS, 1))))
        arguments = fields.get("parameters", fields.get("arguments"))
        if "name" not in fields or not isinstance(arguments, dict):
            raise NotACall
        return Call(fields["name"], arguments)

    def _field(self, allowed: frozenset | None, depth: int) -> Step:
        key = yield from self._string()
        if allowed is not None and key not in allowed:
            raise NotACall
        yield from self._run(_SPACE)
        yield from self._mark(":")
        yield from self._run(_SPACE)
        value = yield from self._value(depth)
        if allowed is not None:
            if key == "name":
                self._check(value)
            elif key == "type" and value != "function":
                raise NotACall
        return key, value

    def _value(self, depth: int) -> Step:
        first = yield from self._peek()
        if first in _INSIDE:
            return (yield from self._string())
        if first == "{":
            return (yield from self._object(depth + 1))
        if first == "[":
            return (yield from self._list("[]", lambda: self._value(depth + 1), depth))
        word = yield from self._run(_WORD_RUN)
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        try:
            number = _NUMBER.fullmatch(word)
            value = (float if number[1] or number[2] else int)(word)
            if math.isfinite(value):
                return value
        except (TypeError, ValueError, OverflowError):  # no number; Python reads no integer of over 4,300 digits
            pass
        raise NotACall

    def _object(self, depth: int) -> Step:
        if (yield from self._peek()) != "{":
            raise NotACall
        return dict((yield from self._list("{}", lambda: self._field(None, depth), depth)))

    def _list(self, brackets: str, item: Any, depth: int = 0) -> Step:
        """Items between brackets with commas between them, one behind the last allowed. Depth 0, a list of calls or a
        call as an object, has one at least."""
        if depth > DEPTH:
            raise NotACall
        opening, closing = brackets
        yield from self._mark(opening)
        yield from self._run(_SPACE)
        found: list = []
        while (yield from self._peek()) != closing or not (found or depth or opening == "("):
            found.append((yield from item()))
            yield from self._run(_SPACE)
            if (yield from self._mark("," + closing)) == closing:
                return found
            yield from self._run(_SPACE)
        self._at += 1
        return found

    def _string(self) -> Step:
        quote = yield from self._mark("\"'")
        begin = self._at
        while True:
            yield from self._run(_INSIDE[quote])
            if (yield from self._mark(quote + "\\")) == quote:
                return _unescape(self._text[begin : self._at - 1])
            yield from self._peek()
            self._at += 1

    # ---------------------------------------------------------------- single steps
    def _name(self) -> Step:
        if not NAME.match((yield from self._peek())):  # most brackets in a text are let go here
            raise NotACall
        return self._check((yield from self._run(_NAME_RUN)))

    def _check(self, name: object) -> str:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise NotACall
        if self._known is not None and name not in self._known:
            raise NotACall
        return name

    def _peek(self) -> Step:
        """The next character. No call is complete without one."""
        while self._at >= len(self._text):
            if self._ended:
                raise NotACall
            yield
        return self._text[self._at]

    def _mark(self, allowed: str) -> Step:
        character = yield from self._peek()
        if character not in allowed:
            raise NotACall
        self._at += 1
        return character

    def _word(self, word: str) -> Step:
        for character in word:
            yield from self._mark(character)

    def _run(self, pattern: re.Pattern) -> Step:
        """The longest run of characters that `pattern` takes; known when another one follows, or at the end."""
        begin = self._at
        while True:
            self._at = pattern.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[begin : self._at]
            yield

    def _say(self, end: int) -> None:
        if end > self._held:
            self._found.append(self._text[self._held : end])
            self._held = end


_JSON_FIELDS = frozenset(("type", "name", "parameters", "arguments"))


def _unescape(raw: str) -> str:
    """What a string literal of Python's or JSON's means."""
    if "\\" not in raw:
        return raw

    def meant(match: re.Match) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPED.get(code, match[0])

    try:  # JSON writes characters beyond U+FFFF as two halves
        return _ESCAPE.sub(meant, raw).encode("utf-16", "surrogatepass").decode("utf-16")
    except (UnicodeDecodeError, ValueError) as error:
        raise NotACall from error
