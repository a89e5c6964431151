"""A model written into a new folder: complete under its name or not there at all, and not begun again after a kill.

The files are laid out in `.NAME.part` beside the target, parameters are written one after the other, and a journal
there says which are done; the folder is renamed when everything is on the disk.  A killed conversion goes on behind the
last parameter of its journal, if source, configuration and format are still the same (sizes and times of the source's
files), else it starts over.  The journal is written only after the files were flushed: a power cut can't make it lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from puna.convert.layout import FileStore, Store, move
from puna.convert.tensors import read_json
from puna.errors import PunaError
from puna.lock import LOCK_FILE, lock
from puna.model.config import ModelConfig
from puna.processor.files import sync_folder

JOURNAL = ".journal.json"
NEW_JOURNAL = f"{JOURNAL}.new"
FLUSH_BYTES = 2**30  # written between two journals, at least: about five seconds

Dtypes = dict[str, torch.dtype]


class Format(Protocol):
    """What a kind of folder is made of."""

    hashed: bool  # whether `finish` needs the SHA-256 of every parameter's bytes

    def plan(self, config: ModelConfig, dtypes: Dtypes, folder: Path) -> FileStore:
        """Lays out the files of the weights, all zero."""

    def finish(self, config: ModelConfig, dtypes: Dtypes, hashes: dict[str, str], folder: Path) -> None:
        """Writes the files beside the weights."""


def write_folder(
    source: Store, form: Format, folder: str | os.PathLike, dtype: torch.dtype | None = None, origin: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:  # fmt: skip
    """Writes `source` as `form` into `folder`; returns it.

    dtype: of all parameters (None: each as it is). origin: what the source was, so that an interrupted conversion of
    the same goes on ('': it is not kept). progress: called with bytes done and bytes in all.
    Errors: PunaError if the folder exists and is not empty, another process writes it, or the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PunaError(f"{folder} exists already: remove it or choose another name")
    work = folder.parent / f".{folder.name}.part"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with lock(work):
            try:
                _write(source, form, work, dtype, origin, progress)
                (work / LOCK_FILE).unlink()
                for name in (JOURNAL, NEW_JOURNAL):  # the latter: killed between its two names
                    (work / name).unlink(missing_ok=True)
                work.replace(folder)
                sync_folder(folder.parent)
            except BaseException as error:
                if not origin or not isinstance(error, KeyboardInterrupt):
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except OSError as error:
        raise PunaError(
            f"can't write {folder}: {error.strerror or error}; check the disk's space and rights"
        ) from error
    return folder


def _write(source: Store, form: Format, work: Path, dtype: torch.dtype | None, origin: str, progress) -> None:
    config, shapes = source.config, source.shapes()
    dtypes = {name: dtype or source.dtype(name) for name in shapes}
    sizes = {name: torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    kinds = {name: str(kind) for name, kind in dtypes.items()}
    begun = {"origin": origin, "config": repr(config), "format": repr(form), "dtypes": kinds}
    hashes = _done(work, begun) if origin else {}
    if not hashes:
        for path in work.iterdir():
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    target = form.plan(config, dtypes, work)
    done, total, kept = sum(sizes[name] for name in hashes), sum(sizes.values()), 0
    progress(done, total)
    with ThreadPoolExecutor(1) as keeper:
        keeping: Future | None = None
        for name, shape in shapes.items():
            if name in hashes:
                continue
            digest = hashlib.sha256()
            hashing = (lambda rows, digest=digest: digest.update(_bytes(rows))) if form.hashed else None
            move(source, target, name, shape, hashing)
            hashes[name] = digest.hexdigest() if form.hashed else ""
            done += sizes[name]
            if origin and done - kept >= FLUSH_BYTES and (keeping is None or keeping.done()):
                if keeping is not None:
                    keeping.result()  # its error, if it had one
                keeping, kept = keeper.submit(_keep, work, begun | {"done": dict(hashes)}), done
            progress(done, total)
        if keeping is not None:
            keeping.result()
    form.finish(config, dtypes, hashes, work)
    _flush(work)


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())


def _done(work: Path, begun: dict) -> dict[str, str]:
    """Hashes of the parameters that an interrupted run of the same conversion has written; empty: there was none."""
    try:
        journal = read_json(work / JOURNAL)
    except PunaError:
        return {}
    return journal.pop("done") if {k: v for k, v in journal.items() if k != "done"} == begun else {}


def _keep(work: Path, value: dict) -> None:
    """What `value` says is done reaches the disk, then `value` does; more may be written meanwhile."""
    _flush(work)
    new = work / NEW_JOURNAL
    with open(new, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(work / JOURNAL)
    sync_folder(work)


def _flush(work: Path) -> None:
    for path in work.iterdir():
        if path.name not in (JOURNAL, NEW_JOURNAL):
            with open(path, "rb+") as handle:
                os.fsync(handle.fileno())
    sync_folder(work)
