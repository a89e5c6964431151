"""Whole files or none: written beside the target, flushed to the disk, then renamed over it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from puna.errors import PunaError


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path`, making its folder; a crash leaves the old file or the new one, never a half.

    Raises `PunaError` when the disk refuses.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise PunaError(f"cannot write {path}: {error.strerror or error}; check the disk's space and rights") from error


def sync_folder(folder: str | os.PathLike) -> None:
    """Flushes a folder's entries to the disk: only then does a renaming outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: str | os.PathLike, what: str) -> str:
    """The UTF-8 text of `path`; `PunaError` naming `what` was expected there."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PunaError(f"no {what} at {path}") from error
    except OSError as error:
        raise PunaError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PunaError(f"{what} {path} is not UTF-8 text: the file is damaged") from error
