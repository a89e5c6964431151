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
def still_well(client, engine):
    """After the test the server still answers, and no place is taken."""
    from server_fakes import PATH, ask

    yield
    engine.script, engine.pause = (lambda messages: "Hello there."), 0.0
    assert client.get("/health").status_code == 200
    assert client.post(PATH, json=ask()).status_code == 200
    assert client.app.state.places.taken == 0


@pytest.fixture
def client(engine):
    from server_fakes import make_app
    from starlette.testclient import TestClient

    with TestClient(make_app(engine), raise_server_exceptions=False) as client:
        yield client
