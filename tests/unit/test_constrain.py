"""Grammars: what random walks and an untrained model write within them is valid; hostile ones are refused."""

import json
import random
import re
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import test_engine
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import PROMPTS

from puna.engine import Engine, EngineThread, Sampling
from puna.engine.constrain import MAX_TEXT, Constraint, Grammars
from puna.errors import PunaError
from puna.processor import Tokenizer

model, engine = test_engine.model, test_engine.engine


def schema_of(**schema):
    return Constraint("json_schema", json.dumps(schema))


def schemas(depth=2):
    """Schemas that JSON schema's validator and the grammar both read."""
    name = st.sampled_from(["a", "b", "name", "größe", "x y"])
    values, few, some = st.sampled_from([1, "one", None, "été", 2.5, ["x"]]), st.integers(0, 2), st.integers(0, 99)
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-50, 50), some),
        st.just({"type": "number"}),
        st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, few, few),
        st.just({"type": "string", "pattern": "^[a-c]{2,5}$"}),
        st.builds(lambda v: {"enum": v}, st.lists(values, min_size=1, max_size=3)),
    )  # fmt: skip
    if not depth:
        return leaves
    inner = schemas(depth - 1)

    def an_object(properties, required):
        return {
            "type": "object", "properties": properties, "additionalProperties": False,
            "required": [p for p in properties if p in required],
        }  # fmt: skip

    return st.one_of(
        leaves,
        st.builds(an_object, st.dictionaries(name, inner, max_size=3), st.sets(name)),
        st.builds(lambda s, n, m: {"type": "array", "items": s, "minItems": n, "maxItems": n + m}, inner, few, few),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    )  # fmt: skip


def walk(tokenizer, grammar, seed, most=400):
    """(bytes, finished) of a random walk, which turns towards the end when it has become long."""
    source, out = random.Random(seed), b""
    for step in range(most + 400):
        allowed = grammar.allowed_V.nonzero()[:, 0].tolist()
        ends = [t for t in allowed if t in tokenizer.stop_ids]
        assert all(t in tokenizer.stop_ids for t in allowed if t in tokenizer.special.values())
        if ends and (step > most or source.random() < 0.2):
            assert len(ends) == len(tokenizer.stop_ids), "where one may end, each may"
            return out, True
        closing = [t for t in allowed if tokenizer.token_bytes(t) in (b'"', b"]", b"}", b"0")] if step > most else []
        token = source.choice(closing or [t for t in allowed if t not in ends] or ends)
        if token in ends:
            return out, True
        out += tokenizer.token_bytes(token)
        assert grammar.follow([token, tokenizer.bos]) == [token]
        grammar.push(token)
    return out, False


@settings(deadline=None, max_examples=60)
@given(schemas(), st.integers(0, 2**32))
def test_random_walks_through_random_schemas_are_valid(tiny_processor, schema, seed):
    tokenizer = tiny_processor.tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 7)
    text, finished = walk(tokenizer, grammars.start(schema_of(**schema)), seed)
    assert finished
    jsonschema.validate(json.loads(text.decode("utf-8")), schema)


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{2,9}", r"(yes|no|été)", r"\d{3}-\d{4}", r"(a|b)*c", r"[^x]{1,20}", r"\p{Lu}{1,3} 🙂"]
)
def test_random_walks_match_their_regular_expression(tiny_processor, pattern):
    import regex

    tokenizer = tiny_processor.tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    texts = {walk(tokenizer, grammars.start(Constraint("regex", pattern)), seed, most=40)[0] for seed in range(20)}
    assert len(texts) > 1 and all(regex.fullmatch(pattern, text.decode("utf-8"), regex.DOTALL) for text in texts)


def test_with_metas_ranks(tmp_path):
    """A tokenizer read from ranks, with all 2,048 control tokens behind it."""
    path = tmp_path / "tokenizer.model"
    path.write_text(Tokenizer.train([Path(__file__).read_text()], 2448, special="full", digits="grouped").to_ranks())
    tokenizer = Tokenizer.from_ranks(path)
    properties = {"n": {"type": "integer"}, "s": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["n", "s"]}
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    for seed in range(5):
        text, finished = walk(tokenizer, grammars.start(schema_of(**schema)), seed, most=60)
        assert finished
        jsonschema.validate(json.loads(text), schema)


