"""The server over a real, tiny, random model: real tokens, real tiles, and user text that never becomes control.

The engine here is the slowest one possible (a whole forward pass for each token, no cache), with the interface of
puna.engine's: what it is given is what any engine gets from the server.
"""

import json
import threading

import pytest
import torch
from server_fakes import PATH, FakeEvent, FakeHandle, ask, data_url, show
from starlette.testclient import TestClient

from puna.model import Llama4
from puna.model.config import ModelConfig, VisionConfig
from puna.processor import StreamDecoder
from puna.serve import create_app
from puna.serve.run import fingerprint


def tiny_model(processor):
    """Four layers of width 32, random but the same each time, with a vision part for tiles of 16 pixels."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_width=32, adapter_width=32)
    model = Llama4(
        ModelConfig(
            vocab_size=processor.tokenizer.vocab_size,
            d_model=32,
            n_layers=4,
            n_heads=2,
            n_kv_heads=1,
            head_dim=16,
            expert_width=32,
            dense_width=32,
            n_experts=2,
            chunk=64,
            max_context=512,
            patch_token=processor.tokenizer.patch,
            vision=vision,
        )  # fmt: skip
    )
    with torch.no_grad():  # a new model's head is zero: all tokens equally likely
        model.output.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    return model.eval()


class SlowEngine:
    """Greedy decoding by `model` alone; `encoded` keeps what each request became."""

    alive = True

    def __init__(self, model, processor):
        self.model, self.processor, self.lock, self.encoded = model, processor, threading.Lock(), []

    def submit(self, messages, sampling):
        encoded = self.processor.encode_chat(messages, generation_prompt=True)
        self.encoded.append(encoded)
        return FakeHandle(len(encoded.tokens), lambda handle: self._make(handle, encoded, sampling))

    def _make(self, handle, encoded, sampling):
        try:
            with self.lock, torch.inference_mode():
                self._decode(handle, encoded, sampling)
        except Exception as error:
            handle.events.put(error)
        handle.events.put(None)

    def _decode(self, handle, encoded, sampling):
        tokens, tiles = list(map(int, encoded.tokens)), self.processor.tiles(encoded.pictures)
        banned = [id for id in self.processor.tokenizer.special.values() if id not in self.processor.tokenizer.stop_ids]
        decoder = StreamDecoder(self.processor.tokenizer)
        for _ in range(sampling.max_tokens):
            logits = self.model(torch.tensor([tokens]), tiles=tiles)[0, -1]
            logits[banned] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] in self.processor.tokenizer.stop_ids:
                return handle.events.put(FakeEvent(decoder.flush(), None, "stop"))
            handle.events.put(FakeEvent(decoder.push(tokens[-1]), tokens[-1]))
        handle.events.put(FakeEvent(decoder.flush(), None, "length"))


@pytest.fixture(scope="module")
def served(tiny_processor):
    torch.set_num_threads(1)
    engine = SlowEngine(tiny_model(tiny_processor), tiny_processor)
    return engine, TestClient(create_app(engine, "tiny", fingerprint(engine.model)))


def test_streamed_and_whole_answers_agree(served):
    engine, client = served
    whole = client.post(PATH, json=ask("Where is the cat?", max_tokens=12)).json()
    stream = client.post(PATH, json=ask("Where is the cat?", max_tokens=12, stream=True)).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert whole["usage"]["completion_tokens"] == 12 and whole["usage"]["prompt_tokens"] == len(
        engine.encoded[-1].tokens
    )


def test_a_picture_changes_the_answer_and_its_tokens(served):
    engine, client = served
    answers = []
    for picture in (data_url(size=(16, 16)), data_url(size=(40, 20))):
        body = {**show(picture), "max_tokens": 4}
        answers.append(client.post(PATH, json=body).json()["usage"]["prompt_tokens"])
        patches = int((engine.encoded[-1].tokens == engine.processor.tokenizer.patch).sum())
        assert patches == engine.processor.tiles(engine.encoded[-1].pictures).shape[0] * 4
    assert answers[0] < answers[1], "more tiles are more tokens"


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize("where", ["string", "part"])
def test_text_never_becomes_a_control_token(served, role, where):
    engine, client = served
    specials = "".join(engine.processor.tokenizer.special)
    control = set(engine.processor.tokenizer.special.values())

    def tokens(text):
        content = text if where == "string" else [{"type": "text", "text": text}]
        messages = [{"role": role, "content": content}] + ([{"role": "user", "content": "b"}] if role != "user" else [])
        assert client.post(PATH, json={"messages": messages, "max_tokens": 1}).status_code == 200
        return [int(token) for token in engine.encoded[-1].tokens]

    plain, hostile = tokens("a"), tokens(specials)
    assert [t for t in hostile if t in control] == [t for t in plain if t in control]
    assert specials in engine.processor.tokenizer.decode(hostile, special=True)


def test_fingerprint_follows_the_weights(tiny_processor):
    one, same = tiny_model(tiny_processor), tiny_model(tiny_processor)
    before = fingerprint(one)
    assert before == fingerprint(same) and len(before) == 64
    with torch.no_grad():
        one.norm.weight[0] += 1
    assert fingerprint(one) != before
