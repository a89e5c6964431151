"""The engine in a thread of its own, for servers: anyone may submit, one thread steps, nothing waits on a slow reader.

Commands go in through a queue that the thread empties between steps; events come out through one queue a request. So
the engine itself needs no locks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from puna.engine.engine import Engine, Event, Request
from puna.engine.sampler import Sampling


class Handle:
    """One submitted request: iterate over its events (blocking); the last has a finish_reason or is an exception."""

    def __init__(self, thread: EngineThread):
        self._thread, self._events = thread, queue.SimpleQueue()
        self.request: Request | None = None
        self.prompt_tokens = 0

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            if event.error is not None:
                raise event.error
            yield event
            if event.finish_reason is not None:
                return

    def abort(self) -> None:
        """Ends the request and frees its place; harmless when it is done."""
        self._thread.call(lambda: self._thread.engine.abort(self.request))


class EngineThread:
    """Owns an Engine from now on. `submit` from any thread; `close` stops after the current step."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def call(self, command) -> None:
        """Runs `command()` in the engine's thread, between two steps."""
        self._commands.put(command)

    def submit(self, messages, sampling: Sampling | None = None) -> Handle:
        """Queues a prompt. PunaError at once if it can't be encoded or does not fit."""
        if not self.alive:
            raise RuntimeError("the engine is closed")
        handle, ready = Handle(self), queue.SimpleQueue()

        def add() -> None:
            try:
                handle.request = self.engine.add_request(messages, sampling, handle._events.put)
                handle.prompt_tokens = len(handle.request.prompt)
                ready.put(None)
            except Exception as error:  # handed to the caller, whose request it is
                ready.put(error)

        self.call(add)
        error = ready.get()
        if error is not None:
            raise error
        return handle

    def close(self) -> None:
        """Stops the thread; requests still running end with an error event."""
        self._closing = True
        self.call(lambda: None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        busy = False
        while not self._closing:
            while busy and not self._commands.empty() or not busy:
                self._commands.get()()
                busy = bool(self.engine.waiting or self.engine.active)
                if self._closing:
                    break
            if not self._closing:
                busy = self.engine.step()
        for request in [*self.engine.active, *self.engine.waiting]:
            self.engine._fail(request, RuntimeError("the engine was closed"))
        while not self._commands.empty():  # submitters that came too late get an answer as well
            self._commands.get()()
        for request in list(self.engine.waiting):
            self.engine._fail(request, RuntimeError("the engine was closed"))
