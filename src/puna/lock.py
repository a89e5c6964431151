"""One process on one folder: an advisory lock on `<folder>/.lock`.

Two processes that train into the same run would prune each other's checkpoints. The kernel holds the lock
(flock(2)) and drops it when the process ends, however it ends, so a killed run never has to be unlocked by hand. The
file's text, the holder's process id, is only for the message.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from puna.errors import PunaError

LOCK_FILE = ".lock"


@contextmanager
def lock(folder: str | os.PathLike) -> Iterator[Path]:
    """Holds `folder` (made if it is missing) for this process as long as the block runs; yields it as a Path.

    Errors: PunaError at once if another process, or another `lock` of this one, holds it, or if the disk refuses.
    """
    folder = Path(folder)
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="ascii")  # noqa: SIM115  closed below, after the block
    except OSError as error:
        raise PunaError(f"cannot use {folder}: {error.strerror or error}; choose another name or folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip()
            who = f"process {holder}" if holder else "another process"
            raise PunaError(f"{folder} is in use by {who}: let it finish, or choose another name") from None
        handle.seek(0)
        handle.truncate()
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.write(handle.fileno(), f"{os.getpid()}\n".encode())
        yield folder
