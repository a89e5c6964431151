"""One answer being made: the bridge from the engine's thread to the server's event loop.

The engine decodes in a thread of its own and hands out events through a blocking iterator; the server lives in one
asyncio loop that must never block. A small thread an answer carries the events across:

    engine thread -> handle (queue) -> carrier thread -> loop.call_soon_threadsafe -> asyncio.Queue -> `pieces()`

The queue is bounded by max_tokens, so a client that never reads costs at most the text of its own answer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

from puna.engine.sampler import Sampling
from puna.serve.errors import ApiError
from puna.serve.stream import Piece

log = logging.getLogger("puna.serve")


class Answer:
    """A request in the engine. Raises PunaError at once if the engine refuses it (too long for the context, say)."""

    def __init__(self, engine, messages: list[dict], sampling: Sampling):
        self.handle = engine.submit(messages, sampling)
        self.prompt_tokens: int = self.handle.prompt_tokens

    def abort(self) -> None:
        """Frees its place in the engine; harmless when the answer is complete."""
        self.handle.abort()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it grows; the last piece has a finish_reason. Raises ApiError 500 if the engine failed it."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def put(item) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the loop is closed: nobody waits any more
                self.handle.abort()

        def carry() -> None:
            tokens = 0
            try:
                for event in self.handle:
                    tokens += event.token is not None
                    put(Piece(event.text, tokens, event.finish_reason))
            except Exception as error:
                log.error("the engine failed on a request", exc_info=error)
                put(
                    ApiError(500, "the engine failed on this request; the server's log says why", code="internal_error")
                )
            put(None)

        threading.Thread(target=carry, name="puna-answer", daemon=True).start()
        while (item := await queue.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item
