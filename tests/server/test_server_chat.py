"""The API as its users meet it: through the official client, streamed and whole, with pictures and boxes."""

import json
import threading
import time

import openai
import pytest
from server_fakes import PATH, FakeEngine, ask, data_url, official, show

from puna.engine.constrain import Constraint

MESSAGES = [{"role": "user", "content": "Hello"}]


def test_whole_answer():
    with official(FakeEngine(lambda m: "Hello there.")) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello there."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.boxes == []
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 3, 8)
    assert answer.model == "tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_streams_while_it_is_made():
    with official(FakeEngine(lambda m: "one two three four", pause=0.1)) as client:
        times, text, reasons = [], "", []
        for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            text += chunk.choices[0].delta.content or ""
            times.append(time.monotonic())
            reasons.append(chunk.choices[0].finish_reason)
    assert text == "one two three four"
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert times[-1] - times[0] > 0.25, "the text came all at once"


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_chunk_only_when_asked(client, wanted):
    body = ask(stream=True, stream_options={"include_usage": wanted})
    lines = [line[6:] for line in client.post(PATH, json=body).text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    if wanted:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk for chunk in chunks)


def test_sampling_reaches_the_engine(client, engine):
    fields = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 3, "stop": ["x", "yz"], "n": 1,
        "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.5,
    }  # fmt: skip
    assert client.post(PATH, json=ask(**fields)).status_code == 200
    sampling = engine.submitted[-1][1]
    fields.pop("n")
    assert {name: getattr(sampling, name) for name in fields} == {**fields, "stop": ("x", "yz")}
    assert client.post(PATH, json=ask(logit_bias={"7": -5}, logprobs=True, top_logprobs=4)).status_code == 200
    assert (engine.submitted[-1][1].logit_bias, engine.submitted[-1][1].top_logprobs) == ({7: -5}, 4)
    assert client.post(PATH, json=ask(regex="a+")).status_code == 200
    assert engine.submitted[-1][1].constraint == Constraint("regex", "a+")
    assert client.post(PATH, json=ask(max_completion_tokens=9, stop="q")).status_code == 200
    assert (engine.submitted[-1][1].max_tokens, engine.submitted[-1][1].stop) == (9, ("q",))
    assert engine.submitted[-1][1].temperature == 0 and engine.submitted[-1][1].seed is None


def test_null_means_left_out(client):
    names = ("model", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n")
    assert client.post(PATH, json=ask(**dict.fromkeys(names))).status_code == 200


def test_length_is_a_finish_reason(client):
    choice = client.post(PATH, json=ask(max_tokens=2)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "Hello th")


def test_conversation_reaches_the_engine_in_order(client, engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "three"},
    ]
    assert client.post(PATH, json={"messages": messages}).status_code == 200
    got = [(m["role"], [part["text"] for part in m["content"]]) for m in engine.submitted[-1][0]]
    assert got == [("system", ["Be brief."]), ("user", ["one", "two"]), ("assistant", ["yes"]), ("user", ["three"])]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_pictures_arrive_opened_in_place(client, engine, kind):
    assert client.post(PATH, json=show(data_url(kind=kind, size=(9, 5)))).status_code == 200
    parts = engine.submitted[-1][0][0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    picture = parts[0]["image"]
    assert picture.size == (9, 5) and picture.mode == "RGB"
    red, green, blue = picture.getpixel((4, 2))
    assert red > 180 and green < 60 and blue < 60


ANSWER = (
    'A <box label="red &amp; cat">12,40,377,512</box> <box label="b">500,1,2,3</box>, <box label="dog">1,2,3,4</box>.'
)
BOXES = [
    {"label": "red & cat", "x1": 12, "y1": 40, "x2": 377, "y2": 512},
    {"label": "dog", "x1": 1, "y1": 2, "x2": 3, "y2": 4},
]


def test_boxes_beside_the_text():
    with official(FakeEngine(lambda m: ANSWER)) as client:
        message = client.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].message
        assert message.boxes == BOXES and message.content == ANSWER
        text, found = "", []
        for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
            text += chunk.choices[0].delta.content or ""
            for box in getattr(chunk.choices[0].delta, "boxes", []):
                found.append(box)
                assert text.count("</box>") >= len(found), "a box came before its text"
    assert text == ANSWER and found == BOXES


def test_models_and_health():
    engine = FakeEngine()
    with official(engine) as client:
        (model,) = client.models.list().data
        assert (model.id, model.object, model.parameters, model.active_parameters) == (
            "tiny",
            "model",
            12_345_678,
            4_100_000,
        )
        assert model.checkpoint == "0123456789abcdef" * 4 and model.context == 1000 and model.pictures is True
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError, match="other"):
            client.models.retrieve("other")
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.chat.completions.create(model="other", messages=MESSAGES)


def test_health_tells_whether_the_engine_lives(client, engine):
    assert client.get("/health").status_code == 200 and client.get("/health").json()["status"] == "ok"
    engine.alive = False
    assert client.get("/health").status_code == 503


def test_one_failing_request_fails_alone(client, engine):
    engine.script = lambda messages: RuntimeError("secret at 0xdead")
    error = client.post(PATH, json=ask()).json()["error"]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    lines = [line[6:] for line in client.post(PATH, json=ask(stream=True)).text.splitlines() if line]
    assert json.loads(lines[-2])["error"]["type"] == "server_error" and lines[-1] == "[DONE]"
    engine.script = lambda messages: "fine"
    assert client.post(PATH, json=ask()).json()["choices"][0]["message"]["content"] == "fine"
    assert client.app.state.places.taken == 0


def test_many_at_once_keep_their_answers_apart():
    engine = FakeEngine(lambda m: m[0]["content"][0]["text"] * 5, pause=0.002)
    answers = {}
    with official(engine) as client:

        def one(text):
            answers[text] = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])

        threads = [threading.Thread(target=one, args=(f"text {i} ",)) for i in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert {text: answer.choices[0].message.content for text, answer in answers.items()} == {t: t * 5 for t in answers}
    assert len(answers) == 16
