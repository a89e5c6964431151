"""The server: OpenAI's API over one engine thread, and the chat page.

    GET  /                      the page (serve/page, static)
    POST /v1/chat/completions   body.py -> schemas.py -> messages.py and shape.py -> engine -> chat.py
    POST /v1/completions        ... -> completions.py
    POST /v1/responses          responses.py -> the same as for a chat -> responses.py
    POST /tokenize              what the model would read
    GET  /v1/models             the one model, with its size, checkpoint hash and limits
    GET  /health                200 while the engine can answer, else 503
    GET  /ready                 200 while a request would be taken now, else 503
    GET  /metrics               metrics.py
    GET  /openapi.json          openapi.py

A request passes these gates before it costs anything: where it comes from and whose key it has (gate.py), how long it
is (body.py), what it asks (schemas.py), whether a place is free, what it shows (messages.py), and whether it fits in
the context (the engine). Each refuses with one error shape (errors.py). A request that fails inside the engine fails
alone; a client that leaves frees its places at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from puna import __version__
from puna.errors import PunaError
from puna.serve import errors, gate, metrics, openapi, responses
from puna.serve.answers import Answers, Piece
from puna.serve.body import Bodies
from puna.serve.chat import Chat
from puna.serve.completions import Completions
from puna.serve.errors import ApiError, AsciiJSON
from puna.serve.limits import Limits
from puna.serve.messages import to_processor
from puna.serve.schemas import ChatRequest, CompletionRequest, JsonObject, Sampled, TokenizeRequest, offered, parse
from puna.serve.shape import check_tools, samplings
from puna.serve.stream import EventStream, Speller, gone

PAGE = Path(__file__).parent / "page"
# what the page heeds beforehand, and the fields of a request that its settings may set
SHOWN_LIMITS = ("pictures", "picture_bytes", "picture_pixels", "text_chars", "answer_tokens")
SHOWN_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


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
    tokenizer=None,
    limits: Limits | None = None,
    loopback_only: bool = False,
    keys: Sequence[str] = (),
) -> FastAPI:
    """The application. `engine` is a `puna.engine.EngineThread`, or a double with `prepare`, `submit`, `stats` and
    `alive` (tests/server/server_fakes.py).

    parameters, active_parameters, context (tokens) and pictures (does the model see?) describe the model. tokenizer:
    without one, what needs the text of token ids is refused: log-probabilities, /v1/completions of texts, /tokenize.
    loopback_only: refuse requests whose Host header is no loopback name. keys: the API keys; none: nobody needs one.
    """
    card = Card(model_name, checkpoint_hash, parameters, active_parameters, context, pictures)
    server = Server(engine, card, limits or Limits(), tokenizer)
    app = FastAPI(title="puna", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    app.state.server, app.state.limits, app.state.card = server, server.limits, card
    app.state.places, app.state.draining = server.places, False
    checked = gate.Keys(keys, server.limits.key_chars)
    app.add_middleware(gate.Gate, loopback_only=loopback_only, keys=checked, state=app.state)
    app.add_middleware(server.metrics.counted, paths=frozenset((*openapi.POSTS, *openapi.GETS, "/")))
    document = openapi.document(__version__)

    @app.get("/health")
    async def health():
        return AsciiJSON({"status": "ok"}) if engine.alive else AsciiJSON({"status": "engine stopped"}, 503)

    @app.get("/ready")
    async def ready():
        full = server.places.taken >= server.places.most
        why = "engine stopped" if not engine.alive else "stopping" if app.state.draining else "full" if full else ""
        return AsciiJSON({"status": why or "ready"}, 503 if why else 200)

    @app.get("/metrics")
    async def numbers():
        return Response(server.metrics.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/openapi.json")
    async def described():
        return AsciiJSON(document)

    @app.get("/v1/models")
    async def models():
        return AsciiJSON({"object": "list", "data": [server.model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        server.check_model(name)
        return AsciiJSON(server.model())

    for path, handler in (
        ("/v1/chat/completions", server.chat), ("/v1/completions", server.completions),
        ("/v1/responses", server.responses), ("/tokenize", server.tokenize),
    ):  # fmt: skip
        app.add_api_route(path, handler, methods=["POST"], response_model=None)

    @app.get("/")
    async def page():
        return FileResponse(PAGE / "index.html", media_type="text/html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


class Server:
    """The handlers that need the engine, and what they share."""

    def __init__(self, engine, card: Card, limits: Limits, tokenizer):
        self.engine, self.card, self.limits, self.tokenizer = engine, card, limits, tokenizer
        self.places, self.bodies, self.started = Places(limits.places), Bodies(limits), int(time.time())
        self.metrics = metrics.Metrics(
            engine.stats, lambda: {"places_taken": self.places.taken, "body_bytes_held": self.bodies.held}
        )

    # ---- the addresses

    async def chat(self, request: Request):
        asked = parse(await self.bodies.json(request), ChatRequest, self.limits)
        speller, n = self._speller(asked, "logprobs"), asked.n or 1

        def frame(answers: Answers) -> Chat:
            names = [tool["function"]["name"] for tool in asked.offered]
            return Chat(
                self.card.name, answers.prompt_tokens, n, self.limits.boxes, _wants_usage(asked), names, speller
            )

        return await self._answer(request, asked, lambda: [self._conversation(asked)], n, n, frame)

    async def completions(self, request: Request):
        asked = parse(await self.bodies.json(request), CompletionRequest, self.limits)
        speller, n = self._speller(asked, "logprobs"), asked.n or 1
        echo = [self._echo(prompt) for prompt in asked.prompts for _ in range(n)] if asked.echo else []

        def frame(answers: Answers) -> Completions:
            return Completions(
                self.card.name, answers.prompt_tokens, len(answers), _wants_usage(asked), echo, speller
            )

        def prompts() -> list:
            return [self._tokens(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]

        return await self._answer(request, asked, prompts, n, n * len(asked.prompts), frame)

    async def responses(self, request: Request):
        asked, chat, names = responses.parse_response(await self.bodies.json(request), self.limits)
        speller = self._speller(chat, "include")

        def frame(answers: Answers) -> responses.Response:
            tools = [tool["function"]["name"] for tool in chat.offered]
            return responses.Response(asked, self.card.name, answers.prompt_tokens, self.limits.boxes, tools, speller)

        with responses.renaming(names):
            return await self._answer(request, chat, lambda: [self._conversation(chat)], 1, 1, frame)

    async def tokenize(self, request: Request):
        asked = parse(await self.bodies.json(request), TokenizeRequest, self.limits)
        self.check_model(asked.model)

        def tokens() -> Sequence[int]:
            if asked.prompt is not None:
                return self._tokens(asked.prompt)
            messages = to_processor(asked.messages, offered(asked.tools), self.limits, self.card.pictures)
            return self.engine.prepare(messages).tokens

        with self.places.take(1):
            ids = [int(token) for token in await asyncio.to_thread(self._refusing, tokens)]
        return AsciiJSON({"tokens": ids, "count": len(ids), "max_model_len": self.card.context})

    # ---- what they share

    async def _answer(
        self, request: Request, asked: Sampled, prompts: Callable[[], list], n: int, count: int, frame: Callable
    ):
        """`count` answers, n to each of prompts(), in the frame that frame(answers) makes: whole or streamed."""
        self.check_model(asked.model)
        limits = self.limits
        with self.places.take(count) as place:
            salt = request.scope.get(gate.TENANT)

            def submit() -> Answers:  # opens pictures, encodes and queues: blocking work, hence its own thread
                return Answers(self.engine, prompts(), samplings(asked, limits, n), limits.answer_seconds, salt)

            answers = await asyncio.to_thread(self._refusing, submit, asked)
            made, pieces = frame(answers), self._measured(answers)
            if not asked.stream:
                return await _whole(request, answers, made.whole(pieces))
            place.keep()
            close = lambda: (answers.abort(), place.leave())  # noqa: E731
            return EventStream(made.events(pieces), close, limits.read_seconds)

    def _refusing(self, call: Callable, asked: Sampled | None = None):
        """call(), whose PunaError is the client's mistake, or the engine's end."""
        try:
            return call()
        except PunaError as error:
            if not self.engine.alive:
                raise ApiError(503, str(error), code="engine_stopped") from None
            raise _refusal(error, asked) from None

    def _conversation(self, asked: ChatRequest) -> list[dict]:
        """A chat's messages, as the processor takes them."""
        check_tools(asked, self.limits)
        form = "json" if asked.forced else "pythonic"  # what a grammar can demand
        messages = to_processor(asked.messages, asked.offered, self.limits, self.card.pictures, form)
        if isinstance(asked.response_format, JsonObject):
            texts = (part.get("text", "") for message in messages for part in message["content"])
            if not any("json" in text.lower() for text in texts):
                text = "with response_format json_object a message must say that JSON is wanted"
                raise ApiError(400, text, "messages", "invalid_value")
        return messages

    def _tokens(self, text: str) -> list[int]:
        """A plain text's ids: the document's beginning, then text; what looks like a control token is text."""
        if self.tokenizer is None:
            raise ApiError(400, "this server's model has no tokenizer; give token ids", "prompt")
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        known = self.tokenizer is not None and all(0 <= id < self.tokenizer.vocab_size for id in prompt)
        if not known:
            raise ApiError(400, "echo: the prompt's token ids have no text here", "echo")
        return self.tokenizer.decode(prompt, special=True)

    def _speller(self, asked: Sampled, field: str) -> Speller | None:
        if asked.top is None:
            return None
        if self.tokenizer is None:
            raise ApiError(400, f"{field}: this server's model has no tokenizer", field)
        return Speller(self.tokenizer)

    async def _measured(self, answers: Answers) -> AsyncIterator[tuple[int, Piece]]:
        """The answers' pieces, counted on their way."""
        counters = self.metrics
        counters.prompt_tokens.inc(answers.prompt_tokens)
        begun: set[int] = set()
        async for number, piece in answers.pieces():
            if piece.token is not None:
                counters.answer_tokens.inc()
                if number not in begun:
                    begun.add(number)
                    counters.first_token.observe(time.monotonic() - answers.began)
            if piece.finish_reason:
                counters.answers.labels(piece.finish_reason).inc()
                counters.whole.observe(time.monotonic() - answers.began)
            yield number, piece

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.card.name:
            text = f"there is no model {name[:100]!r} here; this server has {self.card.name!r}"
            raise ApiError(404, text, "model", "model_not_found")

    def model(self) -> dict:
        """OpenAI's model object, and what the page shows besides."""
        card = self.card
        return {
            "id": card.name, "object": "model", "created": self.started, "owned_by": "puna",
            "checkpoint": card.checkpoint, "parameters": card.parameters, "active_parameters": card.active_parameters,
            "context": card.context, "pictures": card.pictures,
            "limits": {name: getattr(self.limits, name) for name in SHOWN_LIMITS}, "sampling": list(SHOWN_SAMPLING),
        }  # fmt: skip


