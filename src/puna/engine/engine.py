"""The engine: requests join, are prefilled in chunk-aligned slices, decode together, and leave the moment they are done.

    add_request -> waiting -> (a row is free) prefill: slices [0, C), [C, 2C), ...  -> active -> one token a step -> done

No slice straddles a chunk border, so each slice of a local layer is causal inside its chunk, and the cache's buffer
restarts at the border (`cache.py`). Prompts with the same number of slices are prefilled together, padded on the right.
Active sequences occupy rows 0..n-1: one that leaves is replaced by the last, so a batch is read without a copy.

Pictures: all tiles of a prompt are encoded once; each slice is then given the features of the patch tokens in it.

A request that fails (numbers that are not finite, an exception in its forward pass) fails alone: a batch that raises is
repeated one sequence at a time, which the cache allows because nothing counts before `advance`.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.engine.cache import HybridCache
from puna.engine.sampler import Sampling, sample
from puna.engine.text import TextStream
from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Encoded, Processor, StreamDecoder

PREFILL_TOKENS = 8192  # most tokens of one prefill forward


@dataclass(frozen=True)
class Event:
    """One step of one request: new text (perhaps empty), the token, and why it ended, if it did."""

    text: str
    token: int | None = None
    finish_reason: str | None = None  # stop | length | abort
    error: Exception | None = None


@dataclass
class Completion:
    """A finished answer. logprobs: the model's own (raw logits), one per generated token."""

    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float]
    prompt_tokens: int
    prefill_seconds: float
    seconds: float


