"""The engine: batches equal single answers equal plain forward passes; stops, aborts, failures, the thread."""

import threading
import time

import pytest
import torch
from PIL import Image

from puna.cli.main import main
from puna.convert.puna import save
from puna.engine import Engine, EngineThread, Prompt, Sampling
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig, VisionConfig
from puna.processor.video import read_video

C = 32


@pytest.fixture(scope="module")
def model(tiny_processor):
    """Random but sharp: greedy answers that differ from prompt to prompt, and no ties."""
    torch.set_num_threads(1)
    vision = VisionConfig(image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_width=32, adapter_width=32)
    model = Llama4(
        ModelConfig(
            vocab_size=tiny_processor.tokenizer.vocab_size, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8,
            expert_width=32, dense_width=32, n_experts=4, chunk=C, floor_scale=8, max_context=256,
            patch_token=tiny_processor.tokenizer.patch, vision=vision,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)
        model.tok_embeddings.weight.mul_(5)
        # A new model's head is zero, all tokens equally likely.
        model.output.weight.normal_(0, 0.14, generator=torch.Generator().manual_seed(0))
        model.output.weight[tiny_processor.tokenizer.bos :] = 0  # no control token is ever the likeliest
    return model


@pytest.fixture
def engine(model, tiny_processor):
    return Engine(model, tiny_processor, max_batch=8, prefill_tokens=64)


def picture(seed, size=(16, 16)):
    noise = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.byte().numpy())


def user(text, *pictures):
    parts = [{"type": "image", "image": p} for p in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


PROMPTS = [
    user("Hi"),
    user("Where is the cat? In the picture there is a red apple and a small house."),
    user("What is this?", picture(1)),
    user("The quick brown fox jumps over the lazy dog. " * 4),
    user("And this? " * 9, picture(2), picture(3, (32, 16))),
    user("Im Anfang war das Wort, und am Ende der Zeile steht ein Punkt."),
]


@torch.inference_mode()
def literal(engine, messages, n):
    """The greedy answer by whole forward passes without a cache: tokens and log-probabilities."""
    processor, model = engine.processor, engine.model
    encoded = processor.encode_chat(messages, generation_prompt=True)
    tokens, tiles = [int(t) for t in encoded.tokens], processor.tiles(encoded.pictures)
    banned = [id for id in processor.tokenizer.special.values() if id not in processor.tokenizer.stop_ids]
    out, logprobs = [], []
    for _ in range(n):
        raw = torch.log_softmax(model(torch.tensor([tokens + out]), tiles=tiles)[0, -1], -1)
        scores = raw.clone()
        scores[banned] = -torch.inf
        out.append(int(scores.argmax()))
        logprobs.append(float(raw[out[-1]]))
        if out[-1] in processor.tokenizer.stop_ids:
            break
    return out, logprobs


def drain(engine, limit=1000):
    """Steps until nothing runs; completions by id."""
    done = {}
    for _ in range(limit):
        if not engine.busy:
            return done
        done |= {event.id: event.completion for event in engine.step() if event.completion}
    raise AssertionError("the engine does not come to an end")


def test_a_batch_equals_literal_decoding(engine):
    """Prompts of 1 to 6 chunks, pictures cut by slices and borders, answers across borders, more prompts than rows."""
    engine = Engine(engine.model, engine.processor, max_batch=3, prefill_tokens=10)
    completions = engine.generate(PROMPTS, max_tokens=40)
    lengths = [c.prompt_tokens for c in completions]
    assert min(lengths) < C and max(lengths) > 2 * C, lengths
    for messages, completion in zip(PROMPTS, completions, strict=True):
        tokens, logprobs = literal(engine, messages, 40)
        assert completion.tokens == tokens
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(logprobs), atol=5e-5, rtol=0)
        text = [t for t in tokens if t not in engine.processor.tokenizer.stop_ids]
        assert completion.text == engine.processor.tokenizer.decode(text)
        assert completion.finish_reason == ("length" if len(text) == 40 else "stop")
        assert completion.prefill_seconds > 0 and completion.tokens_per_second > 0
    assert len({tuple(c.tokens) for c in completions}) == len(PROMPTS)
    assert not engine.busy and engine.stats()["cache_bytes_used"] > 0, "the prefix cache holds some"
    engine.prefix.clear()
    assert engine.stats()["cache_bytes_used"] == 0


