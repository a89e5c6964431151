"""`puna serve --engine vllm` over a double of vLLM's interface: what it is asked, and what becomes of its answers. With
vLLM itself: `pytest -m vllm` (docs/serving.md)."""

import json
import sys
import types
from dataclasses import dataclass, field

import pytest
from server_fakes import PATH, ask, data_url, refused, show
from server_real import lively_model
from starlette.testclient import TestClient

from puna.convert import export_hf
from puna.errors import PunaError
from puna.serve import create_app
from puna.serve.limits import Limits
from puna.serve.run import serve
from puna.serve.vllm import load_vllm


@dataclass
class Recorded:
    """Takes any keyword arguments as attributes."""

    fields: dict = field(default_factory=dict)

    def __init__(self, **fields):
        self.fields = fields
        self.__dict__.update(fields)


class FakeLLM:
    """vLLM's AsyncLLM, as far as it is used: answers with the ids of "one two"."""

    asked: list = []
    aborted: list = []

    def __init__(self, arguments, ids):
        self.arguments, self.ids, self.errored = arguments, ids, False
        self.model_config = types.SimpleNamespace(max_model_len=256)

    async def generate(self, prompt, parameters, id):
        self.asked.append((prompt, parameters))
        for i, token in enumerate(self.ids):
            chosen = {token: types.SimpleNamespace(logprob=-0.5), 7: types.SimpleNamespace(logprob=-1.5)}
            done = "stop" if i == len(self.ids) - 1 else None
            answer = types.SimpleNamespace(token_ids=[token], text=f"t{i} ", logprobs=[chosen], finish_reason=done)
            yield types.SimpleNamespace(outputs=[answer], num_cached_tokens=3)

    async def abort(self, id):
        self.aborted.append(id)

    def shutdown(self):
        self.errored = True


@pytest.fixture
def vllm(tiny_processor, monkeypatch):
    ids = tiny_processor.tokenizer.encode("one two")
    engine = types.SimpleNamespace(from_engine_args=lambda arguments: FakeLLM(arguments, ids))
    FakeLLM.asked, FakeLLM.aborted = [], []
    modules = {
        "vllm": {"SamplingParams": Recorded}, "vllm.engine": {}, "vllm.engine.arg_utils": {"AsyncEngineArgs": Recorded},
        "vllm.sampling_params": {"StructuredOutputsParams": Recorded,
                                 "RequestOutputKind": types.SimpleNamespace(DELTA="delta")},
        "vllm.v1": {}, "vllm.v1.engine": {}, "vllm.v1.engine.async_llm": {"AsyncLLM": engine},
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return ids


def test_requests_reach_vllm_and_answers_come_back(vllm, tiny_processor, tmp_path):
    export_hf(lively_model(tiny_processor), tiny_processor, tmp_path / "model")
    thread, facts = load_vllm(tmp_path / "model", Limits(running=5, pictures=3))
    tokenizer = tiny_processor.tokenizer
    try:
        assert thread.engine.arguments.max_num_seqs == 5 and thread.engine.arguments.block_size == 32  # the chunk's
        assert thread.engine.arguments.limit_mm_per_prompt == {"image": 3} and facts["context"] == 256
        client = TestClient(create_app(thread, "tiny", **facts))
        fields = {"temperature": 0.5, "min_p": 0.1, "seed": 3, "stop": "x", "frequency_penalty": 1, "max_tokens": 9,
                  "logit_bias": {"7": 2}, "logprobs": True, "top_logprobs": 2, "regex": "a+"}  # fmt: skip
        body = client.post(PATH, json=ask("Hi <|eot|>", **fields)).json()
        choice = body["choices"][0]
        assert choice["message"]["content"] == "".join(f"t{i} " for i in range(len(vllm)))
        assert [e["logprob"] for e in choice["logprobs"]["content"]] == [-0.5] * len(vllm)
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
        prompt, parameters = FakeLLM.asked[-1]
        expected = tiny_processor.encode_chat([{"role": "user", "content": "Hi <|eot|>"}], generation_prompt=True)
        assert prompt == {"prompt_token_ids": expected.tokens.tolist()}
        assert (parameters.temperature, parameters.min_p, parameters.seed, parameters.max_tokens) == (0.5, 0.1, 3, 9)
        assert parameters.stop == ["x"] and parameters.structured_outputs.regex == "a+"
        assert parameters.logit_bias[7] == 2 and parameters.logit_bias[tokenizer.header_start] == -100
        assert client.post(PATH, json=show(data_url(size=(40, 16)))).status_code == 200
        prompt, _ = FakeLLM.asked[-1]
        assert prompt["prompt_token_ids"].count(tokenizer.image) == 1 and len(prompt["multi_modal_data"]["image"]) == 1
        assert not {tokenizer.patch, tokenizer.image_start, tokenizer.image_end} & set(prompt["prompt_token_ids"])
        refused(client.post(PATH, json=ask("a" * 900)), 400, "messages", "context")
        assert client.get("/metrics").status_code == 200
    finally:
        thread.close()


def test_what_vllm_cannot_serve_is_said(tmp_path, tiny_processor, monkeypatch):
    with pytest.raises(PunaError, match="puna convert"):
        load_vllm(tmp_path, Limits())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(PunaError, match="'llama' model"):
        load_vllm(tmp_path, Limits())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4"}))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PunaError, match="not installed"):
        load_vllm(tmp_path, Limits())
    for path in (tmp_path / "a.gguf", tmp_path):
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        with pytest.raises(PunaError, match="GGUF is not served"):
            serve(path, port=0)
