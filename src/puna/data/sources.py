"""Named sources of data: from a name like 'text/en' to packed rows.

    text/<lang>      the nursery's documents in one of 12 languages       loss on every token
    code             its code                                             loss on every token
    long/<source>    the documents of text/<lang> ('long/en') or code ('long/code') longer than one attention chunk;
                     shorter ones only fill what they leave free in their last chunks
    captions         pictures with names, interleaved (puna.tasks)        loss on text, not on pictures
    scenes           composed scenes, then the boxes of all their things  loss on text, not on pictures
    sft/<task>       conversations of a task in puna.tasks                loss on what the assistant says
    file:<path>      the user's own text or conversations (files.py)      as theirs
    corpus:<path>    what `puna data build` made (corpora/), all of it or  loss on text, not on pictures
                     one of its languages or sources (corpus:<path>/en)

Each is encoded and packed once for a sequence length (packing.py) and kept on disk under the hash of all that went in
(shards.py): the same data, tokenizer, settings and code never are packed twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from inspect import signature
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from puna import nursery, tasks
from puna.data import corpus, files, shards
from puna.data.corpora.store import Corpus
from puna.data.mixture import Mixture
from puna.data.order import derive
from puna.data.packing import PackedRows, pack
from puna.errors import PunaError
from puna.processor import Encoded, Processor
from puna.tasks import needle

GROUP = 256  # documents encoded at once
ITEMS = 4096  # documents of an endless source, where its options don't say
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Phase:
    """Other weights from a share of the stage's steps on: Phase(0.5, {...}) holds for the second half."""

    after: float
    weights: Mapping[str, float]


@dataclass(frozen=True)
class DataConfig:
    """What a stage trains on.

    seq_len: tokens a row, a multiple of the attention chunk or shorter. weights: source -> share of the rows. seed: of
    the tasks' items, the choice of documents and the order of rows. options: source -> settings of that source:
    `max_chars` (text, code, long, file, corpus: no more than so many characters, whole documents chosen by the seed),
    `items` (captions, sft: how many), `level` (sft), and the task's own settings. then: later phases, in order.
    """

    seq_len: int
    weights: Mapping[str, float]
    seed: int = 0
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    then: tuple[Phase, ...] = ()

    def __post_init__(self):
        named = {name for weights in self._all for name in weights}
        for name in self.options:
            if name not in named:
                raise PunaError(f"options for data source {name!r}, which has no weight{_nearest(name, sorted(named))}")
        times = [0.0, *(phase.after for phase in self.then), 1.0]
        if any(a >= b for a, b in pairwise(times)):
            raise PunaError(f"data.then: phases begin after rising shares between 0 and 1, not {times[1:-1]}")

    @property
    def _all(self) -> tuple[Mapping[str, float], ...]:
        return (self.weights, *(phase.weights for phase in self.then))

    @property
    def used(self) -> tuple[str, ...]:
        """Sources that have a positive weight in any phase, in order of name."""
        return tuple(sorted({name for weights in self._all for name in weights if weights[name] > 0}))

    def begins(self, steps: int) -> list[int]:
        """The first step of every phase of a stage of `steps` steps."""
        return [0, *(round(phase.after * steps) for phase in self.then)]

    def mixture(self, sizes: Mapping[str, int], steps: int, rows: int) -> Mixture:
        """Which rows `steps` steps of `rows` rows read; phases begin with whole steps. PunaError as Mixture's, and for
        a phase that the few steps leave no place."""
        begins = self.begins(steps)
        if any(a >= b for a, b in pairwise([*begins, steps])):
            raise PunaError(f"data.then: {len(begins)} phases do not fit into {steps} steps")
        then = [(begin * rows, phase.weights) for begin, phase in zip(begins[1:], self.then, strict=True)]
        return Mixture(self.weights, sizes, self.seed, then)