def test_pictures_matter(engine):
    one, other = engine.generate([user("What is this?", picture(n)) for n in (1, 4)], max_tokens=8)
    assert one.prompt_tokens == other.prompt_tokens and one.logprobs != other.logprobs


def test_seeds_do_not_depend_on_the_batch(engine):
    options = dict(max_tokens=20, temperature=1.5, top_p=0.95)
    alone = engine.generate([PROMPTS[0]], seed=5, **options)[0]
    together = engine.generate(PROMPTS[::-1] + [PROMPTS[0]], seed=[1, 2, 3, 4, 5, 5, 6], **options)
    assert together[5].tokens == alone.tokens
    assert together[6].tokens != alone.tokens, "another seed"
    assert engine.generate([PROMPTS[0]], **options)[0].tokens != engine.generate([PROMPTS[0]], **options)[0].tokens
    greedy = engine.generate([PROMPTS[0]], max_tokens=20)[0].tokens
    assert engine.generate([PROMPTS[0]], max_tokens=20, temperature=1e-6, seed=1)[0].tokens == greedy != alone.tokens


def test_stop_strings_across_token_borders(engine):
    free = engine.generate([PROMPTS[1]], max_tokens=40)[0]
    pieces = list(engine.stream(PROMPTS[1], max_tokens=40))
    assert "".join(pieces) == free.text and len(pieces) > 10
    middle = len("".join(pieces[:6]))
    stop = free.text[middle - 1 : middle + 1]  # the end of one piece and the beginning of the next
    first = free.text.index(stop)
    got = engine.generate([PROMPTS[1]], max_tokens=40, stop=["never in the text", stop])[0]
    assert got.text == free.text[:first] and got.finish_reason == "stop"
    assert len(got.tokens) < len(free.tokens) and got.tokens == free.tokens[: len(got.tokens)]
    streamed = ""
    for piece in engine.stream(PROMPTS[1], max_tokens=40, stop=stop):
        streamed += piece
        assert free.text[:first].startswith(streamed), "no part of the stop string is ever shown"
    assert streamed == got.text


def test_stop_ids_and_stop_tokens(engine, tiny_processor, monkeypatch):
    free = engine.generate([PROMPTS[1]], max_tokens=20)[0]
    third = free.tokens[2]
    got = engine.generate([PROMPTS[1]], max_tokens=20, stop_ids=[third])[0]
    assert got.tokens == free.tokens[: free.tokens.index(third) + 1] and got.finish_reason == "stop"
    assert got.text == tiny_processor.tokenizer.decode(got.tokens[:-1])
    eot, head = tiny_processor.tokenizer.eot, engine.model.head
    monkeypatch.setattr(engine.model, "head", lambda h: head(h).index_fill(-1, torch.tensor([eot]), 1e4))
    ended = engine.generate([PROMPTS[1]], max_tokens=20)[0]
    assert (ended.tokens, ended.text, ended.finish_reason) == ([eot], "", "stop")


def test_control_tokens_are_never_said(engine, tiny_processor, monkeypatch):
    """Even a model that wants to: image layout and headers can't be sampled; without the ban they are."""
    special = tiny_processor.tokenizer.special.values()
    layout = torch.tensor([t for t in special if t not in tiny_processor.tokenizer.stop_ids])
    head = engine.model.head
    monkeypatch.setattr(
        engine.model,
        "head",
        lambda h: head(h).index_add(-1, layout, head(h).new_full((*h.shape[:-1], len(layout)), 50.0)),
    )
    for options in ({}, {"temperature": 2.0, "seed": 1}, {"temperature": 2.0, "top_k": 5, "seed": 1}):
        tokens = engine.generate([PROMPTS[1]], max_tokens=10, **options)[0].tokens
        assert not set(tokens) & set(layout.tolist())
    engine._banned_V = None
    completion = engine.generate([PROMPTS[1]], max_tokens=3)[0]
    assert set(completion.tokens) <= set(layout.tolist())
    assert completion.text == "", "and if one came, it would not be text"


def test_continuous_batching(engine):
    """Requests join while others decode; each answers as if alone; nobody waits for the slowest."""
    alone = [engine.generate([p], max_tokens=n)[0] for p, n in zip(PROMPTS, (30, 4, 12, 20, 8, 16), strict=True)]
    engine = Engine(engine.model, engine.processor, max_batch=2, prefill_tokens=16)
    ids, done = [], {}
    for step in range(200):
        if step % 3 == 0 and len(ids) < len(PROMPTS):
            wanted = Sampling(max_tokens=(30, 4, 12, 20, 8, 16)[len(ids)])
            ids.append(engine.add_request(PROMPTS[len(ids)], wanted))
        for event in engine.step():
            if event.completion:
                done[event.id] = (event.completion, step)
        assert len(engine.scheduler.active) <= 2
    assert [done[id][0].tokens for id in ids] == [c.tokens for c in alone]
    assert done[ids[1]][1] < done[ids[0]][1] and not len(engine.scheduler)


