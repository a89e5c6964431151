"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, and seeds which keep their promise.

One row at a time, in this order (the order of the common engines):

    1. repetition penalty r: a token of the prompt or the answer gets z / r if z > 0, else z * r (arXiv 1909.05858)
    2. z -= frequency * (times the token was generated) + presence (if it was at all); then z += logit_bias
    3. forbidden tokens get probability 0: those the engine bans (a model's answer is text: no image layout, no headers)
       and those the request's grammar does not allow here (constrain.py)
    4. p = softmax(z / temperature); temperature 0 is greedy: the argmax, no random number
    5. top-k: keep the k likeliest, renormalise
    6. top-p: keep the likeliest tokens until their mass reaches p, at least one (arXiv 1904.09751)
    7. min-p: keep those with at least min_p times the likeliest one's probability (arXiv 2407.01082)
    8. draw: u uniform in [0, 1), then the first token whose cumulative probability exceeds u * (kept mass)

All that a choice depends on besides the logits is the request's `Chooser`: `sample` reads it, `push` moves it on by one
token. It owns a random generator and takes exactly one u per token from it. So a seed gives the same draws whoever else
is in the batch, and on any device: u is drawn on the CPU. Draws and sums are in float64: in float32 the cumulative sum
over 200,000 tokens is off by more than the probability of a rare one.

The reported log-probabilities, `top_logprobs` too, are the model's own: log softmax of the *raw* logits, before all of
the above. That is what reinforcement learning and evaluation need.
"""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from puna.engine.constrain import Constraint, Grammar
from puna.errors import PunaError

SHORTLIST = 256  # top-p looks at this many of the likeliest tokens first; only if they don't reach p, at all of them
MAX_TOP_LOGPROBS = 20


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PunaError(f"{name}: must be an integer, not {value!r}")
    value = int(value)
    if value < low or (high is not None and value > high):
        raise PunaError(
            f"{name}: must be at least {low}" + (f" and at most {high}" if high is not None else "") + f", not {value}"
        )
    return value


def _real(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise PunaError(f"{name}: must be a number, not {value!r}")
    if not math.isfinite(value):
        raise PunaError(f"{name}: must be finite, not {value!r}")
    if not low <= value <= high:
        raise PunaError(f"{name}: must be at least {low} and at most {high}, not {value}")
    return float(value)


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen; checked here, once: a bad value is a PunaError naming the field.

    max_tokens: most tokens to generate (None: as many as the context has room for).
    temperature: 0 is greedy. top_k: 0 is off. top_p: in (0, 1]. seed: None draws a fresh one.
    stop: strings that end the text (they are not part of it). stop_ids: further token ids that end it.
    min_p, frequency_penalty, presence_penalty, repetition_penalty, logit_bias (token id -> what is added to its logit):
    see the top of this file. top_logprobs: how many of the likeliest tokens are reported with each token.
    constraint: a grammar that the answer keeps to. return_routes: report the experts of each token.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    constraint: Constraint | None = None
    return_routes: bool = False

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
        put("min_p", _real("min_p", self.min_p, 0, 1))
        for name in ("frequency_penalty", "presence_penalty"):
            put(name, _real(name, getattr(self, name), -2, 2))
        put("repetition_penalty", _real("repetition_penalty", self.repetition_penalty))
        if self.repetition_penalty <= 0:
            raise PunaError(f"repetition_penalty: must be above 0 (1 is off), not {self.repetition_penalty}")
        if not isinstance(self.logit_bias, Mapping):
            raise PunaError(f"logit_bias: must be token ids with numbers, not {self.logit_bias!r}")
        bias = self.logit_bias.items()
        put("logit_bias", {_integer("logit_bias", t, 0): _real("logit_bias", b, -100, 100) for t, b in bias})
        put("top_logprobs", _integer("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS))
        if not isinstance(self.constraint, Constraint | None):
            raise PunaError(f"constraint: must be a Constraint, not {self.constraint!r}")
        if not isinstance(self.return_routes, bool):
            raise PunaError(f"return_routes: must be true or false, not {self.return_routes!r}")

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


class Chooser:
    """What the choice of one request's next token depends on besides the logits.

    Its random numbers, the tokens it has seen and said (as far as it penalises them) and the place in its grammar.
    `prompt`: token ids. vocabulary, device: of the logits; only penalties and biases need them.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        vocabulary: int = 0,
        device: torch.device | str = "cpu",
        grammar: Grammar | None = None,
    ):
        self.sampling, self.grammar = sampling, grammar
        self.seen_V: Tensor | None = None  # bool: in the prompt or the answer
        self.offset_V: Tensor | None = None  # what is added to the logits
        self._generator = sampling.generator()
        self._drawn: deque[float] = deque()  # for the next token, and those after it as far as someone looked ahead
        self._said: set[int] = set()
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.seen_V[torch.as_tensor(prompt, dtype=torch.long, device=device)] = True
        if sampling.logit_bias or sampling.frequency_penalty or sampling.presence_penalty:
            self.offset_V = torch.zeros(vocabulary, device=device)
            for token, bias in sampling.logit_bias.items():
                self.offset_V[token] = bias

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) that draws the next token, or the one `ahead` tokens after it."""
        while len(self._drawn) <= ahead:
            self._drawn.append(torch.rand(1, dtype=torch.float64, generator=self._generator).item())
        return self._drawn[ahead]

    def push(self, token: int) -> None:
        """The next token is `token`. PunaError: the grammar's limits are exceeded, the answer can't go on."""
        if self._generator is not None:
            self.uniform()
            self._drawn.popleft()
        if self.seen_V is not None:
            self.seen_V[token] = True
        if self.offset_V is not None:
            s = self.sampling
            self.offset_V[token] -= s.frequency_penalty + (0.0 if token in self._said else s.presence_penalty)
            self._said.add(token)
        if self.grammar is not None:
            self.grammar.push(token)


class Choice(NamedTuple):
    """A token, its log-probability under the raw logits, and the likeliest tokens with theirs (`top_logprobs`)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


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


