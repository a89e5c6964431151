"""What all kinds of answers share: reading the model's text, server-sent events, and what happens when a client leaves.

Where a request offered `tools`, its answer is read for calls as it comes (`puna.processor.tools`): a call is given out
whole when its last character is there, and text that may be the beginning of one waits. Each box of the answer, parsed
and checked by the one parser (`puna.processor.grounding`), is given out as soon as its last character is there; the
text keeps the box as well, so clients that know nothing of boxes lose nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.responses import Response

from puna.processor.grounding import parse_boxes
from puna.processor.tools import Call, CallParser
from puna.serve import errors

log = logging.getLogger("puna.serve")


_END = "</box>"


class Reader:
    """Makes of one answer's text, piece by piece: text, boxes, and calls of the functions named in `tools`."""

    def __init__(self, most_boxes: int, tools: Sequence[str] = ()):
        """tools: none: all of the answer is text."""
        self.tail, self.most, self.boxes, self.calls = "", most_boxes, 0, 0
        self.parser = CallParser(tools) if tools else None

    def read(self, piece: str, last: bool) -> tuple[str, list[dict], list[dict]]:
        """What is new and certain: (text, calls as {"id", "name", "arguments"}, boxes)."""
        text, calls = piece, []
        if self.parser is not None:
            found = [*self.parser.push(piece), *(self.parser.flush() if last else ())]
            text = "".join(part for part in found if isinstance(part, str))
            calls = [
                {
                    "id": f"call_{uuid.uuid4().hex}", "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                }
                for call in found if isinstance(call, Call)
            ]  # fmt: skip
        self.calls += len(calls)
        return text, calls, self._new_boxes(text)

    def _new_boxes(self, text: str) -> list[dict]:
        self.tail += text
        found = parse_boxes(self.tail) if _END in self.tail else []
        rest = self.tail.rpartition(_END)[2]  # a box lies between two ends, so what is before the last one is done with
        begin = rest.rfind("<box ")
        self.tail = rest[begin:] if begin >= 0 else rest[-4:]
        new = [dataclasses.asdict(box) for box in found[: self.most - self.boxes]]
        self.boxes += len(new)
        return new


class Speller:
    """Token ids as clients see them: text and bytes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.special = tokenizer, frozenset(tokenizer.special.values())

    def token(self, id: int) -> str:
        return self.tokenizer.decode([id], special=True)

    def entry(self, id: int, logprob: float) -> dict:
        raw = None if id in self.special or id >= self.tokenizer.vocab_size else list(self.tokenizer.token_bytes(id))
        return {"token": self.token(id), "logprob": logprob, "bytes": raw}

    def choice(self, piece) -> dict:
        """A piece's token in OpenAI's form, with the likeliest ones in its place."""
        top = [self.entry(*each) for each in piece.top]
        return {**self.entry(piece.token, piece.logprob), "top_logprobs": top}


def event(data: dict, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def guarded(events: AsyncIterator[bytes], failed: Callable[[errors.ApiError], bytes]) -> AsyncIterator[bytes]:
    """`events`, and `failed(error)` as the last one if making them fails."""
    try:
        async for each in events:
            yield each
    except errors.ApiError as error:
        yield failed(error)
    except Exception:
        log.exception("an answer failed")
        yield failed(errors.ApiError(500, "the server failed on this answer; its log says why", code="internal_error"))


class EventStream(Response):
    """Sends events as they come, and stops making them the moment the client is gone, even before the first token.

    A client that reads slowly slows its own stream alone: nothing is sent until the last piece has left. One that does
    not read for `seconds` is taken for gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], object], seconds: float):
        """`close()` is called once at the end, however it comes: it must abort what makes the events."""
        super().__init__()
        self.events, self.close, self.seconds = events, close, seconds
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
        async def bounded(message: dict) -> None:
            async with asyncio.timeout(self.seconds):  # TimeoutError is an OSError: the client is gone
                await send(message)

        await bounded({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self.events:
            await bounded({"type": "http.response.body", "body": line, "more_body": True})
        await bounded({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass
