"""Byte-level BPE with Llama 4's split pattern and control tokens.

Text becomes UTF-8 bytes; a regular expression cuts it into words, digit groups and symbol runs; inside a piece, byte
pairs are merged in the order they were learned. Every single byte is a token, so nothing is ever unknown, and
``decode(encode(text)) == text`` for every string.

**Control tokens are never read from text.** A chat format is only as safe as the border between what the program says
and what the user says. So `encode` works on an inner tokenizer that *has no* control tokens: a user who types
``<|eot|>`` gets the ordinary tokens of those seven characters. Control ids come only from names (`special`, `.eot`),
placed by the program (see `puna.processor.chat`). The saved ``tokenizer.json`` does hold them, as single
tokens, for other software.

**Digits.** Llama 4 cuts numbers into groups of up to three digits and BPE learns most groups as one token. A nano model
adds better digit by digit; with ``digits="single"`` the *training* text is cut between digits, so that no merge of two
ASCII digits exists, while the saved split pattern stays Llama 4's.

Source: llama4-facts.md §4.1; serving-and-evaluation.md F.3.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from puna.errors import PunaError
from puna.processor import ranks
from puna.processor.files import read_text, write_atomic
from puna.processor.special import ATTRIBUTES, FULL, LAYOUTS, SPLIT_PATTERN

FILE_NAME = "tokenizer.json"
MAX_PIECE = 400_000  # characters encoded at once (llama4-facts.md §4.1)
MAX_RUN = 25_000  # consecutive characters that are all white space, or all not
_MAX_ADDED = 10_000  # a file with more control tokens than this is an attack or a mistake
_RUNS = re.compile(r"\s+|\S+")


class Tokenizer:
    """Text to token ids and back. Make one with `train`, `load` or `from_ranks`.

    Attributes: `vocab_size` (ids, control tokens included); `special` (control string -> id); one id each in `bos`,
    `end_of_text`, `header_start`, `header_end`, `eom`, `eot`, `pad`, `image_start`, `image_end`, `image`, `patch`,
    `tile_x`, `tile_y`; `stop_ids`, the three ids that end a turn.
    """

    bos: int
    end_of_text: int
    header_start: int
    header_end: int
    eom: int
    eot: int
    pad: int
    image_start: int
    image_end: int
    image: int
    patch: int
    tile_x: int
    tile_y: int

    def __init__(self, serialized: str) -> None:
        """`serialized`: the text of a ``tokenizer.json`` of the `tokenizers` library."""
        self._outer, self._inner, vocab, self.special = _parse(serialized)
        for attribute, strings in ATTRIBUTES.items():
            found = [self.special[string] for string in strings if string in self.special]
            if not found:
                raise PunaError(f"the tokenizer has no {strings[0]} token: it is not a Llama 4 tokenizer")
            setattr(self, attribute, found[0])
        self.stop_ids = (self.end_of_text, self.eom, self.eot)
        self._special_ids = frozenset(self.special.values())
        self._bytes = _byte_table(vocab, self.special)
        self.vocab_size = len(self._bytes)

    # ---------------------------------------------------------------- making, reading, writing
    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special: str = "compact", digits: str = "single"
    ) -> Tokenizer:
        """Learn merges from `texts` (an iterable of documents) up to `vocab_size` ids, control tokens included.

        special: "compact" (the functional tokens) or "full" (all 2,048). digits: "single" (no merge joins digits) or
        "grouped" (as Llama 4). The same texts in the same order give the same tokenizer. Raises `PunaError` for unknown
        options, for a size that leaves no room for the bytes, and for texts too small for the size.
        """
        if special not in LAYOUTS:
            raise PunaError(f'special must be "compact" or "full", not {special!r}')
        if digits not in ("single", "grouped"):
            raise PunaError(f'digits must be "single" or "grouped", not {digits!r}')
        names = LAYOUTS[special]
        base = vocab_size - len(names)
        if base < 256:
            need = 256 + len(names)
            raise PunaError(f"vocab_size {vocab_size} is too small: bytes and control tokens alone take {need}")
        isolate = [pre_tokenizers.Digits(individual_digits=True)] if digits == "single" else []
        learner = tokenizers.Tokenizer(models.BPE())
        learner.pre_tokenizer = _split(*isolate)
        trainer = trainers.BpeTrainer(
            vocab_size=base,
            min_frequency=1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        learner.train_from_iterator(_checked(texts), trainer=trainer)
        learned = learner.get_vocab_size()
        if learned < base:
            raise PunaError(
                f"the texts yield only {learned} tokens, {base} are asked for: give more text or a smaller vocab_size"
            )
        return cls(_dressed(learner, names))

    @classmethod
    def from_ranks(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a ``tokenizer.model`` as Meta publishes it; all 2,048 control tokens follow its tokens.

        Meta's takes some ten seconds, and three from the ``tokenizer.json`` that `save` writes. Raises `PunaError`.
        """
        tokens = ranks.read_ranks(path)
        character_of = {byte: character for character, byte in _byte_of_character().items()}
        written = {token: "".join(map(character_of.__getitem__, token)) for token in tokens}
        pairs = [(written[a], written[b]) for a, b in ranks.merges(tokens)]
        vocab = {written[token]: i for i, token in enumerate(tokens)}
        return cls(_dressed(tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=True)), FULL))

    def to_ranks(self) -> str | None:
        """The text of a ``tokenizer.model``; None unless the last ids are all 2,048 control tokens in Meta's order."""
        base = self.vocab_size - len(FULL)
        if self.special != {name: base + i for i, name in enumerate(FULL)}:
            return None
        return ranks.write_ranks(self._bytes[:base])

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a ``tokenizer.json``, or the one in the folder `path`. Raises `PunaError`."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            return cls(read_text(path, "tokenizer"))
        except PunaError as error:
            raise error if str(path) in str(error) else PunaError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write ``tokenizer.json``: to the file `path` when it ends in .json, else into the folder `path`; atomic."""
        path = Path(path)
        write_atomic(path if path.suffix == ".json" else path / FILE_NAME, self.to_json())

    def to_json(self) -> str:
        """The text of ``tokenizer.json``."""
        return self._outer.to_str(pretty=False)

    def __reduce__(self) -> tuple:
        return (Tokenizer, (self.to_json(),))

    # ---------------------------------------------------------------- text to ids
    def encode(self, text: str) -> list[int]:
        """Ids of untrusted `text`: control strings in it become ordinary tokens, never control ids; no bos is added."""
        ids: list[int] = []
        for piece in _pieces(check_text(text)):
            ids += self._inner.encode(piece, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text as int32 [N], on all cores; by fastokens where it is installed: the same ids, 20 to 30
        times sooner, and no Python number for any of them."""
        pieces: list[str] = []
        ends: list[int] = [0]  # of each text, in pieces
        for text in texts:
            pieces += _pieces(check_text(text))
            ends.append(len(pieces))
        if self._quick is None:
            found = [piece.ids for piece in self._inner.encode_batch_fast(pieces, add_special_tokens=False)]
            ids = np.fromiter(chain.from_iterable(found), np.int32)
            offsets = np.cumsum([0, *map(len, found)])
        else:
            flat, cuts = self._quick.encode_batch_flat(pieces, add_special_tokens=False)
            ids, offsets = np.frombuffer(flat, np.int32), np.frombuffer(cuts, np.int64)
        return [ids[offsets[a] : offsets[b]] for a, b in pairwise(ends)]

    @cached_property
    def _quick(self):
        """fastokens' encoder of the inner tokenizer; None where it isn't installed."""
        try:
            import fastokens
        except ImportError:
            return None
        return fastokens.Tokenizer.from_json_str(self._inner.to_str())

    # ---------------------------------------------------------------- ids to text
    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for; for a control token, those of its name."""
        if not 0 <= id < self.vocab_size:
            raise PunaError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[id]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD. special: write control tokens' names, else leave them out."""
        hidden = frozenset() if special else self._special_ids
        return b"".join(self.token_bytes(i) for i in map(int, ids) if i not in hidden).decode("utf-8", "replace")

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special={len(self.special)})"