# ---- with the engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}, {"temperature": 1.5, "top_p": 0.9, "seed": 3},
                                     {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2}], ids=str)  # fmt: skip
def test_an_untrained_model_writes_valid_answers(engine, options):
    """Beside rows without a grammar, which notice nothing."""
    free = engine.generate([PROMPTS[0]], max_tokens=20, **options)[0]
    constraints = [None, schema_of(**PERSON), Constraint("regex", r"(cat|dog){1,3}!"), schema_of(type="boolean"),
                   schema_of(enum=["left", "right"]), None]  # fmt: skip
    wanted = [Sampling(max_tokens=150 if c else 20, constraint=c, **options) for c in constraints]
    ids = [engine.add_request(PROMPTS[0], sampling) for sampling in wanted]
    done = test_engine.drain(engine)
    answers = [done[id] for id in ids]
    assert answers[0].tokens == answers[-1].tokens == free.tokens
    assert all(a.finish_reason == "stop" for a in answers[1:-1])
    jsonschema.validate(json.loads(answers[1].text), PERSON)
    assert re.fullmatch(r"(cat|dog){1,3}!", answers[2].text)
    assert isinstance(json.loads(answers[3].text), bool) and json.loads(answers[4].text) in ("left", "right")


def test_json_object_and_being_cut(engine, tiny_processor):
    """Cut by max_tokens or a stop string, an answer is the beginning of a valid one."""
    tokenizer = tiny_processor.tokenizer
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    whole = engine.generate([PROMPTS[1]], max_tokens=150, constraint=schema_of(**PERSON))[0]
    for n in {1, 2, 5, 9, len(whole.tokens) // 2, len(whole.tokens) - 1}:
        cut = engine.generate([PROMPTS[1]], max_tokens=n, constraint=schema_of(**PERSON))[0]
        assert cut.finish_reason == "length" and cut.tokens == whole.tokens[:n]
        grammar = grammars.start(schema_of(**PERSON))
        for token in cut.tokens:
            grammar.push(token)
        rest, finished = walk(tokenizer, grammar, n, most=40)
        assert finished
        jsonschema.validate(json.loads(b"".join(map(tokenizer.token_bytes, cut.tokens)) + rest), PERSON)
    stop = whole.text[3:5]
    stopped = engine.generate([PROMPTS[1]], max_tokens=150, constraint=schema_of(**PERSON), stop=stop)[0]
    assert stopped.text == whole.text[: whole.text.index(stop)] and stopped.finish_reason == "stop"
    anything = Constraint("json_object")
    some = engine.generate([PROMPTS[1]], max_tokens=60, temperature=1.0, seed=1, constraint=anything)[0]
    assert some.text.startswith("{")
    if some.finish_reason == "stop":
        assert isinstance(json.loads(some.text), dict)


def test_a_model_that_wants_to_stop_or_to_speak_in_control_tokens(engine, tiny_processor, monkeypatch):
    special = torch.tensor(sorted(tiny_processor.tokenizer.special.values()))
    head = engine.model.head
    wish = torch.zeros(engine.config.vocab_size).index_fill(0, special, 60.0)
    monkeypatch.setattr(engine.model, "head", lambda h: head(h) + wish)
    assert engine.generate([PROMPTS[0]], max_tokens=9)[0].text == "", "without a grammar it says nothing"
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        done = engine.generate([PROMPTS[0]], max_tokens=150, constraint=schema_of(**PERSON), **options)[0]
        jsonschema.validate(json.loads(done.text), PERSON)
        assert [t for t in done.tokens if t in special.tolist()] == done.tokens[-1:]


@pytest.mark.parametrize(
    "wanted",
    [
        dict(type="integer", minimum=5, maximum=3),
        dict(enum=[]),
        dict(allOf=[{"type": "string"}, {"type": "integer"}]),
        dict(type="strange"),
        {"$ref": "#"},
        {"$ref": "http://example.invalid/schema"},
        {"$ref": "#/nowhere"},
        {"not": {"type": "string"}},
        dict(type="array", uniqueItems=True),
        {"type": "object", "x-guidance": {"lenient": True}},
        dict(type="object", required=["a"], additionalProperties=False),
        dict(anyOf=[{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(3000)]),
        dict(type="string", pattern="(a"),
        ("json_schema", "[" * 5000 + "]" * 5000),
        ("json_schema", '{"items":' * 500 + "{}" + "}" * 500),
        ("json_schema", '{"a": 1'),
        ("json_schema", "true"),
        ("regex", "(a"),
        ("regex", r"(a)\1"),
        ("regex", "(?=a)b"),
        ("regex", "a{1000000}"),
        ("regex", "(a{1000}){1000}"),
        ("regex", "(" * 2000 + "a" + ")" * 2000),
        ("regex", r"[^\s\S]"),
        ("json_schema", "x" * (MAX_TEXT + 1)),
        ("xml", "<a/>"),
        ("json_object", "{}"),
        ("regex", ""),
        ("regex", 5),
    ],
    ids=lambda c: str(c)[:60],
)
def test_hostile_grammars_are_refused_where_they_are_given(engine, wanted):
    """Within seconds, in one line, in the caller's thread, and the engine answers on."""
    began = time.perf_counter()
    with EngineThread(engine) as served:
        with pytest.raises(PunaError, match="^constraint: ") as caught:
            constraint = schema_of(**wanted) if isinstance(wanted, dict) else Constraint(*wanted)
            served.submit(PROMPTS[0], Sampling(constraint=constraint))
        assert "\n" not in str(caught.value) and time.perf_counter() - began < 6
        assert list(served.submit(PROMPTS[0], Sampling(max_tokens=1)))[-1].finish_reason == "length"


def test_large_but_honest_grammars(engine):
    words = [f"w{i}" for i in range(10_000)]
    for constraint in (schema_of(enum=words), Constraint("regex", "|".join(words)), Constraint("regex", "(a+)+b"),
                       Constraint("regex", "(a|b)*a(a|b){20}")):  # fmt: skip
        began = time.perf_counter()
        done = engine.generate([PROMPTS[0]], max_tokens=40, temperature=1.0, seed=1, constraint=constraint)[0]
        assert time.perf_counter() - began < 10 and done.error is None
        if "w1" in constraint.text:
            assert done.text.strip().strip('"') in words


def test_a_grammar_that_explodes_later_ends_its_own_request(engine):
    properties = {"quiet": {"const": 1}, "loud": {"type": "string", "pattern": "^(a{999}){999}$"}}
    bomb = schema_of(type="object", properties=properties, required=["quiet", "loud"])
    expected = engine.generate([PROMPTS[1]], max_tokens=100)[0].tokens
    bad, good = (engine.add_request(PROMPTS[1], Sampling(max_tokens=100, constraint=c)) for c in (bomb, None))
    done = test_engine.drain(engine)
    assert done[good].tokens == expected
    assert done[bad].finish_reason == "error" and isinstance(done[bad].error, PunaError) and "quiet" in done[bad].text


def test_each_grammar_is_compiled_once(engine, monkeypatch):
    import llguidance

    made, real = [], llguidance.LLParserLimits
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **limits: made.append(1) or real(**limits))
    letters = Constraint("regex", "[a-f]{4}")
    done = engine.generate([PROMPTS[0], PROMPTS[1], PROMPTS[3]], max_tokens=9, constraint=letters)
    assert len(made) == 1 and all(re.fullmatch("[a-f]{4}", d.text) for d in done)


def test_what_a_constraint_needs(model, tiny_processor, monkeypatch):
    with pytest.raises(PunaError, match="no tokenizer"):
        Engine(model).add_request([1], Sampling(constraint=Constraint("json_object")))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PunaError, match=r"pip install 'puna\[constrain\]'"):
        Engine(model, tiny_processor).add_request(PROMPTS[0], Sampling(constraint=Constraint("json_object")))
