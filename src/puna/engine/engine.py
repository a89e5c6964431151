"""The engine: many answers at once, one token a step each.

    engine = Engine(model, processor)
    engine.generate([[{"role": "user", "content": "What is 2 + 3?"}], ...], max_tokens=16)     a list of Completion
    for piece in engine.stream(messages, temperature=0.6, seed=1): print(piece, end="")

Underneath, requests are added at any time (`add_request`) and `step` advances all of them: one slice of waiting
prompts, then one forward pass that gives every running answer its next token. Who finishes leaves at once and a
waiting request takes the place (scheduler.py). Keys and values live in the hybrid cache (cache.py), tokens are
chosen in sampler.py, text is cut in text.py; this file joins them.

Three promises:

* *Independence.* An answer does not depend on who else is in the batch (up to the order of floating-point sums).
* *Isolation.* Whatever goes wrong with one request (a NaN, an exception in the forward pass) ends that request
  alone: a failed batch is repeated one request at a time, which is safe since the cache only counts what was
  completed.
* *Text only.* A model's answer is text: control tokens other than the stop tokens are never sampled, so nothing it
  says can open a header or place a picture.

Not thread-safe: one thread uses an engine. The server's is in thread.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from puna.engine.cache import HybridCache
from puna.engine.constrain import Grammars
from puna.engine.request import Completion, Event, Prompt, Running, Sink, prepare
from puna.engine.sampler import Choice, Sampling, choose
from puna.engine.scheduler import Scheduler
from puna.errors import PunaError

PREFILL_TOKENS = 2048  # most prompt tokens of one forward pass
TILES_AT_ONCE = 16  # most tiles of one pass through the vision tower
KEEP_BYTES = 2**28  # an idle engine gives its cache back if it is larger than this


class Engine:
    """Decodes up to `max_batch` sequences together.

    model: a `puna.model.Llama4`; it is used in evaluation mode, and left in the mode it was in. processor: None for
    a model without a tokenizer (prompts are then token ids, and answers have no text). max_context: most tokens of
    a prompt with its answer, at most and by default the model's own. prefill_tokens: most prompt tokens of one
    forward pass.
    """

    def __init__(
        self,
        model,
        processor=None,
        max_batch: int = 32,
        max_context: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        config = model.config
        for name, value in (("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PunaError(f"{name}: must be an integer of at least 1, not {value!r}")
        if max_context is not None and not 2 <= max_context <= config.max_context:
            raise PunaError(
                f"max_context: must be at least 2 and at most the model's {config.max_context}, not {max_context}"
            )
        if processor is not None and processor.tokenizer.vocab_size > config.vocab_size:
            raise PunaError(
                f"the tokenizer has {processor.tokenizer.vocab_size} ids, the model only {config.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.processor, self.config = model, processor, config
        self.max_context = max_context or config.max_context
        self.device = next(model.parameters()).device
        self.cache = HybridCache(config, max_batch, model.dtype, self.device, self.max_context)
        self.scheduler = Scheduler(max_batch, config.chunk, prefill_tokens)
        self._requests: dict[str, Running] = {}
        self._events: list[Event] = []  # of requests without a sink, for step() to return
        self._numbers = itertools.count(1)
        self._pad = 1 if config.patch_token == 0 else 0
        self._banned_V = self._banned()
        self.grammars = Grammars(processor and processor.tokenizer, config.vocab_size)

    def _banned(self) -> Tensor | None:
        """bool [V]: control tokens that don't end an answer, and ids no text has."""
        if self.processor is None:
            return None
        tokenizer = self.processor.tokenizer
        banned_V = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        banned_V[tokenizer.vocab_size :] = True
        banned_V[sorted(set(tokenizer.special.values()) - set(tokenizer.stop_ids))] = True
        return banned_V.to(self.device)

    # ---- requests

    def prepare(self, prompt, salt: str | None = None) -> Prompt:
        """Messages, an `Encoded` or token ids, tokenised and checked; any thread may do this. Raises PunaError.

        salt: prompts with different ones share nothing in the prefix cache (one for each tenant).
        """
        return prepare(prompt, self.processor, self.config, self.max_context)

    def add_request(
        self, prompt, sampling: Sampling | None = None, id: str | None = None, sink: Sink | None = None
    ) -> str:
        """Queues a request and returns its id. Its events go to `sink`, or without one to whoever calls `step`.

        Raises PunaError at once for a prompt or sampling that cannot be served, and for an id in use.
        """
        id = f"request-{next(self._numbers)}" if id is None else id
        self.start(self.make(prompt, sampling, id, sink))
        return id

    def make(self, prompt, sampling: Sampling | None, id: str, sink: Sink | None = None) -> Running:
        """A request checked as a whole, its grammar compiled; any thread may do this. Raises PunaError."""
        prompt, sampling = self.prepare(prompt), sampling or Sampling()
        own = (self.processor, self.config, self.max_context)
        return Running.make(id, prompt, sampling, *own, sink, self.grammars, self.device)

    def start(self, request: Running) -> None:
        """Queues a request that `make` made. PunaError: its id is in use."""
        if request.id in self._requests:
            raise PunaError(f"a request with the id {request.id!r} is running: ids must differ")
        self._requests[request.id] = request
        self.scheduler.add(request)

    def abort(self, id: str) -> bool:
        """Ends a request now (finish_reason "abort") and frees its place. False if none of that id is running."""
        request = self._requests.get(id)
        if request is None:
            return False
        self._finish(request, "abort")
        return True

    def abort_all(self) -> None:
        """Ends every request."""
        for id in list(self._requests):
            self.abort(id)

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error: for whoever runs the engine, when `step` itself raised."""
        for request in list(self._requests.values()):
            if request.completion is None:
                self._finish(request, "error", error)

    @property
    def busy(self) -> bool:
        """Are there requests that are not finished?"""
        return bool(self._requests)

    # ---- one step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One slice of some prompts, one more token for every answer. Returns the events of requests without a sink."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            for request in self.scheduler.admit():
                request.admitted = time.perf_counter()
            group = self.scheduler.prefill()
            if group:
                self._advance(group, self._prefill)
            decoding = self.scheduler.active[: self.scheduler.decoding]
            if decoding:
                self._advance(decoding, self._decode)
        finally:
            if training:
                self.model.train()
        if not self._requests and self.cache.nbytes > KEEP_BYTES:
            self.cache.release()
        events, self._events = self._events, []
        return events

    def _advance(
        self, group: list[Running], forward: Callable[[list[Running]], tuple[list[Running], Tensor | None]]
    ) -> None:
        """Runs `forward` on the group, or on each alone if together it fails, and gives out the tokens it leads to."""
        try:
            ready, logits_BV = forward(group)
        except Exception as error:  # whose fault it is shows when each runs alone
            if len(group) == 1:
                self._finish(group[0], "error", error)
                return
            for request in group:
                if request.completion is None:
                    self._advance([request], forward)
            return
        if not ready:
            return
        chosen = choose(logits_BV, [request.chooser for request in ready], self._banned_V)
        for request, result in zip(ready, chosen, strict=True):
            if request.completion is not None:  # a sink may have aborted it
                continue
            if isinstance(result, Choice):
                self._accept(request, result)
            else:
                self._finish(request, "error", result)

    def _prefill(self, group: list[Running]) -> tuple[list[Running], Tensor | None]:
        """The next prompt slice of each; returns those whose prompt is complete, with their next logits [n, V]."""
        lengths = [self.scheduler.slice_length(request) for request in group]
        width = max(lengths)
        tokens_BT = torch.full((len(group), width), self._pad)
        features = []
        for i, (request, n) in enumerate(zip(group, lengths, strict=True)):
            stop = request.fed + n
            tokens_BT[i, :n] = torch.from_numpy(request.prompt.tokens[request.fed : stop])
            if request.prompt.tiles is not None:
                if request.features is None:
                    request.features = self._encode_pictures(request.prompt.tiles)
                features.append(request.slice_features(request.fed, stop))
        self.cache.reserve(max(r.row for r in group) + 1, max(r.length for r in group))
        view = self.cache.view([request.row for request in group], width)
        features_nD = torch.cat(features) if any(len(f) for f in features) else None
        hidden_BTD = self.model.hidden(tokens_BT.to(self.device), features=features_nD, cache=view)
        done = [i for i, (r, n) in enumerate(zip(group, lengths, strict=True)) if r.fed + n == r.length]
        last = [lengths[i] - 1 for i in done]
        logits_BV = self.model.head(hidden_BTD[done, last]) if done else None
        self.cache.advance([request.row for request in group], lengths)  # from here on nothing may fail
        for request, n in zip(group, lengths, strict=True):
            request.fed += n
        ready = [group[i] for i in done]
        for request in ready:
            request.features = None
            if (rows := self.scheduler.promote(request)) is not None:
                self.cache.swap(*rows)
        return ready, logits_BV

    def _encode_pictures(self, tiles: Tensor) -> Tensor:
        """Tiles [n, 3, S, S] to the features of their patch tokens, [n · tokens_per_tile, D]."""
        parts = [self.model.image_features(part.to(self.device)).flatten(0, 1) for part in tiles.split(TILES_AT_ONCE)]
        return torch.cat(parts)

    def _decode(self, group: list[Running]) -> tuple[list[Running], Tensor]:
        """Feeds each its newest token; returns all of them with logits [n, V]."""
        rows = [request.row for request in group]
        tokens_B1 = torch.tensor([[request.tokens[-1]] for request in group], device=self.device)
        hidden_B1D = self.model.hidden(tokens_B1, cache=self.cache.view(rows, 1))
        logits_BV = self.model.head(hidden_B1D[:, 0])
        self.cache.advance(rows, [1] * len(rows))
        return group, logits_BV

    def _accept(self, request: Running, choice: Choice) -> None:
        """The request's next token was chosen: text, stops and limits."""
        token = choice.token
        if not request.tokens:
            request.first = time.perf_counter()
        request.tokens.append(token)
        request.choices.append(choice)
        if token in request.stop_ids:
            self._finish(request, "stop")
            return
        piece = request.stream.push(token)
        request.pieces.append(piece)
        self._emit(request, Event(request.id, piece, token, choice.logprob, top_logprobs=choice.top))
        if request.completion is not None:
            return
        if request.stream.stopped:
            self._finish(request, "stop")
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length")

    def _finish(self, request: Running, reason: str, error: Exception | None = None) -> None:
        """The request leaves: its row is given to another and its last event is sent."""
        row, moves = request.row, self.scheduler.remove(request)
        del self._requests[request.id]
        if row >= 0:
            self.cache.free(row, wipe=reason in ("abort", "error"))
            for source, target in moves:
                self.cache.move(source, target)
        piece = request.stream.flush()
        request.pieces.append(piece)
        if request.stream.stopped and reason == "length":
            reason = "stop"
        request.features = None
        self._emit(request, Event(request.id, piece, completion=request.complete(reason, error)))

    def _emit(self, request: Running, event: Event) -> None:
        if request.sink is None:
            self._events.append(event)
            return
        try:
            request.sink(event)
        except Exception as error:  # the listener's mistake is this request's end, nobody else's
            request.sink = _nobody
            if request.completion is None:
                self._finish(request, "error", error)

    # ---- for one caller

    def generate(
        self, prompts: Sequence, seed: int | Sequence[int] | None = None, errors: str = "raise", **sampling
    ) -> list[Completion]:
        """Answers to all prompts (each a list of messages, an `Encoded` or token ids), in their order.

        Other keywords are `Sampling`'s. seed: one for all, or one for each prompt. errors: "raise" raises the first
        request's error (and drops the rest), "return" puts it in that request's Completion (finish_reason "error").
        """
        if errors not in ("raise", "return"):
            raise PunaError(f'errors: must be "raise" or "return", not {errors!r}')
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], dict)):
            raise PunaError("generate takes a list of prompts: put the messages in one more list")
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise PunaError(f"seed: {len(seeds)} seeds were given for {len(prompts)} prompts")
        samplings = [_settings("generate", seed=s, **sampling) for s in seeds]
        results: list[Completion | None] = [None] * len(prompts)
        own: dict[str, int] = {}

        failed: list[Exception] = []

        def sink(event: Event) -> None:
            if event.completion is not None:
                results[own.pop(event.id)] = event.completion
                if event.completion.error is not None:
                    failed.append(event.completion.error)

        todo = iter(range(len(prompts)))
        held: list[Event] = []  # of requests that others added
        try:
            while True:
                # Prompts are tokenised as they are needed, so that ten thousand pictures need not be in memory at
                # once.
                while len(self.scheduler.waiting) < self.scheduler.rows and (i := next(todo, None)) is not None:
                    id = f"request-{next(self._numbers)}"
                    own[id] = i
                    try:
                        self.add_request(prompts[i], samplings[i], id, sink)
                    except Exception as error:
                        if errors == "raise":
                            raise
                        del own[id]
                        results[i] = Completion(id, "", [], [], "error", 0, error=error)
                if not own:
                    return results
                held += self.step()
                if failed and errors == "raise":
                    raise failed[0]
        finally:
            for id in list(own):
                self.abort(id)
            self._events = held + self._events

    def stream(self, messages, **sampling) -> Iterator[str]:
        """The answer to one prompt, piece by piece. Keywords are `Sampling`'s; closing the generator aborts."""
        settings = _settings("stream", **sampling)
        events: list[Event] = []
        id = self.add_request(messages, settings, sink=events.append)
        held: list[Event] = []  # of requests that others added
        try:
            while True:
                held += self.step()
                now, events[:] = list(events), []
                for event in now:
                    if event.text:
                        yield event.text
                    if event.completion is not None:
                        if event.completion.error is not None:
                            raise event.completion.error
                        return
        finally:
            self.abort(id)
            self._events = held + self._events


def _settings(caller: str, **sampling) -> Sampling:
    try:
        return Sampling(**sampling)
    except TypeError as error:
        raise PunaError(f"{caller}: {str(error).partition(') ')[2] or error}") from error


def _nobody(event: Event) -> None:
    """Takes the events of a request whose listener failed."""
