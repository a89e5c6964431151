"""Answers that keep to a grammar: a JSON schema, any JSON object, or a regular expression.

After each token the grammar knows which bytes may follow; a token is allowed if its bytes are a path through it, so
forbidden ones get probability 0 before the draw (sampler.py, step 3). What comes out is always a prefix of something
valid, and a stop token is allowed exactly where the whole is valid: an answer is valid unless max_tokens or a stop
string cuts it short.

    {"type": "integer"}        after ""      0 1 2 … - and white space          no stop token yet
                               after "-"     0 1 2 …
                               after "-4"    0 1 2 … and the stop tokens

`llguidance` does the work: it walks the trie of the vocabulary along an Earley parser over a lexer of derivatives, so a
regular expression never backtracks. Its work is counted in *fuel*, not in seconds: the same grammar is refused on every
machine. A grammar is compiled where the request is made, and walked a few steps: what is impossible, has no end of
states or is not implemented is refused there, with the reason. What exceeds a limit only later ends its own request.

Control tokens have no bytes a grammar could ask for. White space between JSON's parts is at most a short indent, since
a model that is unsure writes blanks without end.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.errors import PunaError

KINDS = ("json_schema", "json_object", "regex")
MAX_TEXT = 2**17  # characters of a schema or an expression
MAX_DEPTH = 64  # of a schema's nesting
MAX_SECONDS = 2.0  # to compile
LIMITS = dict(
    initial_lexer_fuel=250_000,  # regular expressions before the first token: about 0.4 s at worst
    step_lexer_fuel=100_000,  # about 10 ms a token
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=50_000,  # about 100 MB
    max_grammar_size=200_000,
    verbose_errors=False,
)
TRIAL = 8  # steps of a new grammar that are tried
KEEP = 32  # compiled grammars kept for the next request with the same
JSON_OPTIONS = dict(
    lenient=False, coerce_one_of=False, whitespace_flexible=True, whitespace_pattern=r"[\x20\x0A\x09]{1,16}"
)


@dataclass(frozen=True)
class Constraint:
    """A grammar for one answer. kind: "json_schema", "json_object" or "regex"; text: the schema as JSON, or the
    expression (Rust's syntax, matched from end to end); none for "json_object"."""

    kind: str
    text: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise PunaError(f"constraint: must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not isinstance(self.text, str):
            raise PunaError(f"constraint: a {self.kind} is given as a string, not as {type(self.text).__name__}")
        if len(self.text) > MAX_TEXT:
            raise PunaError(f"constraint: the {self.kind} has {len(self.text)} characters, at most {MAX_TEXT} are read")
        if (self.kind == "json_object") != (not self.text):
            raise PunaError("constraint: json_schema and regex need a text, json_object has none")


class Grammar:
    """The place of one answer in its grammar: `allowed_V`, bool [V] on the CPU, are the tokens that may come next."""

    def __init__(self, matcher, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._look()

    def push(self, token: int) -> None:
        """The answer goes on with `token`, an allowed one. PunaError: the grammar is too complex from here on."""
        self._matcher.consume_token(token)
        self._look()

    def follow(self, tokens: list[int]) -> list[int]:
        """As many of these next tokens as the grammar allows one after the other."""
        return tokens[: self._matcher.validate_tokens(tokens)]

    def copy(self) -> Grammar:
        """Another answer at the same place."""
        return Grammar(self._matcher.deep_copy(), self._vocabulary)

    def _look(self) -> None:
        bits = b"" if self._matcher.is_error() else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            reason = self._matcher.get_error().replace("<non-verbose/>", "").strip().splitlines()
            raise PunaError(f"constraint: {' '.join(reason)[:300]}: simplify the grammar")
        allowed_V = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little", count=self._vocabulary)
        self.allowed_V: Tensor = torch.from_numpy(allowed_V.astype(bool))
        if not allowed_V.any():
            raise PunaError("constraint: nothing can follow here: the grammar cannot be met with this tokenizer")


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the newest. Any thread may use it.

    vocabulary: ids the model has, at least the tokenizer's.
    """

    def __init__(self, tokenizer, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._trie: Any = None
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()

    def start(self, constraint: Constraint) -> Grammar:
        """The grammar at its beginning. Raises PunaError for one that is impossible, too large or not implemented."""
        with self._lock:
            if (found := self._kept.get(constraint)) is not None:
                self._kept.move_to_end(constraint)
                return found.copy()
        try:
            import llguidance
        except ImportError as error:
            raise PunaError("constraint: needs llguidance; install it with pip install 'puna[constrain]'") from error
        if self._tokenizer is None:
            raise PunaError("constraint: this model has no tokenizer, so no text that a grammar could describe")
        with self._lock:
            if self._trie is None:
                self._trie = _trie(llguidance, self._tokenizer)
        began = time.perf_counter()
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._trie, _source(llguidance, constraint), log_level=0, limits=limits)
        grammar = Grammar(matcher, self._vocabulary)
        trial = grammar.copy()
        for _ in range(TRIAL):
            token = int(trial.allowed_V.nonzero()[0])
            if token in self._tokenizer.stop_ids:
                break
            trial.push(token)
        if (took := time.perf_counter() - began) > MAX_SECONDS:
            raise PunaError(f"constraint: took {took:.1f} s to compile, at most {MAX_SECONDS} are given: simplify it")
        with self._lock:
            self._kept[constraint] = grammar
            while len(self._kept) > KEEP:
                self._kept.popitem(last=False)
            return grammar.copy()


def _source(llguidance, constraint: Constraint) -> str:
    """The constraint in llguidance's own form."""
    if constraint.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(constraint.text)
    try:
        schema = json.loads(constraint.text) if constraint.text else {"type": "object"}
    except (ValueError, RecursionError) as error:
        raise PunaError(f"constraint: the json_schema is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise PunaError(f"constraint: a json_schema is an object, not {type(schema).__name__}")
    level, depth = [schema], 0
    while level := [v for node in level for v in (node.values() if isinstance(node, dict) else node)
                    if isinstance(v, dict | list)]:  # fmt: skip
        depth += 1
        if depth > MAX_DEPTH:
            raise PunaError(f"constraint: the json_schema is nested more than {MAX_DEPTH} deep")
    if "x-guidance" in schema:
        raise PunaError("constraint: x-guidance is llguidance's own and not part of JSON schema: leave it out")
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)


def _trie(llguidance, tokenizer):
    """The vocabulary as llguidance walks it."""

    class Vocabulary:
        eos_token_id, bos_token_id = tokenizer.eot, tokenizer.bos
        tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        special_token_ids = sorted(tokenizer.special.values())

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), eos_token=list(tokenizer.stop_ids))
