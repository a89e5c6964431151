"""From logits to the next token: greedy, temperature, top-k, top-p, and seeds which keep their promise.

One row at a time, in this order (the order of the common engines):

    1. forbidden tokens get probability 0: the engine bans image layout and headers, since a model's answer is text
    2. p = softmax(logits / temperature); temperature 0 is greedy: the argmax, no random number
    3. top-k: keep the k likeliest, renormalise
    4. top-p: keep the likeliest tokens until their mass reaches p, at least one (arXiv 1904.09751)
    5. draw: u uniform in [0, 1), then the first token whose cumulative probability exceeds u * (kept mass)

Every request owns a random generator and takes exactly one u per token from it. So a seed gives the same draws
whoever else is in the batch, and on any device: u is drawn on the CPU. Draws and sums are in float64: in float32
the cumulative sum over 200,000 tokens is off by more than the probability of a rare one.

The reported log-probability is the model's own: log softmax of the *raw* logits at the chosen token, before bans,
temperature, top-k and top-p. That is what reinforcement learning and evaluation need.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.errors import PunaError

SHORTLIST = 256  # top-p looks at this many of the likeliest tokens first; only if they don't reach p, at all of them


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PunaError(f"{name}: must be an integer, not {value!r}")
    value = int(value)
    if value < low or (high is not None and value > high):
        raise PunaError(
            f"{name}: must be at least {low}" + (f" and at most {high}" if high is not None else "") + f", not {value}"
        )
    return value


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PunaError(f"{name}: must be a number, not {value!r}")
    if not math.isfinite(value):
        raise PunaError(f"{name}: must be finite, not {value!r}")
    return float(value)


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen; checked here, once: a bad value is a PunaError naming the field.

    max_tokens: most tokens to generate (None: as many as the context has room for).
    temperature: 0 is greedy. top_k: 0 is off. top_p: in (0, 1]. seed: None draws a fresh one.
    stop: strings that end the text (they are not part of it). stop_ids: further token ids that end it.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        put("temperature", _real("temperature", self.temperature))
        if self.temperature < 0:
            raise PunaError(f"temperature: must be 0 (greedy) or more, not {self.temperature}")
        put("top_p", _real("top_p", self.top_p))
        if not 0 < self.top_p <= 1:
            raise PunaError(f"top_p: must be above 0 and at most 1, not {self.top_p}")
        put("top_k", _integer("top_k", self.top_k, 0))
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, -(2**63), 2**64 - 1))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise PunaError(f"stop: must be a non-empty string or a list of them, not {self.stop!r}")
        put("stop", tuple(stop))
        if isinstance(self.stop_ids, str) or not isinstance(self.stop_ids, Sequence):
            raise PunaError(f"stop_ids: must be a list of token ids, not {self.stop_ids!r}")
        put("stop_ids", tuple(_integer("stop_ids", token, 0) for token in self.stop_ids))

    def generator(self) -> torch.Generator | None:
        """This request's own source of random numbers; None if it is greedy."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()  # from the system, so that torch's global state (a training run's) stays as it is
        else:
            generator.manual_seed(self.seed)
        return generator


def kept_probabilities(probs_NV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The tokens that top-k and top-p leave, likeliest first: (probabilities [N,W], token ids [N,W]).

    Left-out places within W hold 0. Kept mass is not normalised to 1. A row's result depends on that row alone.
    """
    vocabulary = probs_NV.shape[-1]
    width = min(top_k or SHORTLIST, vocabulary)
    probs_NW, tokens_NW = probs_NV.topk(width, dim=-1)
    if not top_k and width < vocabulary:
        short = probs_NW.sum(-1) < top_p
        if short.any():
            all_probs, all_tokens = probs_NV.topk(vocabulary, dim=-1)
            # Rows whose shortlist suffices keep it (padded with 0), whatever their neighbours need.
            pad = (0, vocabulary - width)
            probs_NW = torch.where(short[:, None], all_probs, torch.nn.functional.pad(probs_NW, pad))
            tokens_NW = torch.where(short[:, None], all_tokens, torch.nn.functional.pad(tokens_NW, pad))
    if top_p < 1:
        mass = probs_NW.sum(-1, keepdim=True) if top_k else 1.0
        before = probs_NW.cumsum(-1) - probs_NW
        keep = before < top_p * mass
        keep[:, 0] = True
        probs_NW = probs_NW.masked_fill(~keep, 0)
    return probs_NW, tokens_NW


def _draw(probs_NW: Tensor, uniform_N1: Tensor) -> Tensor:
    """The first column [N] whose cumulative probability exceeds uniform · total; never one of probability 0."""
    cumulative = probs_NW.cumsum(-1)
    index = torch.searchsorted(cumulative, uniform_N1 * cumulative[:, -1:], right=True).squeeze(-1)
    return torch.where(index < probs_NW.shape[-1], index, probs_NW.argmax(-1))  # u·total rounded up to total


def sample(
    logits_BV: Tensor,
    requests: Sequence[Sampling],
    generators: Sequence[torch.Generator | None],
    banned_V: Tensor | None = None,
) -> tuple[list[int], list[float]]:
    """One token for each row. Returns the tokens and their log-probabilities under the raw logits.

    banned_V: bool, True where a token must not be chosen. A row whose logits are not finite gets a NaN
    log-probability: the engine fails that request.
    """
    logits_BV = logits_BV.float()
    scores_BV = logits_BV if banned_V is None else logits_BV.masked_fill(banned_V, -math.inf)
    tokens_B = scores_BV.argmax(-1)
    groups: dict[tuple[int, float], list[int]] = {}
    for row, request in enumerate(requests):
        if request.temperature > 0:
            groups.setdefault((request.top_k, request.top_p), []).append(row)
    for (top_k, top_p), rows in groups.items():
        uniform = [torch.rand(1, dtype=torch.float64, generator=generators[row]) for row in rows]
        uniform_N1 = torch.stack(uniform).to(logits_BV.device)
        temperature_N1 = torch.tensor(
            [[requests[row].temperature] for row in rows], dtype=torch.float64, device=logits_BV.device
        )
        scores_NV = scores_BV[rows].double()
        scores_NV = scores_NV - scores_NV.amax(
            -1, keepdim=True
        )  # first, so that a tiny temperature gives -inf, never inf - inf
        probs_NV = torch.softmax(scores_NV / temperature_N1, dim=-1)
        if top_k or top_p < 1:
            probs_NW, tokens_NW = kept_probabilities(probs_NV, top_k, top_p)
            drawn_N = tokens_NW.gather(-1, _draw(probs_NW, uniform_N1)[:, None]).squeeze(-1)
        else:
            drawn_N = _draw(probs_NV, uniform_N1)
        tokens_B[rows] = drawn_N
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1) - logits_BV.logsumexp(-1)
    return tokens_B.tolist(), logprobs_B.tolist()
