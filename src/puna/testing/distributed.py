"""Processes that talk over gloo, for tests: started once, used for many tests.

    with Pool(4) as pool:
        results = pool.run(function, 2, *arguments)     # function(rank, *arguments) on 2 of them, a list of 2 results

Importing torch takes seconds, so one process does it and nothing else, and the others are forks of it; joining a new
group takes milliseconds. Each run has a group of its own, so a failed one leaves nothing behind; a process that does
not answer is killed with all others and forked again. The function is found by its module's name, so it stands at the
top of a module that the processes can import.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any


class Failed(Exception):
    """What a process raised, with its traceback as text."""


# What forks begin with; only names, for this package stands on the model alone.
PRELOAD = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "puna.parallel.apply", "puna.train")


def forks(preload: tuple[str, ...] = PRELOAD):
    """A multiprocessing context whose processes are forks of one that has imported `preload` (the first call's) and
    has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class _Bytes(pickle.Pickler):
    """Tensors as numpy's bytes: as files shared between processes, torch's way, each would take a millisecond."""

    def reducer_override(self, thing):
        import torch

        if type(thing) is torch.Tensor and thing.dtype != torch.bfloat16:
            return torch.from_numpy, (thing.detach().numpy(),)
        return NotImplemented


def _bytes(thing: Any) -> bytes:
    buffer = io.BytesIO()
    _Bytes(buffer).dump(thing)
    return buffer.getvalue()


def _serve(rank: int, pipe, path: list[str], port: int) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            function, world, number, arguments, timeout = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            dist.init_process_group("gloo", store=dist.PrefixStore(str(number), meeting), rank=rank, world_size=world,
                                    timeout=timedelta(seconds=timeout))  # fmt: skip
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(_bytes(answer))
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """`size` processes, started when first needed."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[tuple[Any, Any]] = []
        self.runs = count()

    def run(self, function: Callable, world: int, *arguments, timeout: float = 200.0) -> list:
        """function(rank, *arguments) in `world` processes that form the default group; their results by rank.

        Errors: Failed with the first traceback; Failed where one is still running after `timeout` seconds.
        """
        if world > self.size:
            raise ValueError(f"{world} processes of {self.size}")
        if not self.workers:
            self._start()
        number, some = next(self.runs), self.workers[:world]
        for _, pipe in some:
            pipe.send((function, world, number, arguments, timeout))
        answers = []
        for process, pipe in some:
            if not pipe.poll(timeout + 30):
                self.close()
                raise Failed(f"{function.__name__}: process {process.pid} gave no answer in {timeout + 30:.0f} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self.close()
                raise Failed(f"{function.__name__}: a process died") from None
        wrong = [text for fine, text in answers if not fine]
        if wrong:
            raise Failed("\n".join(wrong))
        return [value for _, value in answers]

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = forks()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, list(sys.path), self.store.port), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def close(self) -> None:
        """Ends the processes; the next run starts others."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
        for process, _ in self.workers:
            process.join()
        self.workers = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.close()
