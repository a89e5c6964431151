"""A stand-in for the engine with its interface (submit -> a handle that yields events), scripted by the tests; and
what they send."""

from __future__ import annotations

import base64
import contextlib
import io
import queue
import threading
import time
from dataclasses import dataclass

import openai
from PIL import Image

from puna.errors import PunaError
from puna.serve import create_app
from puna.serve.run import Draining, listen


@dataclass(frozen=True)
class FakeEvent:
    text: str
    token: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple = ()
    completion: object = None


class FakeHandle:
    def __init__(self, prompt_tokens, make):
        self.prompt_tokens, self.over = prompt_tokens, False
        self.aborted = threading.Event()
        self.events = queue.Queue()
        threading.Thread(target=make, args=(self,), daemon=True).start()

    def __iter__(self):
        while (event := self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def abort(self):
        self.aborted.set()


class FakeEngine:
    """Answers with `script(messages)`: text cut into pieces, one a token, `pause` seconds apart. An Exception in
    place of text is raised in the middle of the answer. `submitted` keeps (messages, sampling, handle) of every
    request."""

    def __init__(self, script=lambda messages: "Hello there.", pause=0.0, context=1000):
        self.script, self.pause, self.context = script, pause, context
        self.submitted, self.salts = [], []
        self.size = 4  # characters of a token
        self.alive = True

    def stats(self):
        return {"active": sum(not handle.over for _, _, handle in self.submitted), "waiting": 0}

    def prepare(self, messages, salt=None):
        self.salts.append(salt)
        return messages

    def submit(self, messages, sampling, salt=None):
        if not isinstance(messages[0], dict):  # token ids
            messages = [{"role": "user", "content": [{"type": "text", "text": "." * len(messages)}]}]
        prompt = sum(len(p.get("text", "....")) for m in messages for p in m["content"])
        if prompt + (sampling.max_tokens or 1) > self.context:
            raise PunaError(f"{prompt} prompt tokens and max_tokens do not fit in the context of {self.context}")
        answer = self.script(messages)
        handle = FakeHandle(prompt, lambda h: self._make(h, answer, sampling))
        self.submitted.append((messages, sampling, handle))
        return handle

    def _make(self, handle, answer, sampling):
        broken = isinstance(answer, Exception)
        pieces = ["Half of "] if broken else [answer[i : i + self.size] for i in range(0, len(answer), self.size)]
        reason = "stop"
        for number, piece in enumerate(pieces):
            if handle.aborted.is_set():
                reason = "abort"
                break
            if number >= (sampling.max_tokens or self.context - handle.prompt_tokens):
                reason = "length"
                break
            time.sleep(self.pause)
            top = [(number + i, -0.5 - i) for i in range(sampling.top_logprobs)]
            handle.events.put(FakeEvent(piece, number, logprob=-0.5, top_logprobs=top))
        handle.events.put(answer if broken else FakeEvent("", None, reason))
        handle.over = True
        handle.events.put(None)


@contextlib.contextmanager
def running(app):
    """The app in the real server on a free port of the loopback; yields its URL."""
    with listen("127.0.0.1", 0) as listener:
        server = Draining(app, log_level="error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def until(condition, seconds=10.0):
    """Waits until condition() holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def make_app(engine=None, **options):
    facts = {"parameters": 12_345_678, "active_parameters": 4_100_000, "context": 1000, **options}
    return create_app(engine or FakeEngine(), "tiny", "0123456789abcdef" * 4, **facts)


def data_url(picture=None, kind="png", size=(8, 6), **options):
    picture = picture or Image.new("RGB", size, (200, 40, 30))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(text="Hello", **fields):
    """A request's JSON; `text` may be a list of content parts."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def show(url, text="What is this?"):
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    return ask(parts + ([{"type": "text", "text": text}] if text else []))


PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def case(number, name, *values):
    """A row of a table of F.4's cases: its id begins with the case's number (test_cases.py counts them)."""
    import pytest  # a server in a process of its own does without

    return pytest.param(*values, id=f"{number:02}-{name}")


def refused(response, status, param=None, says=""):
    """The response is an error in OpenAI's shape, with this status, naming this field."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"] and "0x" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    assert says in error["message"], error
    return error


@contextlib.contextmanager
def official(engine, **options):
    """The official client of a server around `engine`."""
    with (
        running(make_app(engine, **options)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
