"""Chat completions in OpenAI's shape, whole or as server-sent events, and what happens when the client leaves.

    data: {"object":"chat.completion.chunk","choices":[{"delta":{"role":"assistant","content":""}}]}
    data: {... "delta":{"content":"It is here: <box label=\\"cat\\">12,40,377,512</box>",
                        "boxes":[{"label":"cat","x1":12,"y1":40,"x2":377,"y2":512}]}}
    data: {... "delta":{},"finish_reason":"stop"}
    data: {... "choices":[],"usage":{...}}              only with stream_options.include_usage
    data: [DONE]

Where the request offered `tools`, the answer is read for calls as it comes (`puna.processor.tools`). A call is sent
whole, as one entry of `delta.tool_calls`, when its last character is there; text that may be the beginning of one
waits; and an answer that ends with calls has the finish_reason "tool_calls".

`boxes` is our one addition: each box of the answer, parsed and checked by the one parser
(`puna.processor.grounding`), is sent as soon as its last character is there. The text keeps the box as well, so other
clients lose nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from puna.processor.grounding import parse_boxes
from puna.processor.tools import Call, CallParser
from puna.serve import errors

log = logging.getLogger("puna.serve")


@dataclass(frozen=True)
class Piece:
    """A step of an answer: more text (may be empty), tokens made so far, and at the end the reason for it."""

    text: str
    tokens: int
    finish_reason: str | None = None


class BoxFinder:
    """Boxes of a growing text, each given out once. Parses only when a `>` arrives, since every box ends with one."""

    def __init__(self, most: int):
        self.text, self.most, self.found = "", most, 0

    def push(self, piece: str) -> list[dict]:
        """New boxes as JSON objects {"label", "x1", "y1", "x2", "y2"}."""
        self.text += piece
        if ">" not in piece:
            return []
        boxes = [dataclasses.asdict(box) for box in parse_boxes(self.text)[: self.most]]
        new, self.found = boxes[self.found :], len(boxes)
        return new


def usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Completion:
    """The frame of one answer: its id, time and model, and the JSON objects made of its pieces."""

    def __init__(
        self, model: str, prompt_tokens: int, most_boxes: int, include_usage: bool = False,
        tools: Sequence[str] = (),
    ):  # fmt: skip
        """tools: the names of the functions that may be called; none: all of the answer is text."""
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self.include_usage = prompt_tokens, include_usage
        self.boxes = BoxFinder(most_boxes)
        self.parser = CallParser(tools) if tools else None
        self.calls = 0

    def whole(self, text: str, tokens: int, finish_reason: str) -> dict:
        """The response of a request that does not stream."""
        text, calls = self._read(text, True)
        message = {"role": "assistant", "content": text, "refusal": None, "boxes": self.boxes.push(text)}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        counts = usage(self.prompt_tokens, tokens)
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": counts}

    def _read(self, text: str, last: bool) -> tuple[str, list[dict]]:
        """What of the answer so far is new and certain: (text, tool calls as JSON objects)."""
        if self.parser is None:
            return text, []
        found = [*self.parser.push(text), *(self.parser.flush() if last else ())]
        calls = [
            {
                "id": f"call_{uuid.uuid4().hex}", "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in found if isinstance(call, Call)
        ]  # fmt: skip
        self.calls += len(calls)
        return "".join(piece for piece in found if isinstance(piece, str)), calls

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
        """The lines of a streamed response. A failure of the engine becomes an error event, then the end."""
        try:
            yield event(self.chunk({"role": "assistant", "content": ""}))
            tokens = 0
            async for piece in pieces:
                tokens = piece.tokens
                first = self.calls
                text, calls = self._read(piece.text, bool(piece.finish_reason))
                delta: dict = {"content": text} if text else {}
                if boxes := self.boxes.push(text):
                    delta["boxes"] = boxes
                if calls:
                    delta["tool_calls"] = [{"index": first + i, **call} for i, call in enumerate(calls)]
                if delta:
                    yield event(self.chunk(delta))
                if piece.finish_reason:
                    called = self.calls and piece.finish_reason == "stop"
                    yield event(self.chunk({}, "tool_calls" if called else piece.finish_reason))
            if self.include_usage:
                yield event({**self.chunk({}), "choices": [], "usage": usage(self.prompt_tokens, tokens)})
        except errors.ApiError as error:
            yield event(errors.body(error.status, error.message, error.param, error.code))
        except Exception:
            log.exception("an answer failed")
            yield event(errors.body(500, "the server failed on this answer; its log says why", code="internal_error"))
        yield b"data: [DONE]\n\n"


def event(data: dict) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and stops making them the moment the client is gone, even before the first token."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close):
        """`close()` is called once at the end, however it comes: it must abort what makes the events."""
        super().__init__()
        self.events, self.close = events, close
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send):
        pump = asyncio.create_task(self._pump(send))
        watch = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.close()
            for task in (pump, watch):
                task.cancel()
            results = await asyncio.gather(pump, watch, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _pump(self, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self.events:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
