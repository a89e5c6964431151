"""One whole, undisturbed life, that every disturbed one is measured against."""

import pytest
from lifecycle_helpers import puna


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run folder of `puna raise tiny.py`, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    out = puna(folder, "raise", "tiny.py")
    assert "goals met" in out and "report.html" in out
    return folder / "runs" / "tiny"
