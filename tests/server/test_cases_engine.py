"""Cases 73 to 81 of serving-and-evaluation.md F.4: the engine, its end, and files of strangers.

77 (SIGTERM) needs a process of its own: test_server_stop.py. 82 to 85 are the page's: tests/page.
"""

import json
import threading

import httpx
import openai
import pytest
import torch
from server_fakes import PATH, ask, refused, until
from server_real import lively_model, serving
from starlette.testclient import TestClient

from puna.convert import export_hf
from puna.engine import Engine
from puna.engine.sampler import Sampling
from puna.errors import PunaError
from puna.serve import create_app
from puna.serve.limits import Limits
from puna.serve.run import load_puna

HELLO = [{"role": "user", "content": "Where is the cat?"}]


@pytest.mark.usefixtures("real_still_well")
def test_73_a_request_that_raises_inside_the_model_fails_alone(real, monkeypatch):
    engine = real.engine.engine
    whole, forward = real.post(PATH, json=ask("Name a word.", max_tokens=8)).json()["choices"], engine.model.hidden
    poison = 7

    def hidden(tokens, **options):
        if bool((tokens == poison).any()):
            raise RuntimeError("a secret of the machine at 0x7f00")
        return forward(tokens, **options)

    monkeypatch.setattr(engine.model, "hidden", hidden)
    found = {}

    def one(name, **fields):
        path = "/v1/completions" if "prompt" in fields else PATH
        found[name] = real.post(path, json=fields)

    threads = [
        threading.Thread(target=one, args=("bad",), kwargs={"prompt": [1, 2, poison], "max_tokens": 3}),
        threading.Thread(target=one, args=("good",), kwargs=ask("Name a word.", max_tokens=8)),
    ]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    error = refused(found["bad"], 500)
    assert "secret" not in error["message"] and error["type"] == "server_error"
    assert found["good"].json()["choices"] == whole
    stream = real.post("/v1/completions", json={"prompt": [1, poison], "stream": True}).text
    assert '"server_error"' in stream and stream.rstrip().endswith("[DONE]")


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6, 10])
def test_75_aborting_at_any_moment_frees_the_place(tiny_processor, steps):
    """Steps 0 to 4: within the prompt (slices of 16 tokens, chunks of 32), then at the first tokens and over a chunk's
    border; a request beside it goes on as if it were alone, and so does the next one in that place."""
    engine = Engine(lively_model(tiny_processor), tiny_processor, max_batch=2, prefill_tokens=16)
    long = [{"role": "user", "content": "Where is the cat in the picture? " * 4}]
    [alone] = engine.generate([HELLO], max_tokens=12)
    events = []
    engine.add_request(HELLO, Sampling(max_tokens=12), "other", events.append)
    engine.add_request(long, Sampling(max_tokens=40), "leaves", lambda event: None)
    for _ in range(steps):
        engine.step()
    assert engine.abort("leaves") and not engine.abort("leaves")
    while engine.busy:
        engine.step()
    assert events[-1].completion.tokens == alone.tokens
    assert engine.generate([HELLO, long], max_tokens=12)[0].tokens == alone.tokens
    assert not engine.scheduler.active and not engine.busy


@pytest.mark.usefixtures("real_still_well")
def test_76_no_client_can_name_a_request(real, tiny_processor):
    """Ids are the server's own, so equal ones in two requests' headers mean nothing; in a body they are unknown fields.
    The engine itself refuses an id that is in use."""
    same = {"x-request-id": "1"}
    answers = [real.post(PATH, json=ask(max_tokens=3), headers=same).json() for _ in range(2)]
    assert answers[0]["id"] != answers[1]["id"] and answers[0]["choices"] == answers[1]["choices"]
    refused(real.post(PATH, json=ask(request_id="1")), 400, "request_id")
    engine = Engine(lively_model(tiny_processor), tiny_processor)
    engine.add_request(HELLO, id="1")
    with pytest.raises(PunaError, match="ids must differ"):
        engine.add_request(HELLO, id="1")


