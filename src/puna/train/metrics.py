"""metrics.jsonl: the truth about a run, one JSON object a line, always written; and the display that shows it live.

A resumed run drops the lines of the steps it is about to repeat, so that every step appears once.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from puna.errors import PunaError
from puna.processor.files import write_atomic


class MetricsFile:
    """Appends to `path`; opened at `step`, it keeps only the lines of earlier steps. `followers` are told every line,
    first those that are there."""

    def __init__(self, path: Path, step: int, followers: Sequence[Callable[[dict], None]] = ()):
        self.path, self.followers = path, followers
        kept = [line for line in read(path) if line["step"] < step or ("eval" in line and line["step"] <= step)]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        for line in kept:
            self._tell(line)

    def write(self, **values) -> None:
        """One line, visible to readers at once; a number that is not finite is null, for JSON has no other word."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._handle.write(json.dumps(known) + "\n")
            self._handle.flush()
        except OSError as error:
            raise PunaError(f"can't write {self.path}: {error.strerror}; free some disk space and run again") from error

        self._tell(known)

    def _tell(self, line: dict) -> None:
        for follow in self.followers:
            follow(line)

    def close(self) -> None:
        with suppress(OSError):  # a line that could not be written is tried, and was reported, once
            self._handle.close()


class NoMetrics:
    """Where another process writes them."""

    def write(self, **values) -> None: ...

    def close(self) -> None: ...


def read(path: Path) -> list[dict]:
    """All whole lines of a metrics file; a line cut off by a crash is left out."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                lines.append(value)
    return lines


class Display:
    """A live progress bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, name: str, steps: int, done: int = 0, quiet: bool = False):
        self.name, self.steps, self.quiet = name, steps, quiet
        self.console = Console(stderr=True, highlight=False)
        self.live = not quiet and self.console.is_terminal
        self._last = 0.0
        if self.live:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(name, total=steps, completed=done, text="")
            self.bar.start()

    def step(self, step: int, loss: float, rate: float, eta: float) -> None:
        """`step` steps are done; rate in tokens per second, eta in seconds."""
        text = f"loss {loss:.3f}  {rate:,.0f} tok/s"
        if self.live:
            self.bar.update(self.task, completed=step, text=text)
        elif not self.quiet and (time.monotonic() - self._last > 10 or step == self.steps):
            self._last = time.monotonic()
            print(f"{self.name}  step {step}/{self.steps}  {text}  ETA {eta / 60:.1f} min", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.bar.console.print(text)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            self.bar.stop()
