"""The evaluation of a raised model: every row of the table of goals, in one pass.

    naming/<lang>       what is this? pictures in a style never trained on; the whole name, freely generated
    naming/en/shuffled  the same questions with exchanged pictures: a model that looks must fall to chance
    grounding/iou50     where is the ...? in unseen scenes; the first box with IoU >= 0.5
    addition/2digit     pairs of numbers never trained on
    needle/2x           one of several codes in real text, twice the longest trained length
    bpb/<lang>, code    bits per byte of held-out text against a unigram's

All answers are greedy and free: the model writes, nothing is chosen for it. The items are those of `puna.tasks`' test
splits, the judge is the task's own `grade`, chance comes from the same items. What a model cannot do (no vision tower,
too short a context) is a row without a value, never a missing row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from puna import nursery, tasks
from puna.data.sources import make_task
from puna.engine import Engine
from puna.eval import nll
from puna.eval.config import EvalConfig, for_minutes, smaller
from puna.eval.rows import BITS, SHARE, Row, Sample, bits_row, chance_row, missing_row, share_row
from puna.model import Llama4
from puna.processor import Processor
from puna.tasks.naming import shuffled

__all__ = ["EvalConfig", "answer", "for_minutes", "run", "smaller"]

TrainingText = Mapping[str, Sequence[str]] | Callable[[str], Sequence[str]]
Progress = Callable[[Row], None]
TOKENS = {"naming": 48, "grounding": 80, "addition": 48, "needle": 32}  # most tokens of an answer


def run(
    model: Llama4, processor: Processor, config: EvalConfig, training_text: TrainingText,
    progress: Progress | None = None, quiet: bool = False,
) -> tuple[list[Row], list[Sample]]:  # fmt: skip
    """All rows, in the table's order, and some answers to look at (chosen beforehand, right or wrong).

    training_text: what the model was trained on, by "text/<lang>" (or "<lang>") and "code", for chance; or a function
    of a language or "code". progress(row): called as rows come; by default a line on stderr unless `quiet`. Computes in
    the parameters' own dtype, as a loaded checkpoint does.
    """
    done = progress or ((lambda row: None) if quiet else _print)
    computed, model.compute_dtype = model.compute_dtype, None
    try:
        return _run(Engine(model, processor, max_batch=config.batch), config, training_text, done)
    finally:
        model.compute_dtype = computed


def _run(engine: Engine, config: EvalConfig, training_text: TrainingText, done: Progress):
    rows, samples = [], []

    def add(row: Row, some: Sequence[Sample] = ()) -> None:
        rows.append(row)
        samples.extend(some)
        done(row)

    for make in (_naming, _grounding, _addition, _needle):
        for row, some in make(engine, config):
            add(row, some)
    for name in (*config.languages, "code"):
        add(_bits(engine.model, engine.processor, config, name, training_text))
    return rows, chosen(samples, config.samples)


def chosen(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` of the samples, in their order: of every kind of row (naming, grounding, ...) in turn, so that no kind
    crowds another out."""
    kinds: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        kinds.setdefault(sample.row.split("/")[0], []).append(place)
    turns = sorted((turn, place) for places in kinds.values() for turn, place in enumerate(places))
    return [samples[place] for place in sorted(place for _, place in turns[:count])]


def answer(engine: Engine, items: Sequence[tasks.Item], max_tokens: int) -> list[str]:
    """Greedy answers to all items, decoded in batches."""
    return [done.text for done in engine.generate([item.prompt for item in items], max_tokens=max_tokens)]


def _graded(engine: Engine, task: tasks.Task, items: Sequence[tasks.Item], name: str) -> list[Sample]:
    texts = answer(engine, items, TOKENS[task.name])
    return [Sample(name, item, text, task.grade(item, text)) for item, text in zip(items, texts, strict=True)]


def _sees(engine: Engine) -> bool:
    return engine.model.vision is not None and engine.processor.image is not None


