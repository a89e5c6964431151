"""Generated tokens become text, piece by piece: no broken UTF-8, and never a part of a stop string.

A stop string can be spread over tokens, so its beginning must be held back until it is clear that it is not one:

    stop = "\\n\\nUser:"     pushed: "fine." "\\n" "\\n" "Us" "ing"
    given out:               "fine."  ""   ""   ""   "\\n\\nUsing"

Held back is the longest end of the text which is a proper beginning of some stop string; what was given out earlier
cannot be part of a later match, so only the held text and the new piece are searched.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a stream of text at the first of some stop strings."""

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Takes more text, returns what can be given out. Once a stop was found (`found`), nothing more comes."""
        if self.found is not None or not self.stops:
            return "" if self.found is not None else piece
        text = self.held + piece
        hits = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits)
            self.held = ""
            return text[:at]
        hold = max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The text is over: what was held back is no stop string after all."""
        text, self.held = self.held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Tokens in, text out: the stream decoder, then the stop strings. Without a decoder all text is empty."""

    def __init__(self, decoder, stops: Sequence[str]):
        self._decoder, self._stops = decoder, StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    def push(self, token: int) -> str:
        return "" if self._decoder is None else self._stops.push(self._decoder.push(token))

    def flush(self) -> str:
        """What is left at the end: unfinished UTF-8 (as a replacement character) and held-back text."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._stops.push(self._decoder.flush())
        return text if self.stopped else text + self._stops.flush()