async def _whole(request: Request, answers: Answers, body):
    """The complete answer as one JSON object; a client that leaves before it is done ends the work."""
    made = asyncio.ensure_future(body)
    watch = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({made, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return AsciiJSON({}, status_code=499)  # nobody is there to read it
        return AsciiJSON(made.result())
    finally:
        answers.abort()
        made.cancel()
        watch.cancel()
        await asyncio.gather(made, watch, return_exceptions=True)


def _wants_usage(asked: ChatRequest | CompletionRequest) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _refusal(error: PunaError, asked: Sampled | None) -> ApiError:
    """What the engine says of a request. Its messages about a field begin with the field's name and a colon."""
    text = str(error)
    name, colon, rest = text.partition(": ")
    if colon and name == "constraint":
        forced = isinstance(asked, ChatRequest) and asked.forced
        name = "regex" if asked is not None and asked.regex else "tool_choice" if forced else "response_format"
        return ApiError(400, f"{name}: {rest}", name, "invalid_value")
    if colon and name in Sampled.model_fields:
        return ApiError(400, text, name, "invalid_value")
    return ApiError(400, text, "messages", "context_length_exceeded" if "context" in text else None)


class Places:
    """How many answers are being made or wait; one more than `most` is a 429 that says when to try again."""

    def __init__(self, most: int):
        self.most, self.taken = most, 0

    def take(self, count: int) -> Place:
        if self.taken + count > self.most:
            message = f"{self.taken} answers are being made or wait already; try again shortly"
            raise ApiError(429, message, code="overloaded", headers={"retry-after": "1"})
        return Place(self, count)


class Place:
    """One request's places: given back on leaving the `with` block, or later by `leave` after `keep`."""

    def __init__(self, places: Places, count: int):
        self.places, self.count, self.kept = places, count, False
        places.taken += count

    def keep(self) -> None:
        self.kept = True

    def leave(self) -> None:
        self.places.taken -= self.count
        self.count = 0

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exception) -> None:
        if not self.kept or exception[0] is not None:
            self.leave()