def test_abort_frees_the_place_at_once(engine):
    """While waiting, in the middle of a prompt, while decoding, twice; the others notice nothing."""
    expected = engine.generate([PROMPTS[0]], max_tokens=30)[0]
    engine = Engine(engine.model, engine.processor, max_batch=3, prefill_tokens=8)
    waiting_room = [PROMPTS[1], PROMPTS[0], PROMPTS[3], PROMPTS[5]]
    running, kept, filling, waiting = [engine.add_request(p, Sampling(max_tokens=30)) for p in waiting_room]
    request = engine._requests[filling]
    while engine.scheduler.decoding < 2 or not request.fed:
        engine.step()
    assert 0 < request.fed < request.target and engine._requests[waiting].row == -1
    for id in (filling, waiting, running):
        assert engine.abort(id) and not engine.abort(id)
    assert len(engine.scheduler) == 1 and request.pages == [] and request.row == -1
    done = drain(engine)
    assert {id: done[id].finish_reason for id in (filling, waiting, running)} == dict.fromkeys(
        (filling, waiting, running), "abort"
    )
    assert done[kept].tokens == expected.tokens
    assert engine.abort("nobody") is False


def test_closing_a_stream_aborts(engine):
    stream = engine.stream(PROMPTS[1], max_tokens=100)
    assert next(stream) and engine.busy
    stream.close()
    assert not engine.busy and engine.pages.free == engine.pages.total - engine.prefix.held
    with pytest.raises(PunaError, match="unexpected keyword argument 'temprature'"):
        next(engine.stream(PROMPTS[1], temprature=1))


@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["raise", "nan"])
def test_one_failure_is_that_requests_alone(engine, monkeypatch, when, how):
    """A token that breaks the model, in a prompt or in an answer: the others' answers stay what they were."""
    expected = engine.generate(PROMPTS, max_tokens=12)
    bad = 2
    poison = expected[bad].tokens[4] if when == "decode" else engine.processor.tokenizer.image_start
    hidden, encode = engine.model.hidden, engine.model.image_features
    engine.prefix.clear()  # what is known is not computed again

    def breaking(tokens_BT, *args, **options):
        out = hidden(tokens_BT, *args, **options)
        hit = (tokens_BT == poison).any(1)
        if how == "raise" and hit.any():
            raise RuntimeError("the model broke")
        return out.masked_fill(hit[:, None, None], torch.nan)

    monkeypatch.setattr(engine.model, "hidden", breaking)
    if (when, how) == ("prefill", "nan"):  # NaN that goes through the model and into the cache
        monkeypatch.setattr(engine.model, "image_features", lambda tiles: encode(tiles) * torch.nan)
    got = engine.generate(PROMPTS, max_tokens=12, errors="return")
    broken = [i for i, c in enumerate(got) if c.error is not None]
    hurt = [i for i, c in enumerate(expected) if poison in c.tokens[:-1]] if when == "decode" else [2, 4]
    assert broken == hurt and bad in broken and len(broken) < len(PROMPTS)
    for i, completion in enumerate(got):
        if i in broken:
            assert completion.finish_reason == "error"
            assert isinstance(completion.error, RuntimeError if how == "raise" else FloatingPointError)
        else:
            assert completion.tokens == expected[i].tokens
    with pytest.raises((RuntimeError, FloatingPointError)):
        engine.generate(PROMPTS, max_tokens=12)
    assert not engine.busy, "what was not finished has left"
    monkeypatch.undo()
    assert [c.tokens for c in engine.generate(PROMPTS, max_tokens=12)] == [c.tokens for c in expected]


def test_a_listener_that_fails_ends_its_own_request(engine):
    def sink(event):
        raise OSError("gone")

    engine.add_request(PROMPTS[0], Sampling(max_tokens=5), sink=sink)
    id = engine.add_request(PROMPTS[1], Sampling(max_tokens=5))
    assert len(drain(engine)[id].tokens) == 5 and not engine.busy