class StreamDecoder:
    """Ids in, text out, one by one, never half a character: bytes of an unfinished character wait for their rest.

    The pushes' pieces and the flush together are `tokenizer.decode(ids, special)`.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if special else tokenizer._special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters finished by token `id`, often none."""
        id = int(id)
        data = self._tokenizer.token_bytes(id)
        return "" if id in self._hidden else self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. The decoder can then be reused."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _split(*between: object) -> pre_tokenizers.PreTokenizer:
    """Llama 4's split into words, then bytes."""
    words = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, *between, to_bytes])


def _dressed(bare: tokenizers.Tokenizer, names: Sequence[str]) -> str:
    """The ``tokenizer.json`` of a BPE with everything around it: split, decoder, control tokens `names`."""
    bare.pre_tokenizer = _split()
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos = "<|begin_of_text|>"
    bare.post_processor = processors.TemplateProcessing(  # for other software; `encode` never adds it
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, bare.token_to_id(bos))],
    )
    return bare.to_str()


def _parse(serialized: str) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, dict[str, int], dict[str, int]]:
    """(tokenizer with control tokens, the one without, its token -> id, control string -> id) of a ``tokenizer.json``
    text."""
    try:
        spec = json.loads(serialized)
        added = {token["content"]: int(token["id"]) for token in spec.get("added_tokens") or []}
        model = spec["model"]
        kind, vocab = model.get("type", "BPE"), model["vocab"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PunaError(f"the tokenizer file is damaged: {error!r}") from error
    if kind != "BPE" or not isinstance(vocab, dict):
        raise PunaError(f"the tokenizer is of type {kind}, not byte-level BPE")
    if len(added) > _MAX_ADDED:
        raise PunaError(f"the tokenizer has {len(added)} control tokens, more than {_MAX_ADDED}")
    # The inner tokenizer has no control tokens to match, and nothing that would add or change characters.
    inner = {**spec, "added_tokens": [], **dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))}
    vocab = {token: i for token, i in vocab.items() if token not in added}
    inner["model"] = {**model, "vocab": vocab}
    try:
        result = tokenizers.Tokenizer.from_str(serialized), tokenizers.Tokenizer.from_str(json.dumps(inner))
    except Exception as error:  # the library raises bare Exception for every defect of a file
        raise PunaError(f"the tokenizer file is damaged: {error}") from error
    return *result, vocab, added


