"""Running a server: the address, the model, and how it ends.

The first SIGINT or SIGTERM begins to drain: running answers go on, new requests get 503, `/ready` says no. When the
last answer is out, or after `drain_seconds`, the server ends. A second signal ends it at once.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from puna.errors import PunaError
from puna.serve import gate
from puna.serve.api import create_app
from puna.serve.limits import Limits

BACKLOG = 2048  # connections that the kernel holds until the loop takes them


def serve(
    model_path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_browser: bool = False,
    name: str | None = None,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    engine: str = "puna",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Loads the model and answers until SIGINT or SIGTERM.

    host: 127.0.0.1 keeps it to this machine. port 0: any free one. keys: API keys, PUNA_API_KEY of the environment
    besides; every request must bring one of them (none at all: nobody needs one). engine: "puna", or "vllm" for an
    export (serve/vllm.py). options: further keywords of `puna.Engine`. Raises PunaError if the model has no tokenizer,
    or the address is taken.
    """
    if (path := Path(model_path)).suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise PunaError(
            f"{path}: GGUF is not served, since its Llama 4 is not this one: llama.cpp fixes the chunk at 8192, the "
            "attention temperature and the NoPE layers, and shows pictures as at most 3 x 3 tiles, so answers would "
            "differ; serve the model that it was made from"
        )
    limits = limits or Limits.read()
    keys = [*keys, os.environ["PUNA_API_KEY"]] if "PUNA_API_KEY" in os.environ else keys
    gate.Keys(keys, limits.key_chars)
    listener = listen(host, port)
    try:
        if engine == "vllm":
            from puna.serve.vllm import load_vllm

            if options:
                raise PunaError(f"--engine vllm has no {', '.join(options)}: these are our engine's settings")
            thread, facts = load_vllm(model_path, limits)
        else:
            thread, facts = load_puna(model_path, limits, options)
        try:
            name = name or Path(model_path).resolve().name
            app = create_app(thread, name, **facts, limits=limits, loopback_only=gate.is_loopback(host), keys=keys)
            run(app, listener, open_browser)
        finally:
            thread.close()
    finally:
        listener.close()


def load_puna(model_path: str | Path, limits: Limits, options: Mapping[str, Any] | None = None):
    """(engine thread, what create_app wants to know about the model)."""
    from puna.convert import load
    from puna.engine import Engine, EngineThread

    model, processor = load(model_path)
    if processor is None:
        raise PunaError(f"{model_path} holds no tokenizer, so it cannot chat; serve a stage's folder made by puna")
    counts = model.parameter_count()
    engine = Engine(model, processor, max_batch=limits.running, **(options or {}))
    facts = {
        "checkpoint_hash": fingerprint(model), "parameters": counts.total, "active_parameters": counts.active,
        "context": engine.max_context, "tokenizer": processor.tokenizer,
        "pictures": model.config.vision is not None and processor.image is not None,
    }  # fmt: skip
    return EngineThread(engine), facts


def run(app: FastAPI, listener: socket.socket, open_browser: bool = False) -> None:
    """Answers on `listener` until SIGINT or SIGTERM, lets running answers finish (`drain_seconds`), and returns."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{app.state.card.name} answers at {url} (Ctrl-C stops)", flush=True)
    if open_browser:
        webbrowser.open(url)
    # uvicorn raises the signal once more after draining; nobody needs to die of it then
    main = threading.current_thread() is threading.main_thread()  # elsewhere signals are not ours to handle
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        Draining(app).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Draining(uvicorn.Server):
    """uvicorn's server, which on a signal first goes on until the answers that have begun are out."""

    def __init__(self, app: FastAPI, **options):
        self.state, self.until = app.state, 0.0
        limits: Limits = app.state.limits

        class Patient(_Patient):
            seconds = limits.header_seconds

        settings = {"log_level": "warning", "access_log": False, "server_header": False, **options}
        super().__init__(
            uvicorn.Config(
                app, http=Patient, ws="none", backlog=BACKLOG, timeout_keep_alive=limits.header_seconds,
                timeout_graceful_shutdown=1, h11_max_incomplete_event_size=64 * 1024, **settings,
            )
        )  # fmt: skip

    def handle_exit(self, sig, frame) -> None:
        if self.state.draining:
            return super().handle_exit(sig, frame)
        self.drain()
        self._captured_signals.append(sig)

    def drain(self) -> None:
        """Begins to stop; called by a signal, or by whoever runs the server in a thread."""
        self.until, self.state.draining = time.monotonic() + self.state.limits.drain_seconds, True

    async def on_tick(self, counter: int) -> bool:
        if self.state.draining and (self.state.places.taken == 0 or time.monotonic() > self.until):
            self.should_exit = True
        return await super().on_tick(counter)


class _Patient(H11Protocol):
    """uvicorn's protocol, which closes a connection whose next request has no headers after `seconds`: uvicorn itself
    waits for ever for the first one, and for one that has begun."""

    seconds = 30
    _late = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._arm()

    def on_response_complete(self) -> None:
        self._arm()
        super().on_response_complete()

    def connection_lost(self, exc) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(self.seconds, self._close_if_idle, self.cycle)

    def _close_if_idle(self, answered) -> None:
        if self.cycle is answered and not self.transport.is_closing():
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded, so that a taken port is said at once."""
    if not 0 <= port <= 65535:
        raise PunaError(f"cannot listen on port {port}; choose a --port from 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        raise PunaError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from None
    return listener


def fingerprint(model) -> str:
    """SHA-256 (hex) over all weights as loaded, by name: equal weights, equal fingerprint."""
    from puna.convert.puna import tensor_hash

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}={tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()
