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


@pytest.fixture(scope="session")
def real(tiny_processor):
    """A test client over a real engine with a small model that sees; `real.engine` is the engine's thread."""
    import torch
    from server_real import lively_model
    from starlette.testclient import TestClient

    from puna.engine import Engine, EngineThread
    from puna.serve import create_app

    torch.set_num_threads(1)
    with EngineThread(Engine(lively_model(tiny_processor, 2048), tiny_processor, max_batch=4)) as thread:
        app = create_app(thread, "tiny", "0" * 64, context=2048, tokenizer=tiny_processor.tokenizer)
        with TestClient(app, raise_server_exceptions=False) as client:
            client.engine = thread
            yield client


@pytest.fixture
def real_still_well(real):
    """After the test the real engine answers as before, and nothing runs in it."""
    from server_fakes import PATH, ask, until

    before = real.post(PATH, json=ask(max_tokens=3)).json()["choices"]
    yield
    assert real.get("/health").status_code == 200
    assert real.post(PATH, json=ask(max_tokens=3)).json()["choices"] == before
    until(lambda: not real.engine.engine.busy and real.app.state.places.taken == 0)


@pytest.fixture
def client(engine, tiny_processor):
    from server_fakes import make_app
    from starlette.testclient import TestClient

    with TestClient(make_app(engine, tokenizer=tiny_processor.tokenizer), raise_server_exceptions=False) as client:
        yield client