# ---------------------------------------------------------------- files of strangers
@pytest.fixture
def export(tiny_processor, tmp_path):
    folder = tmp_path / "export"
    export_hf(lively_model(tiny_processor), tiny_processor, folder)
    return folder


def serve_once(folder, **fields):
    """The answer of a server of this folder, and of its /health."""
    thread, facts = load_puna(folder, Limits())
    with thread:
        client = TestClient(create_app(thread, "tiny", **facts), raise_server_exceptions=False)
        return client.post(PATH, json=ask(max_tokens=4, **fields)), client.get("/health")


def test_78_pickles_are_not_read(export, tmp_path):
    assert serve_once(export)[0].status_code == 200
    weights = next(export.glob("*.safetensors"))
    torch.save({"x": torch.zeros(1)}, export / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(PunaError, match="safetensors"):
        load_puna(export, Limits())


@pytest.mark.parametrize("damage", ["header length", "shape", "truncated", "offsets"])
def test_79_lying_weights_are_refused(export, damage):
    weights = next(export.glob("*.safetensors"))
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = next(n for n in header if n.endswith("q_proj.weight"))
    if damage == "header length":
        data = (2**60).to_bytes(8, "little") + data[8:]
    elif damage == "truncated":
        data = data[:-100]
    else:
        if damage == "shape":
            header[name]["shape"] = [header[name]["shape"][0] * header[name]["shape"][1]]
        else:
            header[name]["data_offsets"][1] += 2**40
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + rest
    weights.write_bytes(data)
    with pytest.raises(PunaError):
        load_puna(export, Limits())


def test_79_a_model_of_nan_fails_requests_and_nothing_else(tiny_processor):
    model = lively_model(tiny_processor)
    with torch.no_grad():
        model.output.weight.fill_(torch.nan)
    with serving(tiny_processor, model=model) as server:
        with pytest.raises(openai.InternalServerError):
            server.ask()
        assert httpx.get(f"{server.url}/health").status_code == 200
        until(lambda: server.app.state.places.taken == 0)


def test_80_a_models_own_template_is_never_run(export):
    """Prompts are put together by our own code; a template in the folder is for other software."""
    before = serve_once(export)[0].json()["choices"]
    evil = "{% for i in range(10**12) %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endfor %}"
    (export / "chat_template.jinja").write_text(evil)
    settings = json.loads((export / "tokenizer_config.json").read_text())
    (export / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": evil}))
    answer, health = serve_once(export)
    assert answer.json()["choices"] == before and health.status_code == 200
    thread, facts = load_puna(export, Limits())
    with thread:
        refused(TestClient(create_app(thread, "tiny", **facts)).post(PATH, json=ask(chat_template=evil)), 400)


def test_81_a_million_added_tokens_are_refused(export):
    spec = json.loads((export / "tokenizer.json").read_text())
    spec["added_tokens"].append("HERE")
    million = ", ".join(f'{{"id": {10_000 + i}, "content": "<|x{i}|>"}}' for i in range(10**6))
    (export / "tokenizer.json").write_text(json.dumps(spec).replace('"HERE"', million))
    with pytest.raises(PunaError, match="control tokens"):
        load_puna(export, Limits())


def test_74_more_than_memory_holds_waits_its_turn(tiny_processor):
    """A cache with room for little more than one long answer: eight at once are all answered, as each alone."""
    asked = [f"Where is the cat number {i}? " * 3 for i in range(8)]
    with serving(tiny_processor, max_batch=8) as server:
        alone = [server.text(text, 60) for text in asked]
        room = server.engine.stats()["cache_bytes"]
    found = [None] * 8
    with serving(tiny_processor, max_batch=8, engine={"cache_bytes": max(room // 4, 2**16)}) as server:
        def one(i):
            found[i] = server.text(asked[i], 60)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join(120) for thread in threads]
        assert httpx.get(f"{server.url}/health").status_code == 200
    assert found == alone

