"""One pool of four gloo processes for all tests here."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "lifecycle")]

from puna.testing.distributed import Pool  # noqa: E402


@pytest.fixture(scope="session")
def pool():
    with Pool(4) as pool:
        yield pool