def names() -> list[str]:
    """All sources that ship with puna ('file:<path>' and 'corpus:<path>' come on top)."""
    text = list(nursery.LANGUAGES)
    return [
        *(f"text/{lang}" for lang in text),
        "code",
        *(f"long/{lang}" for lang in [*text, "code"]),
        *tasks.DOCUMENTS,
        *(f"sft/{name}" for name in sorted(tasks.TASKS)),
    ]


def build(
    config: DataConfig,
    processor: Processor,
    chunk: int,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    split: str = "train",
) -> dict[str, PackedRows]:
    """Packed rows of every source of `config` with a positive weight.

    chunk: the model's attention chunk. cache_dir: where packed rows are kept (None: only in memory). progress(name,
    done, total): called as documents are encoded; done == total at the end. split: "train" or "val". PunaError:
    unknown source or option, nothing in a source, damaged files.
    """
    for name in config.used:
        _check(name, config.options.get(name, {}))
    result = {}
    for name in config.used:
        key = fingerprint(name, config, processor, chunk, split)
        folder = None
        if cache_dir is not None:
            folder = Path(cache_dir) / f"{_safe(name)}-{split}-{config.seq_len}-{key[:16]}"
        rows = shards.load(folder, key) if folder is not None else None
        if rows is None:
            rows = _build(name, config, processor, chunk, progress, split, folder and folder.parent)
            if folder is not None:
                shards.save(folder, rows, key)
                rows = shards.load(folder, key)  # memory-mapped: a long run keeps the data on disk
        elif progress is not None:
            progress(name, rows.documents, rows.documents)
        result[name] = rows
    return result


def summary(built: Mapping[str, PackedRows]) -> dict[str, dict[str, float]]:
    """Per source: rows, documents, dropped, tokens and loss_tokens (padding not counted), pictures, padding_share."""
    return {
        name: {
            "rows": len(rows),
            "documents": rows.documents,
            "dropped": rows.dropped,
            "tokens": rows.token_count,
            "loss_tokens": rows.loss_count,
            "pictures": sum(map(len, rows.pictures)),
            "padding_share": rows.padding_share,
        }
        for name, rows in built.items()
    }


