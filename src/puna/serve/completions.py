"""The older completions in OpenAI's shape: plain text goes on as plain text.

    {"object":"text_completion","choices":[{"index":0,"text":" a time","logprobs":null,"finish_reason":"length"}], ...}

Streamed, every chunk is such an object with the new piece of text. Several prompts with n answers each are choices
0 … n-1 for the first prompt, n … 2n-1 for the second, and so on.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence

from puna.serve import errors
from puna.serve.answers import Piece, collect
from puna.serve.chat import DONE, Counts, usage
from puna.serve.stream import Speller, event, guarded


class Completions:
    """The frame of one request's answers. echo: the texts that choices begin with, one a choice, or none."""

    def __init__(
        self, model: str, prompt_tokens: int, n: int, include_usage: bool = False, echo: Sequence[str] = (),
        speller: Speller | None = None,
    ):  # fmt: skip
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": model,
        }  # fmt: skip
        self.prompt_tokens, self.include_usage, self.speller, self.echo = prompt_tokens, include_usage, speller, echo
        self.counts, self.lengths = Counts(n), [len(text) for text in echo] or [0] * n

    async def whole(self, pieces: AsyncIterator[tuple[int, Piece]]) -> dict:
        choices = []
        for number, answer in enumerate(await collect(pieces, len(self.lengths))):
            for piece in answer:
                self.counts.take(number, piece)
            logprobs = self._logprobs(number, answer)
            text = (self.echo[number] if self.echo else "") + "".join(piece.text for piece in answer)
            choices.append(_choice(number, text, logprobs, answer[-1].finish_reason))
        return {**self.head, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict:
        return usage(self.prompt_tokens, self.counts.total, self.counts.cached[0])

    def _logprobs(self, number: int, pieces: Sequence[Piece]) -> dict | None:
        """The older form: parallel lists. text_offset: where in the choice's text a token's text begins."""
        if self.speller is None:
            return None
        found: dict = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            if piece.token is not None:
                found["tokens"].append(self.speller.token(piece.token))
                found["token_logprobs"].append(piece.logprob)
                # the likeliest last: where two tokens have one text, it is the one that counts
                top = {self.speller.token(id): logprob for id, logprob in reversed(piece.top)}
                found["top_logprobs"].append(top)
                found["text_offset"].append(self.lengths[number])
            self.lengths[number] += len(piece.text)
        return found

    async def events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        """The lines of a streamed response. A failure becomes an error event, then the end."""
        async for line in guarded(self._events(pieces), lambda error: event(errors.content(error))):
            yield line
        yield DONE

    async def _events(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[bytes]:
        head = {**self.head, "usage": None} if self.include_usage else self.head
        for number, text in enumerate(self.echo):
            yield event({**head, "choices": [_choice(number, text)]})
        async for number, piece in pieces:
            self.counts.take(number, piece)
            logprobs = self._logprobs(number, [piece])
            if piece.text or piece.finish_reason or (logprobs and logprobs["tokens"]):
                yield event({**head, "choices": [_choice(number, piece.text, logprobs, piece.finish_reason)]})
        if self.include_usage:
            yield event({**head, "choices": [], "usage": self._usage()})


def _choice(number: int, text: str, logprobs: dict | None = None, reason: str | None = None) -> dict:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