def _byte_of_character() -> dict[str, int]:
    """The printable stand-in characters of byte-level BPE -> the bytes they stand for.

    Printable Latin-1 bytes stand for themselves, the other 68 take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


def _byte_table(vocab: dict[str, int], special: dict[str, int]) -> list[bytes]:
    """Bytes of every id; raises `PunaError` unless all single bytes are there and no id is used twice."""
    of_character = _byte_of_character()
    latin = defaultdict(lambda: "\uffff", {ord(character): chr(byte) for character, byte in of_character.items()})
    size = max([*vocab.values(), *special.values()]) + 1
    if size > 4 * (len(vocab) + len(special)):  # a lying id would otherwise allocate memory without end
        raise PunaError("the tokenizer's ids are far from contiguous: the file is damaged")
    table = [b""] * size
    try:
        for token, i in vocab.items():
            table[i] = token.translate(latin).encode("latin-1")
    except UnicodeEncodeError as error:
        raise PunaError(f"the tokenizer is not byte-level BPE: token {token!r}") from error
    if not set(of_character) <= set(vocab):
        raise PunaError("the tokenizer lacks tokens for some single bytes")
    if set(vocab.values()) & set(special.values()):
        raise PunaError("the tokenizer gives one id to a text token and to a control token")
    for name, i in special.items():
        table[i] = name.encode("utf-8")
    return table


def check_text(text: str) -> str:
    """`text` itself if it is a string that UTF-8 can write, else `PunaError`."""
    if not isinstance(text, str):
        raise PunaError(f"text must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PunaError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}; remove or replace it"
        ) from error
    return text


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise PunaError("texts must be an iterable of documents, not one string")
    for text in texts:
        yield from _pieces(check_text(text))


def _pieces(text: str) -> Iterator[str]:
    """`text` in Llama 4's pieces: at most `MAX_PIECE` characters, at most `MAX_RUN` in one (non-)white-space run."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        begin = 0
        for run in _RUNS.finditer(piece) if _may_run_long(piece) else ():
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield piece[begin:cut]
                begin = cut
        yield piece[begin:]


def _may_run_long(piece: str) -> bool:
    """Whether a run may be longer than MAX_RUN: it would fill one of the consecutive parts of half that length."""
    half = MAX_RUN // 2
    parts = (piece[at : at + half] for at in range(0, len(piece), half))
    return any(part.isspace() or len(part.split(None, 1)) < 2 for part in parts)
