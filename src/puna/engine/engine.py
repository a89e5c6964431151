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
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from puna.engine import ask
from puna.engine.cache import HybridCache, page_bytes, page_size
from puna.engine.constrain import Grammars
from puna.engine.forward import Forward
from puna.engine.pages import Pages
from puna.engine.prefix import PrefixCache
from puna.engine.request import Event, Prompt, Running, Sink, prepare
from puna.engine.sampler import Choice, Sampling, choose
from puna.engine.scheduler import Scheduler
from puna.engine.speculate import CHECKED, DRAFT_TOKENS, Draft, Lookup, usable
from puna.engine.weights import Weights, load
from puna.errors import PunaError
from puna.model.moe import record_routes

PREFILL_TOKENS = 2048  # most prompt tokens of one forward pass
PREFIX_BYTES = 2**27
KEEP_BYTES = 2**28  # an idle engine gives its cache back if it is larger than this


class Pass(NamedTuple):
    """What a forward pass leads to, for the requests that are ready to choose."""

    ready: list[Running]
    logits_BTV: Tensor | None
    routes_BTL: np.ndarray | None  # int16: the experts at the positions of the logits


class Engine:
    """Decodes up to `max_batch` sequences together.

    model: a `puna.model.Llama4`; it is used in evaluation mode, and left in the mode it was in. processor: None for
    a model without a tokenizer (prompts are then token ids, and answers have no text). max_context: most tokens of
    a prompt with its answer, at most and by default the model's own. prefill_tokens: most prompt tokens of one
    forward pass. cache_bytes: most memory for keys and values of global layers, beyond which answers are preempted (by
    default as much as max_batch sequences can need); prefix_cache_bytes: of these, what may be kept for prompts to come
    (0: nothing). batch_invariant: equal bits whatever else runs (forward.py), several times slower. speculate: most
    tokens that are guessed and checked at once (speculate.py), from the text itself or by `draft`, a small model of the
    same family; 0 without a draft: none.
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
        speculate: int = 0,
        draft=None,
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
        if isinstance(speculate, bool) or not isinstance(speculate, int) or not 0 <= speculate < CHECKED:
            raise PunaError(f"speculate: must be an integer from 0 to {CHECKED - 1}, not {speculate!r}")
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
        self.grammars = Grammars(processor and processor.tokenizer, config.vocab_size)
        self.speculate = speculate or (DRAFT_TOKENS if draft is not None else 0)
        self.drafter = Lookup() if self.speculate else None
        if draft is not None:
            self.drafter = Draft(draft, config, max_batch, self.max_context, prefill_tokens, self._banned_V)
        self.drafted = self.accepted = 0  # guessed tokens that were checked, and those of them that were right

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
        self.start(self.make(prompt, sampling, id, sink, salt))
        return id

    def make(
        self, prompt, sampling: Sampling | None, id: str, sink: Sink | None = None, salt: str | None = None
    ) -> Running:
        """A request checked as a whole, its grammar compiled; any thread may do this. Raises PunaError.

        Without a max_tokens the answer ends where the context or the pages do.
        """
        prompt, sampling = self.prepare(prompt, salt), sampling or Sampling()
        if sampling.return_routes and self.forward.invariant:
            raise PunaError("return_routes: not to be had with batch_invariant; leave one of the two out")
        own = (self.processor, self.config, self.max_context)
        request = Running.make(id, prompt, sampling, *own, sink, self.grammars, self.device)
        room, length = self.pages.total * self.pages.size, len(prompt.tokens)
        if length + (sampling.max_tokens or 1) > room:
            raise PunaError(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} do not fit in the {room} tokens that "
                "cache_bytes has room for: shorten the prompt, lower max_tokens or raise cache_bytes"
            )
        request.limit = min(request.limit, room - length)
        return request

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

    def replace_weights(self, weights: Weights, version: int | None = None, recompute: bool = False) -> int:
        """Other weights, between two steps; returns their version (by default the last one and 1).

        weights: all names and tensors of the model's state dict, as a mapping or pairs. Copied in place, so that
        nothing else need be rebuilt. Requests go on: their next tokens come from the new weights, over the keys and
        values of the old ones, as asynchronous RL has it, or with `recompute` over new ones; each token's version is
        in the completion. PunaError, and nothing changed, for missing or unknown names and for other shapes or kinds of
        numbers.
        """
        if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
            raise PunaError(f"version: must be an integer, not {version!r}")
        load(self.model, weights)
        self.version = self.version + 1 if version is None else version
        self.weights_changed()
        if recompute:
            for request in sorted(self.scheduler.active, key=lambda request: -request.arrival):
                self.scheduler.preempt(request)
        return self.version

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
        found, preemptions, tokens generated, prompt tokens computed, guessed tokens that were checked, and of these
        those that were right; the weights' version."""
        scheduler, used = self.scheduler, self.pages.total - self.pages.free
        return {
            "waiting": len(scheduler.waiting), "active": len(scheduler.active),
            "cache_bytes": self.cache.nbytes, "cache_bytes_used": used * page_bytes(self.config, self.model.dtype),
            "prefix_hits": scheduler.prefix_hits, "prefix_tokens": scheduler.prefix_tokens,
            "preemptions": scheduler.preemptions, "tokens_generated": self._tokens_generated,
            "tokens_prefilled": self._tokens_prefilled, "tokens_drafted": self.drafted,
            "tokens_accepted": self.accepted, "version": self.version,
        }  # fmt: skip

    def _advance(self, group: list[Running], forward: Callable[[list[Running]], Pass]) -> None:
        """Runs `forward` on the group, or on each alone if together it fails, and gives out the tokens it leads to."""
        try:
            ready, logits_BTV, routes_BTL = forward(group)
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
        results = self._choose(ready, logits_BTV)
        if forward == self._decode:  # the newest token of each was fed, and its draft: what was confirmed of it counts
            for request, (chosen, _) in zip(ready, results, strict=True):
                self.drafted += len(request.draft)
                self.accepted += max(0, len(chosen) - 1)
                self.scheduler.advance(request, max(1, len(chosen)))
                request.draft = []
        for i, (request, (chosen, error)) in enumerate(zip(ready, results, strict=True)):
            for t, choice in enumerate(chosen):
                if request.completion is None:  # a stop, or a sink that aborted it
                    if request.sampling.return_routes:
                        request.routes.append(routes_BTL[i, t])
                    self._accept(request, choice)
            if error is not None and request.completion is None:
                self._finish(request, "error", error)

    def _choose(self, ready: list[Running], logits_BTV: Tensor) -> list[tuple[list[Choice], Exception | None]]:
        """The next tokens of each, and what went wrong behind them."""
        if self.forward.invariant and len(ready) > 1:
            parts = zip(ready, logits_BTV.split(1), strict=True)
            return [result for request, row in parts for result in self._choose([request], row)]
        drafts = [request.draft for request in ready]
        return choose(logits_BTV, [request.chooser for request in ready], self._banned_V, drafts)

    def _prefill(self, group: list[Running]) -> Pass:
        """The next prompt slice of each; those whose prompt is complete are ready."""
        lengths = [self.scheduler.slice_length(request) for request in group]
        with self._routes(group) as routes:
            hidden_BTD = self.forward(group, lengths)
        done = [i for i, (r, n) in enumerate(zip(group, lengths, strict=True)) if r.fed + n == r.target]
        last = [lengths[i] - 1 for i in done]
        logits_BTV = self.forward.head(hidden_BTD[done, last])[:, None] if done else None
        routes_BTL = _routes_of([ids_BT[done, last][:, None] for ids_BT in routes])
        ready = [group[i] for i in done]
        finite = hidden_BTD.isfinite().flatten(1).all(1).tolist()
        for request, n, good in zip(group, lengths, finite, strict=True):  # from here on nothing may fail
            request.stale |= not good
            self.scheduler.advance(request, n)
        for request in ready:
            request.features = None
        self._tokens_prefilled += sum(lengths)
        return Pass(ready, logits_BTV, routes_BTL)

    def _decode(self, group: list[Running]) -> Pass:
        """Feeds each its newest token and its draft; all are ready."""
        for request, draft in zip(group, self._drafts(group), strict=True):
            request.draft = usable(request, draft)[: self.scheduler.fit(request, 1 + len(draft)) - 1]
        with self._routes(group) as routes:
            hidden_BTD = self.forward(group, [1 + len(request.draft) for request in group])
        logits_NV = self.forward.head(hidden_BTD.flatten(0, 1))
        return Pass(group, logits_NV.unflatten(0, hidden_BTD.shape[:2]), _routes_of(routes))

    def _drafts(self, group: list[Running]) -> list[list[int]]:
        most = min(self.speculate, CHECKED // len(group) - 1)
        return self.drafter.propose(group, most) if most > 0 else [[] for _ in group]

    def _routes(self, group: list[Running]):
        """Records the experts of a forward pass, if one of the group wants to know them."""
        wanted = any(request.sampling.return_routes for request in group)
        return record_routes(self.model) if wanted else nullcontext([])

    def _accept(self, request: Running, choice: Choice) -> None:
        """The request's next token was chosen: text, stops and limits."""
        token = choice.token
        if not request.tokens:
            request.first = time.perf_counter()
        request.tokens.append(token)
        request.choices.append(choice)
        request.versions.append(self.version)
        self._tokens_generated += 1
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
        del self._requests[request.id]
        if self.drafter is not None:
            self.drafter.forget(request.id)
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

    generate, stream = ask.generate, ask.stream


def _routes_of(routes: list[Tensor]) -> np.ndarray | None:
    """The experts that `record_routes` noted, as int16 [B, T, MoE layers]."""
    return torch.stack(routes, dim=-1).to(torch.int16).cpu().numpy() if routes else None


def _nobody(event: Event) -> None:
    """Takes the events of a request whose listener failed."""
