"""Answers being made: the bridge from the engine's thread to the server's event loop.

The engine decodes in a thread of its own and hands out events through a blocking iterator; the server lives in one
asyncio loop that must never block. A small thread an answer carries the events across:

    engine thread -> handle (queue) -> carrier thread -> loop.call_soon_threadsafe -> asyncio.Queue -> `pieces()`

A request may want several answers (`n`, or several prompts of /v1/completions); their pieces come through one queue,
each with its number. The queue is bounded by max_tokens, so a client that never reads costs at most the text of its own
answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from puna.engine.sampler import Sampling
from puna.errors import PunaError
from puna.serve.errors import ApiError
from puna.serve.shape import DEFAULT_TOKENS

log = logging.getLogger("puna.serve")


@dataclass(frozen=True)
class Piece:
    """A step of an answer: more text (may be empty), the token behind it and its log-probability, the likeliest tokens
    there, and how many tokens there are so far. The last one has a finish_reason, and no token."""

    text: str
    tokens: int
    finish_reason: str | None = None
    token: int | None = None
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    cached: int = 0  # of the prompt's tokens, those that were in the prefix cache; known at the end


class Answers:
    """A request's answers in the engine. Raises PunaError at once if the engine refuses one, and then none is made."""

    def __init__(
        self, engine, prompts: Sequence, samplings: Sequence[Sampling], seconds: float, salt: str | None = None
    ):
        """`samplings`: one for each answer to each prompt. seconds: after so many, `pieces` ends in a 504."""
        self.handles, self.began, self.seconds = [], time.monotonic(), seconds
        self.prompt_tokens = 0
        try:
            for prompt in prompts:
                prepared = engine.prepare(prompt, salt)
                self.handles += [_submit(engine, prepared, sampling, salt) for sampling in samplings]
                self.prompt_tokens += self.handles[-1].prompt_tokens
        except BaseException:
            self.abort()
            raise

    def __len__(self) -> int:
        return len(self.handles)

    def abort(self) -> None:
        """Frees their places in the engine; harmless when they are complete."""
        for handle in self.handles:
            handle.abort()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece) as they grow; each answer's last piece has a finish_reason.

        Raises ApiError: 500 if the engine failed one, 503 if it was stopped, 504 when they took too long."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(item) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(queue.put_nowait, item)

        for number, handle in enumerate(self.handles):
            threading.Thread(target=_carry, args=(number, handle, put), name="puna-answer", daemon=True).start()
        left = len(self.handles)
        while left:
            try:
                async with asyncio.timeout(self.seconds - (time.monotonic() - self.began)):
                    item = await queue.get()
            except TimeoutError:
                text = f"the answer took longer than {self.seconds} seconds"
                raise ApiError(504, text, code="timeout") from None
            if isinstance(item, ApiError):
                raise item
            yield item
            left -= item[1].finish_reason is not None


async def collect(pieces: AsyncIterator[tuple[int, Piece]], n: int) -> list[list[Piece]]:
    """The pieces of each of n answers, all of them."""
    found: list[list[Piece]] = [[] for _ in range(n)]
    async for number, piece in pieces:
        found[number].append(piece)
    return found


def _submit(engine, prepared, sampling: Sampling, salt: str | None):
    if sampling.max_tokens is not None:
        return engine.submit(prepared, sampling, salt)
    try:
        return engine.submit(prepared, dataclasses.replace(sampling, max_tokens=DEFAULT_TOKENS), salt)
    except PunaError:  # no room for the default: take the room there is, which is less
        return engine.submit(prepared, sampling, salt)


def _carry(number: int, handle, put) -> None:
    """Takes one handle's events to the loop; runs in a thread of its own."""
    tokens = 0
    try:
        for event in handle:
            if event.finish_reason == "abort":
                return put(ApiError(503, "the server was stopped before the answer was complete", code="stopping"))
            tokens += event.token is not None
            cached = event.completion.cached_tokens if event.completion is not None else 0
            reason = event.finish_reason
            put((number, Piece(event.text, tokens, reason, event.token, event.logprob, event.top_logprobs, cached)))
    except PunaError as error:  # what a request asked of the engine turned out to be impossible
        put(ApiError(400, str(error), code="invalid_value"))
    except Exception as error:
        log.error("the engine failed on a request", exc_info=error)
        put(ApiError(500, "the engine failed on this request; the server's log says why", code="internal_error"))
