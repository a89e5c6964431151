"""Micro-batches side by side, each in a thread with cores of its own.

Two cores that share every product meet at the end of each, hundreds of times a step, and wait for each other: for the
one that was late, for what only one of them does in between, for the thread that draws the next pictures. With a
micro-batch each they meet once. A worker has a *twin* of the model: the same weights in the same memory, gradients of
its own. Gradients and measures are added up in a fixed order, so that a step is the same bit for bit whoever was
faster; of two micro-batches whose loss is one slice it is also the same as of one after the other.

It pays where a micro-batch's products are too small to share, and costs a second set of gradients and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from puna.model import Llama4

Part, Result = TypeVar("Part"), TypeVar("Result")
OWN = ("_parameters", "_modules")  # of a module's attributes, what a twin doesn't share


def twin(module: nn.Module, known: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """A module that computes the same with the same weights, and has gradients and notes of its own."""
    known = {} if known is None else known
    result = type(module).__new__(type(module))
    result.__dict__.update(module.__dict__)
    result.__dict__["_parameters"] = {
        name: p if p is None else known.setdefault(id(p), nn.Parameter(p.detach(), p.requires_grad))
        for name, p in module._parameters.items()
    }
    result.__dict__["_modules"] = {name: child and twin(child, known) for name, child in module._modules.items()}
    return result


class Workers:
    """`count` threads, each with the model or a twin of it, and an equal share of torch's threads."""

    def __init__(self, model: Llama4, count: int):
        self.models = [model, *(twin(model) for _ in range(count - 1))]
        cores = max(1, torch.get_num_threads() // count)
        self.pool = ThreadPoolExecutor(count, "worker", lambda: torch.set_num_threads(cores))

    def run(self, work: Callable[[Llama4, Part], Result], parts: Sequence[Part]) -> list[Result]:
        """[work(model, part) for part in parts], worker i doing the parts i, i + count, ...; then all gradients are the
        model's. What a worker raises is raised here, once all are done."""
        model, count = self.models[0], len(self.models)
        for other in self.models[1:]:
            for mine, theirs in zip(model.modules(), other.modules(), strict=True):  # the mode, the router's bias
                theirs.__dict__.update({k: v for k, v in mine.__dict__.items() if k not in OWN})

        def turn(worker: int) -> list[Result]:
            return [work(self.models[worker], part) for part in parts[worker::count]]

        turns = [self.pool.submit(turn, worker) for worker in range(count)]
        done = [each.exception() or each.result() for each in turns]
        for each in done:
            if isinstance(each, BaseException):
                raise each
        for other in self.models[1:]:
            self._add_gradients(model, other)
        return [done[i % count][i // count] for i in range(len(parts))]

    @staticmethod
    @torch.no_grad()
    def _add_gradients(model: Llama4, other: nn.Module) -> None:
        into, more = [], []
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if mine.grad is None:
                mine.grad = theirs.grad
            elif theirs.grad is not None:
                into.append(mine.grad)
                more.append(theirs.grad)
            theirs.grad = None
        if into:
            torch._foreach_add_(into, more)

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown()


@contextmanager
def side_by_side(model: Llama4, count: int) -> Iterator[Workers | None]:
    """Workers as long as it lasts; None for one, which needs no thread of its own."""
    workers = Workers(model, count) if count > 1 else None
    try:
        yield workers
    finally:
        if workers is not None:
            workers.close()
