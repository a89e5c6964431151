"""The engine: many answers at once, one token a step each.

    engine = Engine(model, processor)
    engine.generate([[{"role": "user", "content": "What is 2 + 3?"}], ...], max_tokens=16)     a list of Completion
    for piece in engine.stream(messages, temperature=0.6, seed=1): print(piece, end="")

Underneath, requests are added at any time (`add_request`) and `step` advances all of them: one slice of waiting
prompts, then one forward pass that gives every running answer its next token. Who finishes leaves at once and a
waiting request takes the place; who finds no memory waits or goes back to waiting (scheduler.py). Keys and values live
in the hybrid cache (cache.py) and, for prompts that begin alike, in the prefix cache (prefix.py); forward.py runs the
model, tokens are chosen in sampler.py, text is cut in text.py; this file joins them.

Three promises:

* *Independence.* An answer does not depend on who else is in the batch: up to the order of floating-point sums (the
  same requests in the same order at the same state of the engine: the same bits), or to the bit with `batch_invariant`.
* *Isolation.* Whatever goes wrong with one request (a NaN, an exception in the forward pass) ends that request
  alone: a failed batch is repeated one request at a time, which is safe since the cache only counts what was
  completed.
* *Text only.* A model's answer is text: control tokens other than the stop tokens are never sampled, so nothing it
  says can open a header or place a picture.

Not thread-safe: one thread uses an engine. The server's is in thread.py.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from puna.engine.cache import HybridCache, page_bytes, page_size
from puna.engine.forward import Forward
from puna.engine.pages import Pages
from puna.engine.prefix import PrefixCache
from puna.engine.request import Completion, Event, Prompt, Running, Sink, prepare
from puna.engine.sampler import Sampling, sample
from puna.engine.scheduler import Scheduler
from puna.errors import PunaError

PREFILL_TOKENS = 2048  # most prompt tokens of one forward pass
PREFIX_BYTES = 2**27
KEEP_BYTES = 2**28  # an idle engine gives its cache back if it is larger than this


class Engine:
    """Decodes up to `max_batch` sequences together.

    model: a `puna.model.Llama4`; it is used in evaluation mode, and left in the mode it was in. processor: None for
    a model without a tokenizer (prompts are then token ids, and answers have no text). max_context: most tokens of
    a prompt with its answer, at most and by default the model's own. prefill_tokens: most prompt tokens of one
    forward pass. cache_bytes: most memory for keys and values of global layers, beyond which answers are preempted (by
    default as much as max_batch sequences can need); prefix_cache_bytes: of these, what may be kept for prompts to come
    (0: nothing). batch_invariant: equal bits whatever else runs (forward.py), several times slower.
    """

    def __init__(
        self,
        model,
        processor=None,
        max_batch: int = 32,
        max_context: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        cache_bytes: int | None = None,
        prefix_cache_bytes: int = PREFIX_BYTES,
        batch_invariant: bool = False,
    ):
        config = model.config
        page = page_bytes(config, model.dtype)
        for name, value, least in (
            ("max_batch", max_batch, 1), ("prefill_tokens", prefill_tokens, 1),
            ("prefix_cache_bytes", prefix_cache_bytes, 0),
            ("cache_bytes", page if cache_bytes is None else cache_bytes, page),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PunaError(f"{name}: must be an integer of at least {least}, not {value!r}")
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
        size = page_size(config)
        total = max_batch * -(-self.max_context // size)
        if cache_bytes is not None:
            total = min(total, cache_bytes // page)
        self.pages = Pages(size, total)
        self.prefix = PrefixCache(self.pages, min(total, prefix_cache_bytes // page))
        self.cache = HybridCache(config, max_batch, total, model.dtype, self.device)
        self.scheduler = Scheduler(max_batch, config.chunk, prefill_tokens, self.prefix, self.cache)
        self.forward = Forward(model, self.cache, batch_invariant)
        self.version = 0  # of the weights
        self._weights = [*model.parameters(), *model.buffers()]
        self._stamp = self._written()
        self._tokens_generated = self._tokens_prefilled = 0
        self._requests: dict[str, Running] = {}
        self._events: list[Event] = []  # of requests without a sink, for step() to return
        self._numbers = itertools.count(1)
        self._banned_V = self._banned()

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
        return prepare(prompt, self.processor, self.config, self.max_context, salt)

    def add_request(
        self, prompt, sampling: Sampling | None = None, id: str | None = None, sink: Sink | None = None,
        salt: str | None = None,
    ) -> str:  # fmt: skip
        """Queues a request and returns its id. Its events go to `sink`, or without one to whoever calls `step`.

        Raises PunaError at once for a prompt or sampling that cannot be served, and for an id in use.
        """
        id = f"request-{next(self._numbers)}" if id is None else id
        if id in self._requests:
            raise PunaError(f"a request with the id {id!r} is running: ids must differ")
        prompt, sampling = self.prepare(prompt, salt), sampling or Sampling()
        request = Running.make(id, prompt, sampling, self.processor, self.config, self.max_context, sink)
        self.fits(request)
        self._requests[id] = request
        self.scheduler.add(request)
        return id

    def fits(self, request: Running) -> None:
        """Refuses what could not be served if it had all pages. Without a max_tokens the answer ends where they do."""
        room = self.pages.total * self.pages.size
        length = len(request.prompt.tokens)
        if length + (request.sampling.max_tokens or 1) > room:
            raise PunaError(
                f"{length} prompt tokens and max_tokens {request.sampling.max_tokens} do not fit in the {room} tokens "
                "that cache_bytes has room for: shorten the prompt, lower max_tokens or raise cache_bytes"
            )
        request.limit = min(request.limit, room - length)

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
            if self._stamp != self._written():
                self.version += 1
                self.weights_changed()
            for request in self.scheduler.admit():
                request.stale = False
                request.admitted = request.admitted or time.perf_counter()
            if group := self.scheduler.prefill():
                self._advance(group, self._prefill)
            if group := self.scheduler.decode():
                self._advance(group, self._decode)
        finally:
            if training:
                self.model.train()
        if not self._requests and self.cache.nbytes > KEEP_BYTES:
            self.cache.shrink(0, len(self.pages.owners))
        events, self._events = self._events, []
        return events

    def weights_changed(self) -> None:
        """The model's weights are others now (`step` sees it by itself when they were written to in place): what was
        computed with the old ones is shared with nobody any more. Running answers go on with the new ones."""
        self._stamp = self._written()
        self.prefix.clear()
        for request in self.scheduler.active:
            request.stale = True

    def _written(self) -> int:
        """Grows when a weight is written to."""
        return sum(weight._version for weight in self._weights if not weight.is_inference())

    def stats(self) -> dict[str, int]:
        """Numbers for whoever watches: requests waiting and active; bytes of storage held for keys and values, and of
        the pages in use; and since the start: requests that found a beginning in the prefix cache, the tokens they
        found, preemptions, tokens generated and prompt tokens computed; the weights' version."""
        scheduler, used = self.scheduler, self.pages.total - self.pages.free
        return {
            "waiting": len(scheduler.waiting), "active": len(scheduler.active),
            "cache_bytes": self.cache.nbytes, "cache_bytes_used": used * page_bytes(self.config, self.model.dtype),
            "prefix_hits": scheduler.prefix_hits, "prefix_tokens": scheduler.prefix_tokens,
            "preemptions": scheduler.preemptions, "tokens_generated": self._tokens_generated,
            "tokens_prefilled": self._tokens_prefilled, "version": self.version,
        }  # fmt: skip

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
        tokens, logprobs = self._choose(ready, logits_BV)
        for request, token, logprob in zip(ready, tokens, logprobs, strict=True):
            if request.completion is None:  # a sink may have aborted it
                self._accept(request, token, logprob)

    def _choose(self, ready: list[Running], logits_BV: Tensor) -> tuple[list[int], list[float]]:
        """The next token of each, and its log-probability."""
        if self.forward.invariant and len(ready) > 1:
            chosen = [self._choose([request], row) for request, row in zip(ready, logits_BV.split(1), strict=True)]
            return [tokens[0] for tokens, _ in chosen], [logprobs[0] for _, logprobs in chosen]
        return sample(logits_BV, [r.sampling for r in ready], [r.generator for r in ready], self._banned_V)

    def _prefill(self, group: list[Running]) -> tuple[list[Running], Tensor | None]:
        """The next prompt slice of each; returns those whose prompt is complete, with their next logits [n, V]."""
        lengths = [self.scheduler.slice_length(request) for request in group]
        hidden_BTD = self.forward(group, lengths)
        done = [i for i, (r, n) in enumerate(zip(group, lengths, strict=True)) if r.fed + n == r.target]
        logits_BV = self.forward.head(hidden_BTD[done, [lengths[i] - 1 for i in done]]) if done else None
        ready = [group[i] for i in done]
        finite = hidden_BTD.isfinite().flatten(1).all(1).tolist()
        for request, n, good in zip(group, lengths, finite, strict=True):  # from here on nothing may fail
            request.stale |= not good
            self.scheduler.advance(request, n)
        for request in ready:
            request.features = None
        self._tokens_prefilled += sum(lengths)
        return ready, logits_BV

    def _decode(self, group: list[Running]) -> tuple[list[Running], Tensor]:
        """Feeds each its newest token; returns all of them with logits [n, V]."""
        logits_BV = self.forward.head(self.forward(group, [1] * len(group))[:, 0])
        for request in group:
            self.scheduler.advance(request, 1)
        return group, logits_BV

    def _accept(self, request: Running, token: int, logprob: float) -> None:
        """The request's next token was chosen: text, stops and limits."""
        if not math.isfinite(logprob):
            self._finish(request, "error", FloatingPointError("the model's logits are not finite"))
            return
        if not request.tokens:
            request.first = time.perf_counter()
        request.tokens.append(token)
        request.logprobs.append(logprob)
        self._tokens_generated += 1
        if token in request.stop_ids:
            self._finish(request, "stop")
            return
        piece = request.stream.push(token)
        request.pieces.append(piece)
        self._emit(request, Event(request.id, piece, token, logprob))
        if request.completion is not None:
            return
        if request.stream.stopped:
            self._finish(request, "stop")
        elif len(request.tokens) >= request.limit:
            self._finish(request, "length")

    def _finish(self, request: Running, reason: str, error: Exception | None = None) -> None:
        """The request leaves: its row is given to another and its last event is sent."""
        del self._requests[request.id]
        if request.row >= 0 and reason in ("abort", "error"):
            if reason == "error":
                self.prefix.forget(request.keys)
            self.cache.wipe(request.row, [page for page in request.pages if self.pages.owners[page] == 1])
        self.scheduler.remove(request)
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
        self,
        prompts: Sequence,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        errors: str = "raise",
    ) -> list[Completion]:
        """Answers to all prompts (each a list of messages, an `Encoded` or token ids), in their order.

        Sampling is explained in sampler.py. seed: one for all, or one for each prompt. errors: "raise" raises the
        first request's error (and drops the rest), "return" puts it in that request's Completion (finish_reason
        "error").
        """
        if errors not in ("raise", "return"):
            raise PunaError(f'errors: must be "raise" or "return", not {errors!r}')
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], dict)):
            raise PunaError("generate takes a list of prompts: put the messages in one more list")
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise PunaError(f"seed: {len(seeds)} seeds were given for {len(prompts)} prompts")
        samplings = [Sampling(max_tokens, temperature, top_p, top_k, s, stop, stop_ids) for s in seeds]
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
        try:
            settings = Sampling(**sampling)
        except TypeError as error:
            raise PunaError(f"stream: {str(error).partition(') ')[2] or error}") from error
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


def _nobody(event: Event) -> None:
    """Takes the events of a request whose listener failed."""
