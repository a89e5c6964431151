"""One whole, undisturbed life, that every disturbed one is measured against; how often a soak kills."""

import os

import pytest
from lifecycle_helpers import puna, start


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The run folder of `puna raise tiny.py`, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    out = puna(folder, "raise", "tiny.py", begin=start)  # with another hash seed than all others
    assert "goals met" in out and "report.html" in out
    return folder / "runs" / "tiny"


@pytest.fixture(params=[
    pytest.param(int(os.environ.get("PUNA_SOAK", "5")), id="some"),
    pytest.param(50, id="fifty", marks=pytest.mark.slow),
])  # fmt: skip
def kills(request):
    """Kills of a soak: five, PUNA_SOAK=N, or fifty with `-m slow`."""
    if request.node.get_closest_marker("slow") and "slow" not in (request.config.getoption("-m") or ""):
        pytest.skip("fifty kills take a quarter of an hour: -m slow, or PUNA_SOAK=N")
    return request.param