def test_context_limits(engine, model, tiny_processor):
    small = Engine(model, tiny_processor, max_context=40)
    length = len(small.prepare(PROMPTS[0]).tokens)
    with pytest.raises(PunaError, match="the context holds 40"):
        small.prepare([1] * 40)
    with pytest.raises(PunaError, match="do not fit in the context of 40"):
        small.add_request(PROMPTS[0], Sampling(max_tokens=41 - length))
    full = small.generate([PROMPTS[0]], max_tokens=None)[0]
    assert len(full.tokens) == 40 - length and full.finish_reason == "length"
    assert small.generate([[1] * 39], max_tokens=1)[0].finish_reason == "length"
    mixed = small.generate([PROMPTS[0], PROMPTS[3], [1, 2]], max_tokens=3, errors="return")
    assert [c.finish_reason for c in mixed] == ["length", "error", "length"]
    assert isinstance(mixed[1].error, PunaError)
    for value in (1, 257):
        with pytest.raises(PunaError, match="^max_context"):
            Engine(model, tiny_processor, max_context=value)
    with pytest.raises(PunaError, match="^max_batch"):
        Engine(model, tiny_processor, max_batch=0)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "non-empty"),
        ("hello", "list of messages"),
        ([1.5], "integer token ids"),
        ([[1], [2]], "integer token ids"),
        ([[1], [2, 3]], "list of messages or token ids"),
        ([2**70], "integer token ids"),
        ([-1], "must lie in"),
        ([10**6], "must lie in"),
        ([{"role": "king", "content": "x"}], "role"),
        (None, "integer token ids"),
    ],
)
def test_bad_prompts(engine, prompt, says):
    with pytest.raises(PunaError, match=says):
        engine.prepare(prompt)
    assert not engine.busy


def test_pictures_and_patch_tokens_must_agree(engine, tiny_processor):
    patch = tiny_processor.tokenizer.patch
    with pytest.raises(PunaError, match="1 patch tokens"):
        engine.prepare([1, patch])
    with pytest.raises(PunaError, match="its pictures make 4"):
        engine.prepare(Prompt([1, patch], torch.zeros(1, 3, 16, 16)))
    encoded = tiny_processor.encode_chat(PROMPTS[2], generation_prompt=True)
    tiles = tiny_processor.tiles(encoded.pictures)
    ways = [PROMPTS[2], encoded, Prompt(encoded.tokens, tiles)]
    assert len({tuple(c.tokens) for c in engine.generate(ways, max_tokens=5)}) == 1


def test_duplicate_ids_and_wrong_calls(engine):
    engine.add_request(PROMPTS[0], id="x")
    with pytest.raises(PunaError, match="is running"):
        engine.add_request(PROMPTS[0], id="x")
    engine.abort_all()
    assert drain(engine) == {} and not engine.busy
    with pytest.raises(PunaError, match="one more list"):
        engine.generate(PROMPTS[0])
    with pytest.raises(PunaError, match="^seed"):
        engine.generate(PROMPTS[:2], seed=[1])
    with pytest.raises(PunaError, match="^errors"):
        engine.generate(PROMPTS[:1], errors="ignore")
    assert engine.generate([]) == []


def test_without_a_tokenizer(model):
    engine = Engine(model)
    one, two = engine.generate([[1, 2, 3], torch.tensor([1, 2, 3])], max_tokens=4)
    assert one.tokens == two.tokens and one.text == "" and len(one.tokens) == 4
    with pytest.raises(PunaError, match="no tokenizer"):
        engine.prepare(PROMPTS[0])
    with pytest.raises(PunaError, match="^stop: .*use stop_ids"):
        engine.add_request([1], Sampling(stop="x"))


def test_the_model_keeps_its_mode_and_random_state(engine):
    state = torch.random.get_rng_state()
    engine.model.train()
    try:
        trained = engine.generate([PROMPTS[0]], max_tokens=5, temperature=1.0, seed=1)[0].tokens
        assert engine.model.training
    finally:
        engine.model.eval()
    assert trained == engine.generate([PROMPTS[0]], max_tokens=5, temperature=1.0, seed=1)[0].tokens
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_idle_engine_gives_a_large_cache_back(engine, monkeypatch):
    engine.generate([PROMPTS[0]], max_tokens=3)
    assert engine.cache.nbytes > 0
    monkeypatch.setattr("puna.engine.engine.KEEP_BYTES", 0)
    engine.generate([PROMPTS[0]], max_tokens=3)
    assert engine.cache.nbytes == 0


# ---- the thread


