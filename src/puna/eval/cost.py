"""What fewer bits cost: the same model before and after quantisation, on the same texts and the same questions.

    perplexity/<text>    exp(mean over tokens of -ln p(token | before)) of held-out text: what language modelling lost
    naming, grounding, addition, needle    shares of right answers (`eval/suite.py`): what a user would notice

Perplexities are compared window by window, so the error of their difference is that of paired values, and differences
far below the error of either are seen. Shares are of a hundred questions or so, answered greedily: an answer flips
where two tokens were nearly alike, so the error given is that of two independent shares, the larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from puna import nursery
from puna.errors import PunaError
from puna.eval import nll, suite
from puna.eval.config import EvalConfig
from puna.model import Llama4
from puna.processor import Processor

TEXTS = ("en", "code")
BYTES = 200_000  # of each text
WINDOW = 512  # tokens


@dataclass(frozen=True)
class Cost:
    """One line: a value `before` and `after`, the standard error of their difference, and how many values it is of."""

    name: str
    before: float
    after: float
    stderr: float
    n: int

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        change = self.after - self.before
        return f"{self.name:20} {self.before:9.4f} {self.after:9.4f} {change:+9.4f} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class Scores:
    """A model's: for each text nats and tokens of every window, and the rows of `suite.run`."""

    windows: dict[str, tuple[np.ndarray, np.ndarray]]
    rows: dict[str, tuple[float, float, int]]


def score(model: Llama4, processor: Processor | None, questions: int = 100, progress: Callable = print) -> Scores:
    """Measures one model. PunaError: it has no tokenizer."""
    if processor is None:
        raise PunaError("--report reads and asks: it needs a model with a tokenizer")
    tokenizer, windows = processor.tokenizer, {}
    for name in TEXTS:
        documents = nll.head(nursery.code("val") if name == "code" else nursery.texts(name, "val"), BYTES)
        cut = nll.windows(tokenizer, documents, min(WINDOW, model.config.max_context))
        bits = nll.window_bits(model, cut, tokenizer.pad)
        windows[name] = bits * math.log(2), np.array([len(ids) - 1 for ids in cut])
        progress(name)
    config = EvalConfig(
        naming=questions, grounding=questions, addition=questions, needle=max(1, questions // 5), languages=("en",),
        goals={}, bpb_bytes=1, chance_chars=1, samples=0,
    )  # fmt: skip
    rows, _ = suite.run(model, processor, config, {}, lambda row: progress(row.name))
    shares = {row.name: (row.value, row.stderr, row.n) for row in rows if row.value is not None}
    return Scores(windows, shares)


def costs(before: Scores, after: Scores) -> list[Cost]:
    """Both models' scores, line by line."""
    lines = []
    for name, (nats, tokens) in before.windows.items():
        other, n, total = after.windows[name][0], len(tokens), tokens.sum()
        mean, new = nats.sum() / total, other.sum() / total
        rest = other - nats - (new - mean) * tokens
        error = math.sqrt(n / max(1, n - 1) * (rest**2).sum()) / total  # of the difference of means, in nats
        lines.append(Cost(f"perplexity/{name}", math.exp(mean), math.exp(new), math.exp(mean) * error, int(total)))
    for name, (value, error, n) in before.rows.items():
        new, new_error, _ = after.rows[name]
        lines.append(Cost(name, value, new, math.hypot(error, new_error), n))
    return lines
