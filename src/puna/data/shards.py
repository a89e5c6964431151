"""Packed rows on disk: a folder of plain numpy arrays and one JSON, written atomically, checked when read.

Packing is done once per (inputs, sequence length); a resumed run and every later stage read the result, memory-mapped.
A folder holds tokens.npy, doc_ids.npy (int32 [R, T]), loss.npy (bool [R, T]) and rows.json: what it is (format 1), the
sha256 of each array, the fingerprint of what it was made from, and the pictures as recipes, never pixels. It is
written beside its place and renamed there, so a folder that exists is whole. No pickle is ever read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from puna.data.packing import PackedRows
from puna.errors import PunaError

FORMAT = 1
ARRAYS = {"tokens": np.int32, "doc_ids": np.int32, "loss": np.bool_}


def save(folder: str | os.PathLike, rows: PackedRows, fingerprint: str) -> None:
    """Write `rows` to `folder`, replacing what was there. Pictures need `.to_json()` (ValueError otherwise).

    PunaError: it can't be written (a full disk, no permission); nothing half-written stays, an older folder stays
    whole.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        hashes = {}
        for name, dtype in ARRAYS.items():
            with open(part / f"{name}.npy", "wb") as file:
                np.save(file, np.ascontiguousarray(getattr(rows, name), dtype=dtype), allow_pickle=False)
                _flush(file)
            hashes[name] = _sha256(part / f"{name}.npy")
        about = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "rows": len(rows),
            "seq_len": rows.seq_len,
            "documents": rows.documents,
            "dropped": rows.dropped,
            "sha256": hashes,
            # Sparse: most rows of text have no picture.
            "pictures": {str(r): [_recipe(p) for p in row] for r, row in enumerate(rows.pictures) if row},
        }
        with open(part / "rows.json", "w", encoding="utf-8") as file:
            json.dump(about, file, ensure_ascii=False)
            _flush(file)
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise PunaError(
            f"can't write packed data to {folder}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(
    folder: str | os.PathLike,
    fingerprint: str | None = None,
    *,
    picture: Callable[[dict], Any] | None = None,
    verify: bool = True,
) -> PackedRows | None:
    """Read what `save` wrote, memory-mapped. None where there is no such folder, or its fingerprint isn't the one
    asked for.

    picture: makes a picture of its recipe; None: `puna.tasks.pictures.PictureRef.from_json`. verify: check the arrays'
    hashes. PunaError: a missing, truncated or changed file, named.
    """
    folder = Path(folder)
    if not folder.exists():
        return None
    about = _about(folder / "rows.json")
    if fingerprint is not None and about["fingerprint"] != fingerprint:
        return None
    arrays = {}
    shape = (about["rows"], about["seq_len"])
    for name, dtype in ARRAYS.items():
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(path, str(error)) from error
        if array.shape != shape or array.dtype != dtype:
            raise _damaged(path, f"holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
        if verify and _sha256(path) != about["sha256"][name]:
            raise _damaged(path, "its sha256 is not the one in rows.json")
        arrays[name] = array
    if picture is None and about["pictures"]:
        from puna.tasks.pictures import PictureRef

        picture = PictureRef.from_json
    pictures = [[picture(p) for p in about["pictures"].get(str(r), [])] for r in range(shape[0])]
    return PackedRows(**arrays, pictures=pictures, documents=about["documents"], dropped=about["dropped"])


def _about(path: Path) -> dict:
    """rows.json, with all its keys."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "fingerprint", "rows", "seq_len", "documents", "dropped", "sha256", "pictures"} - set(
            about
        )
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error
    if missing:
        raise _damaged(path, f"{', '.join(sorted(missing))} missing")
    if about["format"] != FORMAT:
        raise PunaError(
            f"{path} has format {about['format']}, this version reads {FORMAT}; delete the folder to pack again"
        )
    return about


def _damaged(path: Path, why: str) -> PunaError:
    first_line = why.splitlines()[0] if why else "unreadable"
    return PunaError(
        f"packed data file {path} is damaged ({first_line}); delete the folder {path.parent} to pack again"
    )


def _recipe(picture: Any) -> dict:
    if not hasattr(picture, "to_json"):
        raise ValueError(f"a {type(picture).__name__} can't be saved with packed rows; pictures there need to_json()")
    return picture.to_json()


def _flush(file: Any) -> None:
    """To the disk, not only to the system's buffers: a full disk may show only here."""
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
