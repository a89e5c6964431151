"""Every limit of the server in one table: name, default, environment variable, meaning.

A server that faces strangers needs an upper bound on everything a request can make it hold or compute. Bounds scattered
through handlers are forgotten; here each is one row, each row has a test (tests/server/test_limits.py), and each can be
changed with an environment variable or in Python: `Limits.from_env()`, `Limits(pictures=4)`.
(Which bounds matter: docs/serving.md; the bad inputs they answer: serving-and-evaluation.md, F.4.)
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field

from puna.errors import PunaError


def _limit(default: int, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Limits:
    """The bounds one server applies. Every field is a positive integer; its variable is PUNA_MAX_<NAME IN CAPITALS>."""

    body_bytes: int = _limit(32 * 2**20, "bytes of a request body; more is 413")
    body_seconds: int = _limit(30, "seconds a client may take to send its body; more is 408")
    json_depth: int = _limit(32, "levels of nested JSON; more is 400")
    messages: int = _limit(256, "messages in one request")
    text_chars: int = _limit(400_000, "characters of text in one request, all messages together")
    pictures: int = _limit(8, "pictures in one request")
    picture_bytes: int = _limit(8 * 2**20, "bytes of one picture file, after base64")
    picture_pixels: int = _limit(25_000_000, "pixels (width x height) of one picture")
    picture_side: int = _limit(16_384, "pixels of one picture's longer side")
    total_pixels: int = _limit(60_000_000, "pixels of all pictures in one request")
    answer_tokens: int = _limit(4096, "the largest max_tokens a request may ask for")
    stops: int = _limit(4, "stop strings in one request")
    stop_chars: int = _limit(64, "characters of one stop string")
    boxes: int = _limit(256, "boxes returned with one answer; further ones stay in the text only")
    open_requests: int = _limit(64, "requests answered or waiting at a time; more is 503 with Retry-After")
    drain_seconds: int = _limit(30, "seconds running answers get to finish when the server stops")

    def __post_init__(self):
        for row in dataclasses.fields(self):
            value = getattr(self, row.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PunaError(f"limit {row.name} must be a positive integer, not {value!r}")

    @classmethod
    def from_env(cls, environ: dict[str, str] | None = None) -> Limits:
        """Defaults, overridden by PUNA_MAX_* variables. Raises PunaError for an unknown or non-numeric one."""
        environ = os.environ if environ is None else environ
        names = {variable(row.name): row.name for row in dataclasses.fields(cls)}
        values = {}
        for key, text in environ.items():
            if not key.startswith("PUNA_MAX_"):
                continue
            if key not in names:
                raise PunaError(f"unknown limit {key}; the limits are {', '.join(sorted(names))}")
            try:
                values[names[key]] = int(text)
            except ValueError:
                raise PunaError(f"{key} must be a positive integer, not {text!r}") from None
        return cls(**values)


def variable(name: str) -> str:
    """The environment variable of a limit: `pictures` -> `PUNA_MAX_PICTURES`."""
    return "PUNA_MAX_" + name.upper()


def table() -> list[tuple[str, int, str, str]]:
    """Rows (name, default, environment variable, meaning) for documentation and tests."""
    return [(f.name, f.default, variable(f.name), f.metadata["doc"]) for f in dataclasses.fields(Limits)]
