"""One pool of four gloo processes for all tests here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lifecycle"))

from puna.testing.distributed import Pool


@pytest.fixture(scope="session")
def pool():
    with Pool(4) as pool:
        yield pool
