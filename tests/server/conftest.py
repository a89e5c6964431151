"""A test client over the fake engine."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def engine():
    from server_fakes import FakeEngine

    return FakeEngine()


@pytest.fixture
def client(engine):
    from server_fakes import make_app
    from starlette.testclient import TestClient

    with TestClient(make_app(engine), raise_server_exceptions=False) as client:
        yield client
