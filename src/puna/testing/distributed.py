"""Processes that talk over gloo, for tests: started once, used for many tests.

    with Pool(4) as pool:
        results = pool.run(function, 2, *arguments)     # function(rank, *arguments) on 2 of them, a list of 2 results

Starting a process that imports torch takes seconds, joining a new group milliseconds. Each run has a group of its own,
so a failed one leaves nothing behind; a process that does not answer is killed with all others and started again.
The function is found by its module's name, so it stands at the top of a module that the processes can import.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class Failed(Exception):
    """What a process raised, with its traceback as text."""


def _serve(rank: int, pipe, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        try:
            function, world, store, arguments, timeout = pipe.recv()
        except EOFError:
            return
        try:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
            dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world,
                                    timeout=timedelta(seconds=timeout))  # fmt: skip
            answer = (True, function(rank, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
        if dist.is_initialized():
            dist.destroy_process_group()


class Pool:
    """`size` processes, started when first needed."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable, world: int, *arguments, timeout: float = 200.0) -> list:
        """function(rank, *arguments) in `world` processes that form the default group; their results by rank.

        Errors: Failed with the first traceback; Failed where one is still running after `timeout` seconds.
        """
        if world > self.size:
            raise ValueError(f"{world} processes of {self.size}")
        if not self.workers:
            context = multiprocessing.get_context("spawn")
            for rank in range(self.size):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, there, list(sys.path)), daemon=True)
                process.start()
                there.close()
                self.workers.append((process, here))
            for _, pipe in self.workers:  # importing torch on a busy machine is no part of a run's time
                pipe.recv()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            some = self.workers[:world]
            for _, pipe in some:
                pipe.send((function, world, store, arguments, timeout))
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
