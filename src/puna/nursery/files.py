"""Where the nursery's files lie, how they are read, and how they are checked.

Everything under ``data/`` was written by ``python -m puna.nursery.build`` from pinned packages; ``data/manifest.json``
holds the SHA-256 of each file, so a damaged or edited copy is noticed before a model is trained on it.
"""

import hashlib
import json
import lzma
from functools import lru_cache
from pathlib import Path

from puna.errors import PunaError

DATA = Path(__file__).parent / "data"
LANGUAGES = ("ar", "de", "en", "es", "fr", "hi", "id", "it", "pt", "th", "tl", "vi")
SIZE_LIMIT = 12_000_000  # bytes on disk, all of data/
LICENCES_ALLOWED = (
    "public domain", "CC0-1.0", "MIT", "BSD-3-Clause", "Apache-2.0", "PSF-2.0", "Unicode-3.0",
    "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "MPL-2.0",
)  # fmt: skip


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_bytes(name: str) -> bytes:
    """Content of ``data/<name>``; PunaError if the file is missing."""
    path = DATA / name
    if not path.is_file():
        raise PunaError(f"nursery file {name} is missing: reinstall puna or run `python -m puna.nursery.build`")
    return path.read_bytes()


def read_json_xz(name: str):
    """A JSON value from ``data/<name>`` (xz)."""
    return json.loads(lzma.decompress(read_bytes(name)))


@lru_cache(maxsize=1)
def _manifest() -> str:
    return read_bytes("manifest.json").decode()


def manifest() -> dict:
    """The nursery's inventory.

    Keys: ``files`` {path: {sha256, bytes, source}}, ``sources`` {name: {title, packages, licence, licence_file, kind,
    prose, ...}}, ``languages`` {code: {train_bytes, val_bytes, prose_bytes, documents, note}}, ``pictures``, ``facts``,
    ``total_bytes``. A fresh copy each call.
    """
    return json.loads(_manifest())


def verify() -> int:
    """Check the SHA-256 of every data file; returns how many were checked. PunaError names the first that differs."""
    files = manifest()["files"]
    for name, entry in files.items():
        digest = hashlib.sha256(read_bytes(name)).hexdigest()
        if digest != entry["sha256"]:
            raise PunaError(
                f"nursery file {name} has SHA-256 {digest[:12]}…, the manifest says {entry['sha256'][:12]}…: "
                "reinstall puna or run `python -m puna.nursery.build`"
            )
    return len(files)