def fingerprint(name: str, config: DataConfig, processor: Processor, chunk: int, split: str = "train") -> str:
    """sha256 of all that decides a source's packed rows: its data, settings, the tokenizer, picture tiling, lengths
    and our code."""
    state = {
        "source": name,
        "data": _data_hash(name),
        "options": dict(config.options.get(name, {})),
        "seed": config.seed,
        "seq_len": config.seq_len,
        "chunk": chunk,
        "split": split,
        "tokenizer": hashlib.sha256(processor.tokenizer.to_json().encode()).hexdigest(),
        "image": repr(processor.image),
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()


def texts(name: str, split: str = "train", max_chars: int | None = None, seed: int = 0) -> list[str]:
    """The plain texts of a source ('text/<lang>', 'code', 'file:<path>', 'corpus:<path>'), to train a tokenizer or to
    measure on.

    max_chars: whole documents chosen by the seed, until so many characters are reached; in their own order.
    """
    if name.startswith("corpus:"):
        found, _ = corpus.documents(name.removeprefix("corpus:"), {"max_chars": max_chars}, seed)
        return [document for document in found if isinstance(document, str)]
    documents = _texts(name, split)
    if max_chars is None or sum(map(len, documents)) <= max_chars:
        return documents
    chosen = corpus.choose(np.array([len(each) for each in documents]), max_chars, derive("choose", seed, name))
    return [document for document, taken in zip(documents, chosen, strict=True) if taken]


def _texts(name: str, split: str) -> list[str]:
    """All texts of a source."""
    if name.startswith("file:"):
        return [document for document in files.documents(name.removeprefix("file:")) if isinstance(document, str)]
    kind = name.split("/")[-1]
    return nursery.code(split) if kind == "code" else nursery.texts(kind, split)


def _build(
    name: str, config: DataConfig, processor: Processor, chunk: int, progress: Progress | None, split: str,
    scratch: Path | None,
) -> PackedRows:  # fmt: skip
    """Encode and pack one source, in a folder or in memory."""
    tokenizer = processor.tokenizer
    encoded, total = _encoded(name, config, processor, split)
    encoded, filler = _reported(encoded, name, total, progress), []
    if name.startswith("long/"):
        everything = list(encoded)
        encoded = [document for document in everything if len(document.tokens) > chunk]
        filler = [document for document in everything if len(document.tokens) <= chunk]
    rows = pack(
        encoded,
        config.seq_len,
        chunk,
        tokenizer.pad,
        image=(tokenizer.image_start, tokenizer.image_end),
        # A conversation whose question is cut off teaches nothing; it ends with the end of a turn.
        overlong=lambda document: "drop" if document.tokens[-1] == tokenizer.eot else "cut",
        filler=filler,
        seed=config.seed,
        scratch=scratch,
    )
    if progress is not None:
        progress(name, rows.documents, rows.documents)
    if len(rows) == 0:
        if name.startswith("long/"):
            raise PunaError(f"data source {name!r} has no document longer than a chunk of {chunk} tokens; leave it out")
        if rows.dropped:
            raise PunaError(
                f"all {rows.dropped} conversations of {name!r} are longer than {config.seq_len} tokens; raise seq_len"
            )
        raise PunaError(f"data source {name!r} is empty; leave it out or give it data")
    return rows


def _encoded(name: str, config: DataConfig, processor: Processor, split: str) -> tuple[Iterable[Encoded], int | None]:
    """A source's documents, encoded a group at a time, and how many there are (None: known at the end)."""
    options = dict(config.options.get(name, {}))
    if name in tasks.DOCUMENTS:
        count = options.pop("items", ITEMS)
        documents = tasks.DOCUMENTS[name](**options).documents(seed=derive(name, config.seed, split))
        return _in_groups(islice(documents, count), processor.encode_documents), count
    if name.startswith("sft/"):
        count, level = options.pop("items", ITEMS), options.pop("level", 0)
        task = make_task(name.removeprefix("sft/"), processor, config.seq_len, options)
        items = task.items("test" if split == "val" else "train", seed=config.seed, level=level)
        return (processor.encode_chat(item.messages) for item in islice(items, count)), count
    if name.startswith("file:"):
        return _file(name, config, processor), None
    if name.startswith("corpus:"):
        documents, count = corpus.documents(name.removeprefix("corpus:"), options, config.seed)
        return _in_groups(documents, lambda group: encode_mixed(processor, group)), count
    documents = texts(name, split, options.get("max_chars"), config.seed)
    return _in_groups(documents, lambda group: encode_texts(processor, group)), len(documents)


def make_task(name: str, processor: Processor, seq_len: int, options: Mapping[str, Any]) -> tasks.Task:
    """The task `name`; one that counts tokens (the needle) gets this tokenizer, and the length that fits a row of
    `seq_len`."""
    options = dict(options)
    if name == "needle":
        answer = needle.SENTENCE.format(key="golden mirror", value=12345)
        room = len(
            processor.encode_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]).tokens
        )
        # The question is counted alone; between header and text a merge or two may fall otherwise.
        options.setdefault("length", seq_len - room - 4)
        options.setdefault("count", lambda text: len(processor.tokenizer.encode(text)))
    return tasks.task(name, **options)


def encode_texts(processor: Processor, documents: list[str]) -> list[Encoded]:
    """begin_of_text, text, end_of_text of each; loss on all but the first. As Processor.encode_documents, but straight
    to arrays."""
    tokenizer = processor.tokenizer
    result = []
    for ids in tokenizer.encode_arrays(documents):
        tokens = np.empty(len(ids) + 2, np.int32)
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, ids, tokenizer.end_of_text
        loss = np.ones(len(tokens), dtype=bool)
        loss[0] = False
        result.append(Encoded(tokens, loss, []))
    return result


