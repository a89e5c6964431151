"""Chat completions in OpenAI's shape, whole or as server-sent events.

    data: {"object":"chat.completion.chunk","choices":[{"delta":{"role":"assistant","content":""}}]}
    data: {... "delta":{"content":"It is here: <box label=\\"cat\\">12,40,377,512</box>",
                        "boxes":[{"label":"cat","x1":12,"y1":40,"x2":377,"y2":512}]}}
    data: {... "delta":{},"finish_reason":"stop"}
    data: {... "choices":[],"usage":{...}}              only with stream_options.include_usage
    data: [DONE]

A call is sent whole, as one entry of `delta.tool_calls`; an answer that ends with calls has the finish_reason
"tool_calls". `boxes` is our one addition.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence

from puna.serve import errors
from puna.serve.answers import Piece, collect
from puna.serve.stream import Reader, Speller, event, guarded

DONE = b"data: [DONE]\n\n"


def usage(prompt: int, completion: int, cached: int) -> dict:
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


class Counts:
    """Tokens of a request's answers, from their pieces."""

    def __init__(self, n: int):
        self.tokens, self.cached = [0] * n, [0] * n

    def take(self, number: int, piece: Piece) -> None:
        self.tokens[number] = piece.tokens
        self.cached[number] = max(self.cached[number], piece.cached)

    @property
    def total(self) -> int:
        return sum(self.tokens)


class Chat:
    """The frame of one request's answers: its id, time and model, and the JSON objects made of their pieces."""

    def __init__(
        self, model: str, prompt_tokens: int, n: int, most_boxes: int, include_usage: bool = False,
        tools: Sequence[str] = (), speller: Speller | None = None,
    ):  # fmt: skip
        """tools: the names of the functions that may be called. speller: report log-probabilities."""
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens, self.include_usage, self.speller = prompt_tokens, include_usage, speller
        self.readers, self.counts = [Reader(most_boxes, tools) for _ in range(n)], Counts(n)

    def usage(self) -> dict:
        return usage(self.prompt_tokens, self.counts.total, self.counts.cached[0])

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict:
        """The response of a request that does not stream: all pieces -> one object."""
        answers = await collect(pieces, len(self.readers))
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict:
        for piece in pieces:
            self.counts.take(number, piece)
        text, calls, boxes = self.readers[number].read("".join(piece.text for piece in pieces), True)
        message = {"role": "assistant", "content": text, "refusal": None, "boxes": boxes}
        if calls:
            message |= {"content": text or None, "tool_calls": [_call(call) for call in calls]}
        reason, logprobs = self._reason(number, pieces[-1]), self._logprobs(pieces)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _reason(self, number: int, piece: Piece) -> str | None:
        return "tool_calls" if self.readers[number].calls and piece.finish_reason == "stop" else piece.finish_reason

    def _logprobs(self, pieces: Sequence[Piece]) -> dict | None:
        if self.speller is None:
            return None
        return {"content": [self.speller.choice(p) for p in pieces if p.token is not None], "refusal": None}

    def chunk(self, number: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> dict:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """The lines of a streamed response. A failure becomes an error event, then the end."""
        async for line in guarded(self._events(pieces), lambda error: event(errors.content(error))):
            yield line
        yield DONE

    async def _events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        for number in range(len(self.readers)):
            yield event(self.chunk(number, {"role": "assistant", "content": ""}))
        async for number, piece in pieces:
            self.counts.take(number, piece)
            first = self.readers[number].calls
            text, calls, boxes = self.readers[number].read(piece.text, bool(piece.finish_reason))
            delta: dict = {"content": text} if text else {}
            if boxes:
                delta["boxes"] = boxes
            if calls:
                delta["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(calls)]
            logprobs = self._logprobs([piece]) if piece.token is not None else None
            if delta or logprobs:
                yield event(self.chunk(number, delta, logprobs=logprobs))
            if piece.finish_reason:
                yield event(self.chunk(number, {}, self._reason(number, piece)))
        if self.include_usage:
            yield event({**self.chunk(0, {}), "choices": [], "usage": self.usage()})


def _call(call: dict) -> dict:
    return {
        "id": call["id"], "type": "function",
        "function": {"name": call["name"], "arguments": call["arguments"]},
    }  # fmt: skip
