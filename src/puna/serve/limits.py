"""Every limit of the server in one table: name, default, flag, environment variable, meaning.

A server that faces strangers needs an upper bound on everything a request can make it hold or compute. Bounds scattered
through handlers are forgotten; here each is one row, each row has a test (tests/server/test_server_limits.py), and each
can be changed by a flag, by an environment variable, or in Python: `--max-pictures 4`, `PUNA_MAX_PICTURES=4`,
`Limits(pictures=4)`. A flag goes before a variable, a variable before the default.
(Which bounds matter: docs/serving.md; the bad inputs they answer: serving-and-evaluation.md, F.4.)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from puna.errors import PunaError


def _limit(default: int, doc: str):
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Limits:
    """The bounds one server applies. Every field is a positive integer."""

    # bytes and shape of a request
    body_bytes: int = _limit(32 * 2**20, "bytes of a request body; more is 413")
    held_bytes: int = _limit(256 * 2**20, "bytes of all bodies being read at a time; more is 429 with Retry-After")
    json_depth: int = _limit(32, "levels of nested JSON; more is 400")
    json_values: int = _limit(500_000, "commas in a request body, which bound its JSON values; more is 400")
    key_chars: int = _limit(512, "characters of an API key; a longer one is 401")
    # what it says and shows
    messages: int = _limit(256, "messages (or input items) in one request")
    text_chars: int = _limit(400_000, "characters of text in one request, all messages together")
    pictures: int = _limit(8, "pictures in one request, the frames of videos among them")
    picture_bytes: int = _limit(8 * 2**20, "bytes of one picture or video file, after base64")
    picture_pixels: int = _limit(25_000_000, "pixels (width x height) of one picture")
    picture_side: int = _limit(16_384, "pixels of one picture's longer side")
    total_pixels: int = _limit(60_000_000, "pixels of all pictures in one request")
    film_frames: int = _limit(10_000, "frames of one video file, whatever is taken of them")
    tools: int = _limit(64, "functions offered in one request")
    schema_chars: int = _limit(65_536, "characters of a JSON schema or regular expression that constrains an answer")
    # what it asks for
    answer_tokens: int = _limit(4096, "the largest max_tokens a request may ask for")
    answers: int = _limit(8, "answers of one request: prompts times n")
    stops: int = _limit(4, "stop strings in one request")
    stop_chars: int = _limit(64, "characters of one stop string")
    biases: int = _limit(300, "entries of logit_bias")
    boxes: int = _limit(256, "boxes returned with one answer; further ones stay in the text only")
    # time, in seconds
    header_seconds: int = _limit(30, "seconds a connection may take to send a request's headers; then it is closed")
    body_seconds: int = _limit(30, "seconds a client may take to send its body; more is 408")
    read_seconds: int = _limit(30, "seconds a client may leave a stream unread; then its place is freed")
    answer_seconds: int = _limit(600, "seconds a request may wait and be answered; more is 504")
    drain_seconds: int = _limit(30, "seconds running answers get to finish when the server stops")
    # how many at a time
    running: int = _limit(32, "answers decoded together; further ones wait")
    waiting: int = _limit(32, "answers that wait for a place; one more is 429 with Retry-After")

    def __post_init__(self):
        for row in dataclasses.fields(self):
            value = getattr(self, row.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PunaError(f"limit {row.name} must be a positive integer, not {value!r}")

    @property
    def places(self) -> int:
        """Answers that are decoded or wait."""
        return self.running + self.waiting

    @classmethod
    def read(cls, flags: Mapping[str, int | None] | None = None, environ: Mapping[str, str] | None = None) -> Limits:
        """Defaults, overridden by PUNA_MAX_* variables, overridden by `flags` (by name; None: not given).

        Raises PunaError for a variable that is unknown or no number."""
        environ = os.environ if environ is None else environ
        names = {row.variable: row.name for row in table()}
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
        return cls(**values | {name: value for name, value in (flags or {}).items() if value is not None})


class Row(NamedTuple):
    """A limit as documentation, the command line and the tests see it."""

    name: str
    default: int
    flag: str
    variable: str
    doc: str


def table() -> list[Row]:
    """All limits: `pictures` has the flag `--max-pictures` and the variable `PUNA_MAX_PICTURES`."""
    return [
        Row(f.name, f.default, f"--max-{f.name.replace('_', '-')}", f"PUNA_MAX_{f.name.upper()}", f.metadata["doc"])
        for f in dataclasses.fields(Limits)
    ]
