"""What goes into the engine and what comes out: prompts, events, completions, and a running sequence's state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from puna.engine.constrain import Grammars
from puna.engine.sampler import Choice, Chooser, Sampling
from puna.engine.text import TextStream
from puna.errors import PunaError
from puna.model.config import ModelConfig


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model: `tokens` int64 [N], tiles [n, 3, S, S] that fill its patch tokens in order."""

    tokens: np.ndarray
    tiles: Tensor | None = None


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    text: without the stop string or stop token. tokens: all that were sampled, the stop token included; logprobs:
    their log-probabilities under the raw logits, one for each. finish_reason: "stop" (a stop token or string),
    "length" (max_tokens, or the context is full), "abort", or "error" (then `error` says what happened, to this
    request alone). prompt_tokens: length of the prompt, cached_tokens: of these, those taken from the prefix cache.
    prefill_seconds: from getting a place in the batch to the first token; tokens_per_second: of the tokens after it (0
    if there are none). top_logprobs: for each token, the likeliest ones and their log-probabilities (raw logits).
    """

    id: str
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    prefill_seconds: float = 0.0
    tokens_per_second: float = 0.0
    error: Exception | None = None
    cached_tokens: int = 0
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """A step of one request: text that can be shown (often none yet), the token behind it and the likeliest ones there.

    The last event of a request has token None, a finish_reason and the `completion`.
    """

    id: str
    text: str
    token: int | None = None
    logprob: float | None = None
    completion: Completion | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)

    @property
    def finish_reason(self) -> str | None:
        return None if self.completion is None else self.completion.finish_reason


Sink = Callable[[Event], None]


def prepare(prompt, processor, config: ModelConfig, max_context: int) -> Prompt:
    """Messages, an `Encoded` or token ids as a checked `Prompt`. Needs no engine state, so any thread may call it.

    Raises PunaError for everything that is wrong with the prompt.
    """
    if isinstance(prompt, Prompt):
        tokens, tiles = prompt.tokens, prompt.tiles
    elif hasattr(prompt, "tokens") and hasattr(prompt, "pictures"):
        tokens, tiles = prompt.tokens, _tiles(prompt.pictures, processor)
    elif isinstance(prompt, str):
        raise PunaError(
            'a prompt is a list of messages or token ids; for a text give [{"role": "user", "content": text}]'
        )
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], dict):
        if processor is None:
            raise PunaError("this model has no tokenizer, so it cannot read messages: give token ids")
        encoded = processor.encode_chat(prompt, generation_prompt=True)
        tokens, tiles = encoded.tokens, _tiles(encoded.pictures, processor)
    else:
        tokens, tiles = prompt, None
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PunaError(f"a prompt is a list of messages or token ids, not {type(prompt).__name__}") from error
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise PunaError("a prompt is a non-empty list of messages or of integer token ids")
    array = array.astype(np.int64)
    if array.min() < 0 or array.max() >= config.vocab_size:
        raise PunaError(f"a prompt's token ids must lie in 0..{config.vocab_size - 1}")
    if array.size >= max_context:
        raise PunaError(
            f"the prompt has {array.size} tokens, the context holds {max_context} with the answer: shorten it"
        )
    patches = 0 if config.patch_token is None else int((array == config.patch_token).sum())
    count = 0 if tiles is None else len(tiles)
    if count and config.vision is None:
        raise PunaError("this model reads text only: leave the pictures out")
    per_tile = config.vision.tokens_per_tile if config.vision else 0
    if patches != count * per_tile:
        raise PunaError(f"the prompt has {patches} patch tokens, its pictures make {count * per_tile}: they must agree")
    return Prompt(array, tiles)


def _tiles(pictures: Sequence, processor) -> Tensor | None:
    if not pictures:
        return None
    if processor is None:
        raise PunaError("pictures need a processor: give Prompt(tokens, tiles) or an engine with one")
    return processor.tiles(pictures)


@dataclass(eq=False)
class Running:
    """One request in the engine (`row`, `fed`, `arrival`, `length` are the scheduler's view of it)."""

    id: str
    prompt: Prompt
    sampling: Sampling
    limit: int  # most tokens to sample
    stop_ids: frozenset[int]
    chooser: Chooser
    stream: TextStream
    sink: Sink | None
    patch_at: np.ndarray  # places of the patch tokens in the prompt
    features: Tensor | None = None  # encoded pictures [patch tokens, D], until the prompt is in the cache
    fed: int = 0
    row: int = -1
    arrival: int = 0
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)  # one for each token
    pieces: list[str] = field(default_factory=list)
    completion: Completion | None = None
    admitted: float = 0.0
    first: float = 0.0

    @classmethod
    def make(
        cls, id: str, prompt: Prompt, sampling: Sampling, processor, config: ModelConfig, max_context: int,
        sink: Sink | None, grammars: Grammars, device: torch.device,
    ) -> Running:  # fmt: skip
        """Checks what depends on prompt, model and sampling together; raises PunaError."""
        length = len(prompt.tokens)
        room = max_context - length
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise PunaError(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} do not fit in the "
                f"context of {max_context}: shorten the prompt or lower max_tokens"
            )
        for name, ids in (("stop_ids", sampling.stop_ids), ("logit_bias", sampling.logit_bias)):
            if any(token >= config.vocab_size for token in ids):
                raise PunaError(f"{name}: token ids must lie in 0..{config.vocab_size - 1}")
        if sampling.stop and processor is None:
            raise PunaError("stop: this model has no tokenizer, so it makes no text to stop at; use stop_ids")
        own, decoder = (), None
        if processor is not None:
            from puna.processor import StreamDecoder  # a model without a processor decodes on a bare machine

            own, decoder = processor.tokenizer.stop_ids, StreamDecoder(processor.tokenizer)
        return cls(
            id=id,
            prompt=prompt,
            sampling=sampling,
            limit=room if sampling.max_tokens is None else sampling.max_tokens,
            stop_ids=frozenset(own) | frozenset(sampling.stop_ids),
            chooser=Chooser(
                sampling,
                prompt.tokens,
                config.vocab_size,
                device,
                grammars.start(sampling.constraint) if sampling.constraint else None,
            ),
            stream=TextStream(decoder, sampling.stop),
            sink=sink,
            patch_at=np.flatnonzero(prompt.tokens == config.patch_token) if prompt.tiles is not None else np.empty(0),
        )

    @property
    def length(self) -> int:
        return len(self.prompt.tokens)

    def slice_features(self, start: int, stop: int) -> Tensor | None:
        """The features [n, D] of the patch tokens at positions start … stop-1; a tile may be cut anywhere."""
        if self.features is None:
            return None
        first, last = np.searchsorted(self.patch_at, (start, stop))
        return self.features[first:last]

    def complete(self, reason: str, error: Exception | None = None) -> Completion:
        """Closes the request; the engine sends the result."""
        now = time.perf_counter()
        after = len(self.tokens) - 1
        self.completion = Completion(
            id=self.id,
            text="".join(self.pieces),
            tokens=self.tokens,
            logprobs=[choice.logprob for choice in self.choices],
            finish_reason=reason,
            prompt_tokens=self.length,
            prefill_seconds=self.first - self.admitted if self.tokens else 0.0,
            tokens_per_second=after / max(now - self.first, 1e-9) if after > 0 else 0.0,
            error=error,
            top_logprobs=[choice.top for choice in self.choices] if self.sampling.top_logprobs else [],
        )
        return self.completion
