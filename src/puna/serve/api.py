"""The server: OpenAI's chat completions over one engine thread, and the chat page.

    GET  /                      the page (serve/page, static)
    POST /v1/chat/completions   schemas.py -> messages.py -> engine -> stream.py
    GET  /v1/models             the one model, with its size, checkpoint hash and limits
    GET  /health                200 while the engine can answer, else 503

A request passes four gates before it costs anything: where it comes from and how long it is (gate.py), what it asks
(schemas.py), what it shows (messages.py), and whether it fits in the context (the engine). Each refuses with one
error shape (errors.py). A request that fails inside the engine fails alone; a client that leaves frees its place at
once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from puna.engine.sampler import Sampling
from puna.errors import PunaError
from puna.serve import errors, gate
from puna.serve.answers import Answer
from puna.serve.errors import ApiError, AsciiJSON
from puna.serve.limits import Limits
from puna.serve.messages import to_processor
from puna.serve.schemas import ChatRequest, parse
from puna.serve.stream import Completion, EventStream, Piece, gone

log = logging.getLogger("puna.serve")
PAGE = Path(__file__).parent / "page"
# what the page heeds beforehand, and the fields of a request that its settings may set
SHOWN_LIMITS = ("pictures", "picture_bytes", "picture_pixels", "text_chars", "answer_tokens")
SHOWN_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
DEFAULT_TOKENS = 512  # max_tokens of a request that names none


@dataclass(frozen=True)
class Card:
    """What a server says about its model."""

    name: str
    checkpoint: str = ""
    parameters: int = 0
    active_parameters: int = 0
    context: int = 0
    pictures: bool = True


def create_app(
    engine,
    model_name: str,
    checkpoint_hash: str = "",
    *,
    parameters: int = 0,
    active_parameters: int = 0,
    context: int = 0,
    pictures: bool = True,
    limits: Limits | None = None,
    loopback_only: bool = False,
) -> FastAPI:
    """The application. `engine` is a `puna.engine.EngineThread` (or a double with `submit`, see answers.py).

    parameters, active_parameters, context (tokens) and pictures (does the model see?) describe the model;
    loopback_only: refuse requests whose Host header is no loopback name.
    """
    limits = limits or Limits()
    card = Card(model_name, checkpoint_hash, parameters, active_parameters, context, pictures)
    started = int(time.time())
    app = FastAPI(title="puna", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.add_middleware(gate.Gate, loopback_only=loopback_only)
    places = _Places(limits.open_requests)
    app.state.limits, app.state.card, app.state.places = limits, card, places

    @app.get("/health")
    async def health():
        alive = getattr(engine, "alive", True)
        return AsciiJSON({"status": "ok" if alive else "engine stopped"}, status_code=200 if alive else 503)

    @app.get("/v1/models")
    async def models():
        return AsciiJSON({"object": "list", "data": [_described(card, started, limits)]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        _check_model(name, card)
        return AsciiJSON(_described(card, started, limits))

    @app.post("/v1/chat/completions")
    async def completions(request: Request):
        with places.take() as place:
            chat = parse(await gate.read_body(request, limits), limits)
            if chat.model is not None:
                _check_model(chat.model, card)
            answer = await asyncio.to_thread(_submit, engine, chat, card, limits)
            options = chat.stream_options
            completion = Completion(
                card.name, answer.prompt_tokens, limits.boxes, bool(options and options.include_usage),
                [tool["function"]["name"] for tool in chat.offered],
            )  # fmt: skip
            if not chat.stream:
                return await _whole(request, answer, completion)
            place.keep()
            return EventStream(completion.events(answer.pieces()), close=lambda: (answer.abort(), place.leave()))

    @app.get("/")
    async def page():
        return FileResponse(PAGE / "index.html", media_type="text/html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def _submit(engine, chat: ChatRequest, card: Card, limits: Limits) -> Answer:
    """Opens the pictures, encodes and queues the request: blocking work, hence its own thread."""
    messages = to_processor(chat, limits, card.pictures)
    wanted = {"temperature": chat.temperature, "top_p": chat.top_p, "top_k": chat.top_k, "seed": chat.seed}
    given = {name: value for name, value in wanted.items() if value is not None}
    try:
        if chat.limit is not None:
            return Answer(engine, messages, Sampling(max_tokens=chat.limit, stop=chat.stops, **given))
        try:
            return Answer(engine, messages, Sampling(max_tokens=DEFAULT_TOKENS, stop=chat.stops, **given))
        except PunaError:  # no room for the default: take the room there is, which is less
            return Answer(engine, messages, Sampling(max_tokens=None, stop=chat.stops, **given))
    except PunaError as error:
        if not getattr(engine, "alive", True):
            raise ApiError(503, str(error), code="engine_stopped") from None
        raise ApiError(
            400, str(error), "messages", "context_length_exceeded" if "context" in str(error) else None
        ) from None


async def _whole(request: Request, answer: Answer, completion: Completion):
    """The complete answer as one JSON object; a client that leaves before it is done ends the work."""
    collect = asyncio.create_task(_collect(answer.pieces()))
    watch = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({collect, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not collect.done():
            return AsciiJSON({}, status_code=499)  # nobody is there to read it
        return AsciiJSON(completion.whole(*collect.result()))
    finally:
        answer.abort()
        collect.cancel()
        watch.cancel()
        await asyncio.gather(collect, watch, return_exceptions=True)


async def _collect(pieces: AsyncIterator[Piece]) -> tuple[str, int, str]:
    text, tokens, reason = [], 0, "stop"
    async for piece in pieces:
        text.append(piece.text)
        tokens, reason = piece.tokens, piece.finish_reason or reason
    return "".join(text), tokens, reason


def _check_model(name: str, card: Card) -> None:
    if name != card.name:
        raise ApiError(
            404, f"there is no model {name[:100]!r} here; this server has {card.name!r}", "model", "model_not_found"
        )


def _described(card: Card, started: int, limits: Limits) -> dict:
    """OpenAI's model object, and what the page shows besides."""
    return {
        "id": card.name, "object": "model", "created": started, "owned_by": "puna",
        "checkpoint": card.checkpoint, "parameters": card.parameters, "active_parameters": card.active_parameters,
        "context": card.context, "pictures": card.pictures,
        "limits": {name: getattr(limits, name) for name in SHOWN_LIMITS},
        "sampling": [name for name in SHOWN_SAMPLING if name in ChatRequest.model_fields],
    }  # fmt: skip