def _naming(engine: Engine, config: EvalConfig):
    for number, lang in enumerate(config.languages):
        name = f"naming/{lang}"
        goal = config.goals.get(name)
        if not _sees(engine):
            yield missing_row(name, SHARE, goal, "the model reads text only"), ()
            continue
        task = tasks.Naming(lang)
        count = config.naming if lang == "en" else config.naming_languages
        items = list(islice(task.items("test", config.seed), count))
        graded = _graded(engine, task, items, name)
        place = number % len(graded)  # every language shows another thing
        shown = slice(0, 3) if lang == "en" else slice(place, place + 1)
        yield share_row(name, [s.grade for s in graded], task.chance(items), goal), graded[shown]
        if lang == "en":
            mixed = shuffled(items, config.seed)
            grades = [s.grade for s in _graded(engine, task, mixed, f"{name}/shuffled")]
            yield chance_row(f"{name}/shuffled", grades, task.chance(items), "pictures exchanged; at most chance"), ()


def _grounding(engine: Engine, config: EvalConfig):
    name = "grounding/iou50"
    goal = config.goals.get(name)
    if not _sees(engine):
        yield missing_row(name, SHARE, goal, "the model reads text only"), ()
        return
    task = tasks.Grounding(tests=config.grounding)
    items = list(task.items("test", config.seed))
    graded = _graded(engine, task, items, name)
    yield share_row(name, [s.grade for s in graded], task.chance(items), goal), graded[:4]


def _addition(engine: Engine, config: EvalConfig):
    name, task = "addition/2digit", tasks.Addition()
    items = list(islice(task.items("test", config.seed, level=1), config.addition))
    graded = _graded(engine, task, items, name)
    yield share_row(name, [s.grade for s in graded], task.chance(items), config.goals.get(name)), graded[:2]


def _needle(engine: Engine, config: EvalConfig):
    name, room = "needle/2x", engine.max_context - TOKENS["needle"]
    goal = config.goals.get(name)
    if config.needle_length > room:
        note = f"{config.needle_length} tokens do not fit the model's context of {engine.max_context}"
        yield missing_row(name, SHARE, goal, note), ()
        return
    task = make_task("needle", engine.processor, config.needle_length, {"tests": config.needle})
    items = list(task.items("test", config.seed))
    graded = _graded(engine, task, items, name)
    note = f"{config.needle_length:,} tokens"
    yield share_row(name, [s.grade for s in graded], task.chance(items), goal, note), graded[:1]


def _bits(model: Llama4, processor: Processor, config: EvalConfig, name: str, training: TrainingText) -> Row:
    tokenizer = processor.tokenizer
    documents = nursery.code("val") if name == "code" else nursery.texts(name, "val")
    documents = nll.head(documents, config.bpb_bytes)
    goal = config.goals.get(f"bpb/{name}")
    read = _training(training, name)
    if not documents or not read:
        return missing_row(f"bpb/{name}", BITS, goal, "no text to measure or to compare with")
    cut = nll.windows(tokenizer, documents, config.window)
    lengths_V = nll.byte_lengths(tokenizer)
    measured = nll.ratio(nll.window_bits(model, cut, tokenizer.pad, config.bpb_rows), cut, lengths_V)
    counts_V = nll.token_counts(tokenizer, read, config.chance_chars)
    chance = nll.unigram_bits_per_byte(counts_V, [i for ids in cut for i in ids[1:]], lengths_V)
    return bits_row(f"bpb/{name}", measured.bpb, measured.n_tokens, measured.stderr, chance, goal)


def _training(training: TrainingText, name: str) -> Sequence[str]:
    if callable(training):
        return training(name)
    return training.get(name) or training.get(f"text/{name}") or ()


def _print(row: Row) -> None:
    value = "   -  " if row.value is None else f"{row.value:6.3f}"
    verdict = {True: "met", False: "not met", None: ""}[row.met]
    print(f"  {row.name:20} {value}  {verdict}", file=sys.stderr, flush=True)
