"""The engine for one caller: a list of prompts in, their answers out; or one answer piece by piece.

Both add requests like anyone else and step the engine until theirs are finished; what others have running goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from puna.engine.request import Completion, Event
from puna.engine.sampler import Sampling
from puna.errors import PunaError

if TYPE_CHECKING:
    from puna.engine.engine import Engine


def generate(
    engine: Engine, prompts: Sequence, seed: int | Sequence[int] | None = None, errors: str = "raise", **sampling
) -> list[Completion]:
    """Answers to all prompts (each a list of messages, an `Encoded` or token ids), in their order.

    Other keywords are `Sampling`'s. seed: one for all, or one for each prompt. errors: "raise" raises the first
    request's error (and drops the rest), "return" puts it in that request's Completion (finish_reason "error").
    """
    if errors not in ("raise", "return"):
        raise PunaError(f'errors: must be "raise" or "return", not {errors!r}')
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], dict)):
        raise PunaError("generate takes a list of prompts: put the messages in one more list")
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
    if len(seeds) != len(prompts):
        raise PunaError(f"seed: {len(seeds)} seeds were given for {len(prompts)} prompts")
    samplings = [settings("generate", seed=s, **sampling) for s in seeds]
    results: list[Completion | None] = [None] * len(prompts)
    own: dict[str, int] = {}

    failed: list[Exception] = []

    def sink(event: Event) -> None:
        if event.completion is not None:
            results[own.pop(event.id)] = event.completion
            if event.completion.error is not None:
                failed.append(event.completion.error)

    todo = iter(range(len(prompts)))
    held: list[Event] = []  # of requests that others added
    try:
        while True:
            # Prompts are tokenised as they are needed, so that ten thousand pictures need not be in memory at
            # once.
            while len(engine.scheduler.waiting) < engine.scheduler.rows and (i := next(todo, None)) is not None:
                id = f"request-{next(engine._numbers)}"
                own[id] = i
                try:
                    engine.add_request(prompts[i], samplings[i], id, sink)
                except Exception as error:
                    if errors == "raise":
                        raise
                    del own[id]
                    results[i] = Completion(id, "", [], [], "error", 0, error=error)
            if not own:
                return results
            held += engine.step()
            if failed and errors == "raise":
                raise failed[0]
    finally:
        for id in list(own):
            engine.abort(id)
        engine._events = held + engine._events


def stream(engine: Engine, messages, **sampling) -> Iterator[str]:
    """The answer to one prompt, piece by piece. Keywords are `Sampling`'s; closing the generator aborts."""
    wanted = settings("stream", **sampling)
    events: list[Event] = []
    id = engine.add_request(messages, wanted, sink=events.append)
    held: list[Event] = []  # of requests that others added
    try:
        while True:
            held += engine.step()
            now, events[:] = list(events), []
            for event in now:
                if event.text:
                    yield event.text
                if event.completion is not None:
                    if event.completion.error is not None:
                        raise event.completion.error
                    return
    finally:
        engine.abort(id)
        engine._events = held + engine._events


def settings(caller: str, **sampling) -> Sampling:
    """Sampling of keywords; an unknown one is a PunaError."""
    try:
        return Sampling(**sampling)
    except TypeError as error:
        raise PunaError(f"{caller}: {str(error).partition(') ')[2] or error}") from error