class _Places:
    """How many requests are being answered; one more than `most` is a 503 that says when to try again."""

    def __init__(self, most: int):
        self.most, self.taken = most, 0

    def take(self) -> _Place:
        if self.taken >= self.most:
            message = f"{self.most} requests are being answered already; try again shortly"
            raise ApiError(503, message, code="overloaded", headers={"retry-after": "1"})
        return _Place(self)


class _Place:
    """One request's place: given back on leaving the `with` block, or later by `leave` after `keep`."""

    def __init__(self, places: _Places):
        self.places, self.kept, self.left = places, False, False
        places.taken += 1

    def keep(self) -> None:
        self.kept = True

    def leave(self) -> None:
        if not self.left:
            self.left = True
            self.places.taken -= 1

    def __enter__(self) -> _Place:
        return self

    def __exit__(self, *exception) -> None:
        if not self.kept or exception[0] is not None:
            self.leave()


def serve(
    model_path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_browser: bool = False,
    name: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Loads the model and answers until SIGINT or SIGTERM; running answers then get `drain_seconds` to finish.

    host: 127.0.0.1 keeps it to this machine; there is no login, so put a proxy with one before it elsewhere. port 0:
    any free one. Raises PunaError if the model has no tokenizer, or the address is taken.
    """
    from puna.convert import load
    from puna.engine import Engine, EngineThread

    limits = limits or Limits.from_env()
    listener = listen(host, port)
    try:
        model, processor = load(model_path)
        if processor is None:
            raise PunaError(f"{model_path} holds no tokenizer, so it cannot chat; serve a stage's folder made by puna")
        counts = model.parameter_count()
        engine = EngineThread(Engine(model, processor))
        app = create_app(
            engine, name or Path(model_path).resolve().name, fingerprint(model),
            parameters=counts.total, active_parameters=counts.active, context=engine.engine.max_context,
            pictures=model.config.vision is not None and processor.image is not None,
            limits=limits, loopback_only=gate.is_loopback(host),
        )  # fmt: skip
        try:
            run(app, listener, open_browser)
        finally:
            engine.close()
    finally:
        listener.close()


def run(app: FastAPI, listener: socket.socket, open_browser: bool = False) -> None:
    """Answers on `listener` until SIGINT or SIGTERM, lets running answers finish (`drain_seconds`), and returns."""
    import uvicorn

    limits: Limits = app.state.limits
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=limits.drain_seconds,
        h11_max_incomplete_event_size=64 * 1024,
    )
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
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded, so that a taken port is said at once."""
    if not 0 <= port <= 65535:
        raise PunaError(f"cannot listen on port {port}; choose a --port from 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
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