def test_thread_answers_many_callers(engine):
    expected = [engine.generate([p], max_tokens=15)[0] for p in PROMPTS]
    got = [None] * len(PROMPTS)

    def ask(i):
        handle = served.submit(PROMPTS[i], Sampling(max_tokens=15))
        assert handle.prompt_tokens == expected[i].prompt_tokens
        events = list(handle)
        assert events[-1].completion.text == "".join(e.text for e in events)
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1) and events[-1].token is None
        got[i] = events[-1].completion

    with EngineThread(engine) as served:
        callers = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
        assert served.alive
    assert [c.tokens for c in got] == [c.tokens for c in expected]
    assert not served.alive
    with pytest.raises(PunaError, match="has been stopped"):
        served.submit(PROMPTS[0])


def test_thread_abort_refuse_fail_close(engine, monkeypatch):
    served = EngineThread(engine)
    with pytest.raises(PunaError, match="context"):
        served.submit(PROMPTS[0], Sampling(max_tokens=10_000))
    handle = served.submit(PROMPTS[0], Sampling(max_tokens=200))
    events = iter(handle)
    next(events)
    began = time.monotonic()
    handle.abort()
    assert [e.finish_reason for e in events][-1] == "abort" and time.monotonic() - began < 5
    handle.abort()
    assert list(handle) == [], "an answer is read once"

    real = engine.step
    broken = threading.Event()

    def step():
        if not broken.is_set():
            broken.set()
            raise RuntimeError("a defect")
        return real()

    monkeypatch.setattr(engine, "step", step)
    with pytest.raises(RuntimeError, match="a defect"):
        list(served.submit(PROMPTS[0], Sampling(max_tokens=5)))
    assert served.alive and list(served.submit(PROMPTS[0], Sampling(max_tokens=5)))[-1].finish_reason

    handle = served.submit(PROMPTS[0], Sampling(max_tokens=200))
    served.close()
    assert list(handle)[-1].finish_reason == "abort" and not served.alive
    served.close()


def test_generate_sees_a_video(model, tiny_processor, tmp_path, capsys):
    """`puna generate --video` answers as the engine does to the frames behind their times, and to other frames not."""
    save(model, tiny_processor, tmp_path / "model")
    pages = [picture(i, (24, 24)) for i in range(9)]
    pages[0].save(tmp_path / "film.webp", save_all=True, append_images=pages[1:], duration=700, lossless=True)

    def said(frames):
        words = ["generate", str(tmp_path / "model"), "What is it?", "--video", str(tmp_path / "film.webp"),
                 "--frames", str(frames), "--max-tokens", "12"]  # fmt: skip
        assert main(words) == 0
        return capsys.readouterr().out

    parts = []
    for frame in read_video(tmp_path / "film.webp", 3, side=16):
        parts += [{"type": "text", "text": f"[{frame.time}]"}, {"type": "image", "image": frame.picture}]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}
    expected = "".join(Engine(model, tiny_processor, max_batch=1).stream([asked], max_tokens=12, temperature=0.0))
    assert len(parts) == 6 and said(3) == expected + "\n" != said(2)


def test_the_commands_build_the_engine_that_was_asked_for(model, tiny_processor, tmp_path, monkeypatch, capsys):
    """Its settings by flags; the same greedy answer with all of them; what can't be combined is refused by name."""
    path, built = str(tmp_path / "model"), []
    save(model, tiny_processor, tmp_path / "model")
    real = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: (built.append(k), real(self, *a, **k))[1])
    words = ["generate", path, "What is it?", "--max-tokens", "12"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    flags = ["--batch-invariant", "--cache-mb", "64", "--prefix-cache-mb", "0", "--speculate", "3", "--draft", path]
    assert main([*words, *flags]) == 0
    assert capsys.readouterr().out == plain
    draft = built[-1].pop("draft")
    assert draft.config == model.config and built == [
        {}, {"batch_invariant": True, "cache_bytes": 2**26, "prefix_cache_bytes": 0, "speculate": 3}
    ]  # fmt: skip
    assert main([*words, "--draft", path]) == 0 and capsys.readouterr().out == plain
    assert list(built[-1]) == ["draft"], "how many it guesses is the engine's default"
    for refused, said in (
        (["--prefix-cache-mb", "-1"], "prefix_cache_bytes"),
        (["--backend", "transformers", "--speculate", "2"], "--backend transformers has no speculate"),
    ):  # fmt: skip
        assert main([*words, *refused]) != 0 and said in capsys.readouterr().err
