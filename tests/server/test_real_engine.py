"""The whole way: the official client, a real socket, the server, the engine's thread, a small model that sees."""

import threading

import httpx
import openai
import pytest
import torch
from PIL import Image
from server_fakes import data_url, until
from server_real import serving

from puna.engine import Engine


@pytest.fixture(scope="module")
def server(tiny_processor):
    with serving(tiny_processor) as served:
        yield served


@pytest.fixture(autouse=True)
def quiet(server):
    """Every test leaves the server as it found it: nothing running, no place taken."""
    yield
    server.pause = 0.0
    until(lambda: not server.engine.busy and server.app.state.places.taken == 0)


def see(*pictures, text="What is this?"):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def noise(seed, size=(16, 16)):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def test_a_completion_is_the_engines_own_answer(server, tiny_processor):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the cat?"}]
    answer = server.ask(prompt)
    [alone] = Engine(server.engine.model, tiny_processor).generate([prompt], max_tokens=16)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (alone.text, "length") and alone.text
    assert answer.usage.prompt_tokens == alone.prompt_tokens and answer.usage.completion_tokens == 16
    assert choice.message.role == "assistant" and answer.model == "tiny"
    assert [model.id for model in server.client.models.list()] == ["tiny"]


@pytest.mark.parametrize("content", ["Where is the cat?", "Name a word.", "บิ 🙂 यह क्या है?"])
def test_a_stream_joined_is_the_whole_answer(server, content):
    whole = server.ask(content, max_tokens=40)
    chunks = list(server.ask(content, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert sum(bool(delta) for delta in deltas) > 5, "the answer came in one piece"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    first, again = whole.usage, chunks[-1].usage
    assert not chunks[-1].choices and again.total_tokens == first.total_tokens == again.prompt_tokens + 40
    cached = first.prompt_tokens_details.cached_tokens, again.prompt_tokens_details.cached_tokens
    assert cached[0] <= cached[1] < again.prompt_tokens  # the second time the prompt's whole chunks were known


def test_a_picture_is_seen_and_counted(server, tiny_processor):
    one, other, wide = noise(1), noise(2), noise(3, (40, 16))
    answers = [server.ask(see(data_url(picture))) for picture in (one, other)]
    assert answers[0].choices[0].message.content != answers[1].choices[0].message.content
    prompt = [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": "What is this?"}]}]
    [alone] = Engine(server.engine.model, tiny_processor).generate([prompt], max_tokens=16)
    assert answers[0].choices[0].message.content == alone.text
    without = server.ask("What is this?").usage.prompt_tokens
    for pictures in ((one,), (wide,), (one, wide)):
        seen = server.ask(see(*map(data_url, pictures)), max_tokens=1).usage.prompt_tokens
        assert seen - without == sum(tiny_processor.image.tokens(*picture.size) for picture in pictures)


def test_what_does_not_fit_is_refused_in_openais_words(server):
    for content, options in (("word " * 900, {}), ("hello", {"max_tokens": 500})):
        with pytest.raises(openai.BadRequestError) as caught:
            server.ask(content, **options)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])


def test_requests_at_the_same_time_share_steps_and_answer_as_alone(server):
    contents = ["Where is the cat?", "Name a word.", "O rato roeu a roupa."]
    alone = [server.text(content, 60) for content in contents]
    assert len(set(alone)) == 3
    server.pause, found = 0.02, [None] * 3
    del server.together[:]

    def ask(i):
        found[i] = server.text(contents[i], 60)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == alone
    assert max(server.together) == 3 and len(server.together) < 180, "they were answered one after the other"


def test_a_stop_string_ends_the_answer_before_it(server):
    whole = server.text("Where is the cat?", 60)
    stop = whole[20:24]
    before = whole[: whole.index(stop)]
    for options in ({"stop": stop}, {"stop": ["never in it", stop]}):
        choice = server.ask("Where is the cat?", 60, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == (before, "stop")
        chunks = [c.choices[0] for c in server.ask("Where is the cat?", 60, stream=True, **options)]
        assert "".join(c.delta.content or "" for c in chunks) == before, "a part of the stop string slipped out"
        assert chunks[-1].finish_reason == "stop"
    assert server.text("Where is the cat?", 60, stop="never in it") == whole


def test_a_seed_makes_chance_repeatable(server):
    draw = {"temperature": 1.0, "max_tokens": 30}
    first = server.text(seed=7, **draw)
    assert server.text(seed=7, **draw) == first
    assert "".join(c.choices[0].delta.content or "" for c in server.ask(seed=7, stream=True, **draw)) == first
    assert len({first, server.text(seed=8, **draw), server.text(seed=9, **draw), server.text(max_tokens=30)}) == 4
    assert server.text(seed=7, temperature=0, max_tokens=30) == server.text(seed=8, temperature=0, max_tokens=30)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_only_place(tiny_processor, stream):
    """One place in the batch, one in the server: the next request is answered although the first had just begun."""
    with serving(tiny_processor, max_batch=1, running=1, waiting=1) as server:
        server.pause = 0.02  # the whole first answer would take nine seconds
        if stream:
            chunks = server.ask(max_tokens=450, stream=True)
            assert next(iter(chunks)).choices
            until(lambda: server.engine.busy)
            with pytest.raises(openai.RateLimitError) as caught:
                server.ask(n=2)
            assert caught.value.code == "overloaded"
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                server.ask(max_tokens=450, timeout=1.5)
        until(lambda: server.app.state.places.taken == 0)
        assert len(server.text(max_tokens=4)) > 0
        assert len(server.aborted) == 1 and len(server.together) < 200


def test_a_stopped_engine_is_no_longer_healthy(tiny_processor):
    with serving(tiny_processor) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.thread.close()
        assert httpx.get(f"{server.url}/health").status_code == 503
        with pytest.raises(openai.APIStatusError) as caught:
            server.ask()
        assert caught.value.status_code == 503 and "stopped" in caught.value.message
