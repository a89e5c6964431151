"""The code source: whole modules of Python's standard library."""

import ast
from collections.abc import Iterator

from puna.nursery.building.fetch import Packages
from puna.nursery.building.prose import Document

SKIPPED = ("test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip", "distutils", "__phello__")
SHORTEST, LONGEST = 600, 60_000  # bytes of a module


def standard_library(packages: Packages, language: str) -> Iterator[Document]:
    """Modules that parse, neither tiny nor huge, in ASCII; tests and data tables are left out."""
    root = packages["libpython3.11-stdlib"] / "usr/lib/python3.11"
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        content = path.read_bytes() if path.is_file() else b""  # some are links out of the package
        if set(name.parts) & set(SKIPPED) or "sysconfigdata" in path.name or not content.isascii():
            continue
        if SHORTEST <= len(content) <= LONGEST:
            ast.parse(content)
            yield str(name), [content.decode().strip() + "\n"]
