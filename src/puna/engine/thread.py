"""The engine in a thread of its own, for a server: requests come in from any thread, events go out through queues.

    caller's thread                        engine's thread
    submit(): tokenise, check  --inbox-->  start
    handle.abort()             --inbox-->  abort               step, step, step … sleeps when there is nothing to do
    for event in handle:       <--queue--  sink

Tokenising, opening pictures and compiling grammars happen in the caller's thread, so a wrong request is refused there
and does not hold up the others. A handle's queue needs no limit of its own: max_tokens bounds it.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from puna.engine.engine import Engine
from puna.engine.request import Event
from puna.engine.sampler import Sampling
from puna.errors import PunaError

Result = TypeVar("Result")
log = logging.getLogger("puna.engine")


class Handle:
    """One request in an `EngineThread`: iterate over its events, or abort it.

    The last event has a finish_reason and the completion. If the request failed, iterating raises its error instead.
    """

    def __init__(self, id: str, prompt_tokens: int, abort: Callable[[str], None]):
        self.id, self.prompt_tokens = id, prompt_tokens
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._abort = abort
        self._over = False

    def __iter__(self) -> Iterator[Event]:
        while not self._over:
            event = self.events.get()
            if event.completion is not None:
                self._over = True
                if event.completion.error is not None:
                    raise event.completion.error
            yield event

    def abort(self) -> None:
        """Ends the request soon; its last event then has the finish_reason "abort". Harmless when it is over."""
        self._abort(self.id)


class EngineThread:
    """Runs `engine`, which nobody else may then use, until `close`. Also a context manager."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._numbers = itertools.count(1)
        self._inbox: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Can requests be answered?"""
        return self._thread.is_alive() and not self._closing

    def prepare(self, prompt, salt: str | None = None):
        """`Engine.prepare`, in the caller's thread."""
        return self.engine.prepare(prompt, salt)

    def stats(self) -> dict:
        """`Engine.stats`: the engine's numbers, for whoever watches."""
        return self.engine.stats()

    def submit(self, prompt, sampling: Sampling | None = None, salt: str | None = None) -> Handle:
        """Queues a request (messages, `Encoded` or token ids). Raises PunaError at once if it cannot be served.

        salt: prompts with different ones share nothing in the prefix cache.
        """
        prepared = self.engine.prepare(prompt, salt)
        handle = Handle(f"answer-{next(self._numbers)}", len(prepared.tokens), self._abort)
        request = self.engine.make(prepared, sampling, handle.id, handle.events.put, salt)
        self._tell(lambda: self.engine.start(request))
        return handle

    def call(self, function: Callable[[Engine], Result]) -> Result:
        """What `function` returns or raises when the engine's thread calls it with the engine, between two steps."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.engine))
            except Exception as error:
                future.set_exception(error)

        self._tell(run)
        return future.result()

    def close(self) -> None:
        """Aborts what is running and ends the thread; returns when it has ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _abort(self, id: str) -> None:
        with self._wake:
            if not self._closing:
                self._inbox.append(lambda: self.engine.abort(id))
                self._wake.notify()

    def _tell(self, call: Callable[[], object]) -> None:
        with self._wake:
            if not self.alive:
                raise PunaError("the engine has been stopped: it takes no more requests")
            self._inbox.append(call)
            self._wake.notify()

    def _run(self) -> None:
        engine = self.engine
        try:
            while True:
                with self._wake:
                    while not (self._inbox or engine.busy or self._closing):
                        self._wake.wait()
                    if self._closing:
                        break
                    calls = [self._inbox.popleft() for _ in range(len(self._inbox))]
                try:
                    for call in calls:
                        call()
                    if engine.busy:
                        engine.step()
                except Exception as error:  # a defect of the engine: who is in it fails, who comes next is served
                    log.exception("the engine failed in a step")
                    engine.fail_all(error)
        finally:
            with self._wake:
                self._closing = True
                calls, self._inbox = list(self._inbox), deque()
            for call in calls:
                call()
            engine.abort_all()