@dataclass
class Request:
    """A sequence in the engine; its state lives here and nowhere else."""

    id: int
    prompt: list[int]
    tiles: Tensor | None
    sampling: Sampling
    generator: torch.Generator | None
    text: TextStream
    on_event: Callable[[Event], None] | None
    features: Tensor | None = None
    row: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    begun: float = field(default_factory=time.perf_counter)
    prefilled: float = 0.0
    ended: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Engine:
    """Decodes independent sequences in one batch on one device.

    max_batch: sequences decoded together; more wait. max_context: most tokens of one sequence, prompt and answer.
    `processor` may be None for a model without tokenizer; prompts are then token ids and texts empty.
    Not thread-safe: one thread steps it (`EngineThread` for servers).
    """

    def __init__(self, model: Llama4, processor: Processor | None, max_batch: int = 32, max_context: int | None = None):
        self.model, self.processor = model.eval(), processor
        self.max_batch = max_batch
        self.max_context = min(max_context or model.config.max_context, model.config.max_context)
        self.device = model.tok_embeddings.weight.device
        self.cache = HybridCache(model.config, max_batch, model.dtype, self.device, self.max_context)
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # request i sits in row i
        self._ids = itertools.count()
        self.stop_ids = frozenset(processor.tokenizer.stop_ids) if processor else frozenset()
        self._banned_V = self._banned() if processor else None

    def _banned(self) -> Tensor:
        """Control tokens that are no end of a turn: an answer is text."""
        banned_V = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
        banned_V[[i for i in self.processor.tokenizer.special.values() if i not in self.stop_ids]] = True
        return banned_V

    # ---- requests ---------------------------------------------------------------------------------------------------

    def add_request(
        self, prompt, sampling: Sampling | None = None, on_event: Callable[[Event], None] | None = None
    ) -> Request:
        """Queues a prompt: chat messages, an Encoded, or token ids. PunaError if it can't fit or can't be encoded."""
        sampling = sampling or Sampling()
        encoded = self._encode(prompt)
        tokens = [int(t) for t in encoded.tokens]
        if not tokens:
            raise PunaError("prompt: must hold at least one token")
        bad = next((t for t in tokens if not 0 <= t < self.model.config.vocab_size), None)
        if bad is not None:
            raise PunaError(f"prompt: token id {bad} is outside the vocabulary of {self.model.config.vocab_size}")
        wanted = sampling.max_tokens or 1
        if len(tokens) + wanted > self.max_context:
            raise PunaError(
                f"the prompt's {len(tokens)} tokens and max_tokens {wanted} exceed the context of {self.max_context}; "
                "shorten one of them"
            )
        tiles = self.processor.tiles(encoded.pictures) if encoded.pictures else None
        decoder = StreamDecoder(self.processor.tokenizer) if self.processor else None
        request = Request(
            next(self._ids), tokens, tiles, sampling, sampling.generator(), TextStream(decoder, sampling.stop), on_event
        )
        self.waiting.append(request)
        return request

    def _encode(self, prompt) -> Encoded:
        if hasattr(prompt, "tokens") and hasattr(prompt, "pictures"):
            return prompt
        prompt = list(prompt)
        if prompt and isinstance(prompt[0], dict):
            if self.processor is None:
                raise PunaError("this model has no tokenizer: give token ids instead of messages")
            return self.processor.encode_chat(prompt, generation_prompt=True)
        return Encoded(prompt, None, [])

    def abort(self, request: Request) -> None:
        """Ends a request now; its row is free at once. Harmless when it is done."""
        if request.finish_reason is None and request.error is None:
            self._finish(request, "abort")

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Admits and prefills what fits, else decodes one token of every active request. False: nothing left to do."""
        if self.waiting and len(self.active) < self.max_batch:
            self._admit()
        elif self.active:
            self._decode(list(self.active))
        return bool(self.waiting or self.active)

    def _admit(self) -> None:
        """Prefills waiting requests of the same number of slices as the first, as many as fit."""
        chunk = self.cache.config.chunk
        slices = (len(self.waiting[0].prompt) - 1) // chunk
        room = max(1, min(self.max_batch - len(self.active), PREFILL_TOKENS // chunk))
        chosen = [r for r in self.waiting if (len(r.prompt) - 1) // chunk == slices][:room]
        if slices * chunk + max(len(r.prompt) - slices * chunk for r in chosen) > self.max_context:
            chosen = chosen[:1]
        for request in chosen:
            self.waiting.remove(request)
            request.row = len(self.active)
            self.active.append(request)
        self._guarded(self._prefill, chosen)

    def _prefill(self, requests: list[Request]) -> None:
        rows = [r.row for r in requests]
        for row in rows:
            self.cache.free(row)
        pictured = [r for r in requests if r.tiles is not None and r.features is None]
        if pictured:
            features = self.model.image_features(torch.cat([r.tiles for r in pictured]).to(self.device))
            for request, part in zip(pictured, features.split([len(r.tiles) for r in pictured]), strict=True):
                request.features = part.flatten(0, 1)
        used = [0] * len(requests)
        chunk, patch = self.cache.config.chunk, self.model.config.patch_token
        pad = self.processor.tokenizer.pad if self.processor else 0
        longest = max(len(r.prompt) for r in requests)
        for start in range(0, longest, chunk):
            parts = [r.prompt[start : start + chunk] for r in requests]
            width = max(map(len, parts))
            tokens_BT = torch.full((len(parts), width), pad, dtype=torch.int64)
            given = []
            for i, part in enumerate(parts):
                tokens_BT[i, : len(part)] = torch.tensor(part)
                count = part.count(patch)
                if count and requests[i].features is not None:
                    given.append(requests[i].features[used[i] : used[i] + count])
                    used[i] += count
            view = self.cache.view(rows, width)
            features = torch.cat(given) if given else None
            hidden_BTD = self.model.hidden(tokens_BT.to(self.device), cache=view, features=features)
            self.cache.advance(rows, [len(part) for part in parts])
        last_BD = torch.stack([hidden_BTD[i, len(part) - 1] for i, part in enumerate(parts)])
        for request in requests:
            request.prefilled = time.perf_counter()
        self._sample(requests, self.model.head(last_BD))

    def _decode(self, requests: list[Request]) -> None:
        self._guarded(self._decode_batch, requests)

    def _decode_batch(self, requests: list[Request]) -> None:
        rows = [r.row for r in requests]
        tokens_B1 = torch.tensor([[r.tokens[-1]] for r in requests], device=self.device)
        hidden_B1D = self.model.hidden(tokens_B1, cache=self.cache.view(rows, 1))
        logits_BV = self.model.head(hidden_B1D[:, 0])
        self.cache.advance(rows, [1] * len(rows))
        self._sample(requests, logits_BV)

    def _guarded(self, run: Callable[[list[Request]], None], requests: list[Request]) -> None:
        """Runs a batch; if it raises, one request at a time, so that only the one at fault fails."""
        before = {r.id: self.cache.lengths[r.row] for r in requests}
        try:
            run(requests)
        except Exception as error:  # whatever a forward pass can raise belongs to a request, never to the engine
            pending = [r for r in requests if r.finish_reason is None and r.error is None]
            if len(pending) <= 1:
                for request in pending:
                    self._fail(request, error)
                return
            for request in pending:
                self.cache.lengths[request.row] = before[request.id]
            for request in pending:
                self._guarded(run, [request])

    def _sample(self, requests: list[Request], logits_BV: Tensor) -> None:
        samplings, generators = [r.sampling for r in requests], [r.generator for r in requests]
        tokens, logprobs = sample(logits_BV, samplings, generators, self._banned_V)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            if logprob != logprob:
                self._fail(request, RuntimeError("the model's output is not finite"))
            else:
                self._accept(request, token, logprob)

    def _accept(self, request: Request, token: int, logprob: float) -> None:
        request.tokens.append(token)
        request.logprobs.append(logprob)
        if token in self.stop_ids or token in request.sampling.stop_ids:
            self._finish(request, "stop", token)
            return
        piece = request.text.push(token)
        limit = request.sampling.max_tokens
        if request.text.stopped:
            self._finish(request, "stop", token, piece)
        elif (limit and len(request.tokens) >= limit) or request.length >= self.max_context:
            self._finish(request, "length", token, piece)
        else:
            self._emit(request, Event(piece, token))

    def _emit(self, request: Request, event: Event) -> None:
        request.pieces.append(event.text)
        if request.on_event is not None:
            request.on_event(event)

    def _finish(self, request: Request, reason: str, token: int | None = None, piece: str = "") -> None:
        request.finish_reason, request.ended = reason, time.perf_counter()
        self._leave(request)
        self._emit(request, Event(piece + request.text.flush(), token, reason))

    def _fail(self, request: Request, error: Exception) -> None:
        request.error, request.ended = error, time.perf_counter()
        self._leave(request, wipe=True)
        self._emit(request, Event("", None, None, error))

    def _leave(self, request: Request, wipe: bool = False) -> None:
        """Frees the row; the last active request moves into it."""
        if request.row is None:
            if request in self.waiting:
                self.waiting.remove(request)
            return
        self.cache.free(request.row, wipe=wipe)
        last = self.active.pop()
        if last is not request:
            self.cache.move(last.row, request.row)
            last.row = request.row
            self.active[last.row] = last
        request.row = request.features = request.tiles = None
        if not self.active and self.cache.nbytes > 2**30:
            self.cache.release()

    # ---- whole answers ----------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence, max_tokens: int | None = 128, temperature: float = 0.0, top_p: float = 1.0,
                 top_k: int = 0, seed: int | None = None, stop: str | Sequence[str] = ()) -> list[Completion]:  # fmt: skip
        """Answers all prompts (messages, Encoded or token ids each), in order. With a seed, prompt i draws from seed + i.

        Errors: PunaError for a prompt that does not fit; RuntimeError if the model's numbers are not finite.
        """
        requests = []
        for i, prompt in enumerate(prompts):
            own = None if seed is None else seed + i
            requests.append(self.add_request(prompt, Sampling(max_tokens, temperature, top_p, top_k, own, stop)))
        while self.step():
            pass
        return [self._completion(r) for r in requests]

    def _completion(self, request: Request) -> Completion:
        if request.error is not None:
            raise request.error
        return Completion(
            "".join(request.pieces), request.tokens, request.finish_reason, request.logprobs, len(request.prompt),
            request.prefilled - request.begun, request.ended - request.begun,
        )  # fmt: skip

    def stream(self, prompt, **sampling) -> Iterator[str]:
        """Text of one answer as it grows; leaving the loop early aborts it."""
        events: deque[Event] = deque()
        request = self.add_request(prompt, Sampling(**sampling), events.append)
        try:
            while request.finish_reason is None and request.error is None:
                self.step()
                while events:
                    event = events.popleft()
                    if event.error is not None:
                        raise event.error
                    if event.text:
                        yield event.text
        finally:
            self.abort(request)