def encode_mixed(processor: Processor, documents: list[str | list]) -> list[Encoded]:
    """Texts by `encode_texts`, texts with pictures by the processor; in order."""
    plain = iter(encode_texts(processor, [each for each in documents if isinstance(each, str)]))
    mixed = iter(processor.encode_documents([each for each in documents if not isinstance(each, str)]))
    return [next(plain if isinstance(each, str) else mixed) for each in documents]


def _file(name: str, config: DataConfig, processor: Processor) -> Iterator[Encoded]:
    """The user's texts and conversations, encoded in one pass that checks every row: all bad ones are told at its
    end, before anything is trained on."""
    path, most = name.removeprefix("file:"), config.options.get(name, {}).get("max_chars")
    bad, group = files.BadRows(), [] if most is None else texts(name, max_chars=most, seed=config.seed)
    for document in files.documents(path, bad):
        if isinstance(document, str):
            group += [document] if most is None else []
            if len(group) == GROUP:
                yield from encode_texts(processor, group)
                group = []
            continue
        encoded = None
        with bad.at(document.where):
            encoded = processor.encode_chat(document.messages, tools=document.tools)
        if encoded is not None:
            yield encoded
    bad.check()
    yield from encode_texts(processor, group)


def _in_groups(documents: Iterable, encode: Callable[[list], list[Encoded]]) -> Iterator[Encoded]:
    """Encode a group at a time: fast, and never all documents in memory twice."""
    iterator = iter(documents)
    while group := list(islice(iterator, GROUP)):
        yield from encode(group)


def _reported(encoded: Iterable[Encoded], name: str, total: int | None, progress: Progress | None) -> Iterator[Encoded]:
    """The same documents, telling how many have passed."""
    for done, document in enumerate(encoded):
        if progress is not None and done % GROUP == 0:
            progress(name, done, total)
        yield document


def _check(name: str, options: Mapping[str, Any]) -> None:
    """PunaError for a source that doesn't exist or an option it doesn't have; before any work is done."""
    if name.startswith("file:"):
        files.paths(name.removeprefix("file:"))
    elif name.startswith("corpus:"):
        Corpus.find(name.removeprefix("corpus:"))
    elif name not in names():
        raise PunaError(f"unknown data source {name!r}{_nearest(name, names())}")
    for key in ("items", "max_chars", "level"):
        value = options.get(key, 1)
        if not isinstance(value, int) or value < (key != "level"):
            raise PunaError(
                f"data source {name!r}: {key} must be a whole number >= {int(key != 'level')}, not {value!r}"
            )
    if name.startswith("sft/"):
        return
    valid = ("items", *signature(tasks.DOCUMENTS[name]).parameters) if name in tasks.DOCUMENTS else ("max_chars",)
    for key in options:
        if key not in valid:
            raise PunaError(f"data source {name!r} has no option {key!r}; it takes {', '.join(valid)}")


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(valid)}, file:PATH, corpus:PATH"


def _safe(name: str) -> str:
    """A source's name as a folder name."""
    return "".join(c if c.isalnum() else "-" for c in name)[-60:]


def _data_hash(name: str) -> str:
    """Hash of what a source reads."""
    if name.startswith("file:"):
        return files.sha256(name.removeprefix("file:"))
    if name.startswith("corpus:"):  # pictures are read from where they are, so the place counts
        found, only = Corpus.find(name.removeprefix("corpus:"))
        return f"{found.fingerprint} {only} {found.folder.resolve()}"
    return _nursery_hash()


@lru_cache(maxsize=1)
def _nursery_hash() -> str:
    return hashlib.sha256(json.dumps(nursery.manifest(), sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Hash of the modules that turn data into rows: another version of them packs anew."""
    root = Path(__file__).parents[1]
    modules = [
        *sorted((root / "tasks").glob("*.py")),
        *sorted((root / "processor").glob("*.py")),
        *sorted((root / "data").glob("*.py")),
    ]
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()