def _scores(logits_BV: Tensor, choosers: Sequence[Chooser], banned_V: Tensor | None) -> Tensor:
    """Steps 1 to 3 of the module's docstring; the rows of requests that want none of it stay as they are."""
    scores_BV = logits_BV.clone() if banned_V is None else logits_BV.masked_fill(banned_V, -math.inf)
    rows = [row for row, chooser in enumerate(choosers) if chooser.seen_V is not None]
    if rows:
        seen_NV = torch.stack([choosers[row].seen_V for row in rows])
        r_N1 = scores_BV.new_tensor([[choosers[row].sampling.repetition_penalty] for row in rows])
        z_NV = scores_BV[rows]
        scores_BV[rows] = torch.where(seen_NV, torch.where(z_NV > 0, z_NV / r_N1, z_NV * r_N1), z_NV)
    rows = [row for row, chooser in enumerate(choosers) if chooser.offset_V is not None]
    if rows:
        scores_BV[rows] += torch.stack([choosers[row].offset_V for row in rows])
    for row, chooser in enumerate(choosers):
        if chooser.grammar is not None:
            allowed_V = chooser.grammar.allowed_V.to(scores_BV.device, non_blocking=True)
            scores_BV[row].masked_fill_(~allowed_V, -math.inf)
    return scores_BV


def sample(
    logits_BV: Tensor, choosers: Sequence[Chooser], banned_V: Tensor | None = None, ahead: int = 0
) -> list[Choice]:
    """One choice for each row; changes nothing (`Chooser.push` does).

    banned_V: bool, True where a token must not be chosen. A row whose logits are not finite gets a NaN
    log-probability: the engine fails that request. ahead: draw as for the token this many after the next.
    """
    logits_BV = logits_BV.float()
    scores_BV = _scores(logits_BV, choosers, banned_V)
    tokens_B = scores_BV.argmax(-1)
    groups: dict[tuple[int, float, float], list[int]] = {}
    for row, chooser in enumerate(choosers):
        s = chooser.sampling
        if s.temperature > 0:
            groups.setdefault((s.top_k, s.top_p, s.min_p), []).append(row)
    for (top_k, top_p, min_p), rows in groups.items():
        wide = dict(dtype=torch.float64, device=logits_BV.device)
        uniform_N1 = torch.tensor([[choosers[row].uniform(ahead)] for row in rows], **wide)
        temperature_N1 = torch.tensor([[choosers[row].sampling.temperature] for row in rows], **wide)
        scores_NV = scores_BV[rows].double()
        # First less the largest, so that a tiny temperature gives -inf, never inf - inf.
        scores_NV = scores_NV - scores_NV.amax(-1, keepdim=True)
        probs_NW, tokens_NW = torch.softmax(scores_NV / temperature_N1, dim=-1), None
        if top_k or top_p < 1:
            probs_NW, tokens_NW = kept_probabilities(probs_NW, top_k, top_p)
        if min_p:
            probs_NW = probs_NW.masked_fill(probs_NW < min_p * probs_NW.amax(-1, keepdim=True), 0)
        drawn_N = _draw(probs_NW, uniform_N1)
        tokens_B[rows] = drawn_N if tokens_NW is None else tokens_NW.gather(-1, drawn_N[:, None]).squeeze(-1)
    mass_B = logits_BV.logsumexp(-1)
    logprobs_B = logits_BV.gather(-1, tokens_B[:, None]).squeeze(-1) - mass_B
    top: dict[int, list[tuple[int, float]]] = {}
    rows = [row for row, chooser in enumerate(choosers) if chooser.sampling.top_logprobs]
    if rows:
        wanted = [choosers[row].sampling.top_logprobs for row in rows]
        values_NK, ids_NK = logits_BV[rows].topk(min(max(wanted), logits_BV.shape[-1]), dim=-1)
        values_NK = values_NK - mass_B[rows, None]
        for row, n, ids, values in zip(rows, wanted, ids_NK.tolist(), values_NK.tolist(), strict=True):
            top[row] = list(zip(ids[:n], values[:n], strict=True))
    chosen = zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True)
    return [Choice(token, logprob, top.get(row, [])) for row, (token, logprob) in enumerate(chosen)]


def choose(
    logits_BV: Tensor, choosers: Sequence[Chooser], banned_V: Tensor | None = None
) -> list[Choice | Exception]:
    """Every row's next token, which its chooser has then moved past, or why that row has none."""
    chosen: list[Choice | Exception] = []
    for chooser, choice in zip(choosers, sample(logits_BV, choosers, banned_V), strict=True):
        try:
            if not math.isfinite(choice.logprob):
                raise FloatingPointError("the model's logits are not finite")
            chooser.push(choice.token)
            chosen.append(choice)
        except Exception as error:
            chosen.append(error)
    return chosen
