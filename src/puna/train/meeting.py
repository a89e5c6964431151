"""Processes that write files together meet through files: no connection, so a thread can do it while others train.

    .planned-0                 said by one, heard by all
    .written-0 .written-1 ...  said by all, heard by one

A process that fails renames the folder to NAME.gone: that works on a full disk too, nobody can write into the old name
any more, and the others see at their next look that there is nothing left to wait for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from puna.errors import PunaError

GONE = ".gone"


class GaveUp(PunaError):
    """Another process failed, or this one was told to stop: the reason is elsewhere."""


class Meeting:
    """What process `index` of several says and hears about a folder.

    timeout: seconds to wait for one another. Process 0, for which all others wait, waits for them half as long: so it
    is the one that names who is missing.
    """

    def __init__(self, folder: Path, index: int, timeout: float, cancelled: Event):
        self.folder, self.index, self.cancelled = folder, index, cancelled
        self.timeout = timeout if index else timeout / 2
        self.gone = folder.with_name(folder.name + GONE)

    def say(self, what: str, value: Any = None) -> None:
        """Errors: OSError."""
        path = self.folder / f".{what}-{self.index}"
        new = path.with_name(f".new{path.name}")
        new.write_text(json.dumps(value), encoding="utf-8")
        new.replace(path)

    def hear(self, what: str, whom: Iterable[int] = (0,)) -> list[Any]:
        """What each of them said, in their order. Errors: GaveUp; PunaError naming those that never said it."""
        paths = {index: self.folder / f".{what}-{index}" for index in whom}
        end, pause = time.monotonic() + self.timeout, 0.001
        while missing := [index for index, path in paths.items() if not path.exists()]:
            if self.gone.exists() or self.cancelled.is_set():
                raise GaveUp("another process gave it up")
            if time.monotonic() > end:
                names = ", ".join(map(str, missing))
                raise PunaError(f"process {names} was not heard of for {self.timeout:g} s ({what}): see its log")
            self.cancelled.wait(pause)
            pause = min(2 * pause, 0.1)
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()]

    def clear(self) -> None:
        """Removes all that was said."""
        for path in self.folder.glob(".*-*"):
            path.unlink()

    def give_up(self) -> None:
        """Tells the others; what was written is removed, the empty folder's name stays (`sweep`)."""
        with suppress(OSError):
            self.folder.rename(self.gone)
        for path in self.gone.glob("*"):
            with suppress(OSError):
                path.unlink()


def sweep(parent: Path) -> None:
    """Removes what processes gave up, when all of them know."""
    for gone in parent.glob(f".*{GONE}"):
        shutil.rmtree(gone, ignore_errors=True)
