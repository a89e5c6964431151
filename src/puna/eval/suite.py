"""The suite behind report.json: naming, grounding, addition, needle, bits per byte; greedy and free, no candidates."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from itertools import islice

from puna import nursery
from puna.data.sources import make_task
from puna.engine import Engine
from puna.eval.nll import bits_per_byte, unigram_bits_per_byte
from puna.eval.rows import EvalConfig, Row, bits, share
from puna.model import Llama4
from puna.processor import Processor
from puna.tasks import Item, Task, task
from puna.tasks.naming import shuffled


def smaller(config: EvalConfig) -> EvalConfig:
    """The same suite with few items: a smoke run."""
    return dataclasses.replace(
        config, naming=24, naming_other=4, grounding=4, addition=16, needle=2, documents=1, needle_length=1024
    )


def answers(engine: Engine, items: Sequence[Item], max_tokens: int) -> list[str]:
    """Greedy answers to the items' prompts, stopped at the end of the turn."""
    return [done.text for done in engine.generate([item.prompt for item in items], max_tokens=max_tokens)]


def graded(engine: Engine, kind: Task, items: Sequence[Item], max_tokens: int) -> tuple[list[float], list[str]]:
    """(grades, answers) of a task's items."""
    texts = answers(engine, items, max_tokens)
    return [kind.grade(item, text) for item, text in zip(items, texts, strict=True)], texts


def run(model: Llama4, processor: Processor, config: EvalConfig, training_text: Mapping[str, Sequence[str]],
        quiet: bool = False) -> tuple[list[Row], list[dict]]:  # fmt: skip
    """All rows, and some answers with their pictures for the report. Computes in the parameters' own dtype."""
    model.compute_dtype = None
    engine = Engine(model, processor, max_batch=config.batch)
    rows: list[Row] = []
    samples: list[dict] = []

    def add(row: Row) -> None:
        rows.append(row)
        if not quiet:
            chance = "" if row.chance is None else f"  chance {row.chance:.3f}"
            print(f"  {row.name:20} {row.value:.3f} ± {row.stderr or 0:.3f}{chance}", file=sys.stderr, flush=True)

    for part in (_naming, _grounding, _addition, _needle):
        for row in part(engine, processor, config, samples):
            add(row)
    for row in _bits(model, processor, config, training_text):
        add(row)
    return rows, samples


def _sample(samples: list[dict], kind: str, items, texts, grades, count: int) -> None:
    for item, text, grade in islice(zip(items, texts, grades, strict=True), count):
        samples.append({"task": kind, "item": item, "answer": text, "grade": grade})


def _naming(engine, processor, config: EvalConfig, samples: list[dict]):
    goals = config.goals
    for lang in ("en", *(x for x in nursery.LANGUAGES if x != "en")):
        kind = task("naming", lang=lang)
        items = list(islice(kind.items("test", config.seed), config.naming if lang == "en" else config.naming_other))
        grades, texts = graded(engine, kind, items, 24)
        yield share(f"naming/{lang}", grades, kind.chance(items), goals.get(f"naming/{lang}"))
        _sample(samples, f"naming/{lang}", items, texts, grades, 12 if lang == "en" else 1)
        if lang == "en":
            others = shuffled(items, config.seed)
            grades, _ = graded(engine, kind, others, 24)
            yield share("naming/en/shuffled", grades, kind.chance(items), None,
                        "the same questions with another concept's picture: must fall to chance")  # fmt: skip


def _grounding(engine, processor, config: EvalConfig, samples: list[dict]):
    kind = task("grounding")
    items = list(islice(kind.items("test", config.seed), config.grounding))
    grades, texts = graded(engine, kind, items, 48)
    _sample(samples, "grounding", items, texts, grades, 6)
    yield share("grounding/iou50", grades, kind.chance(items), config.goals.get("grounding/iou50"))


def _addition(engine, processor, config: EvalConfig, samples: list[dict]):
    kind = task("addition")
    items = list(islice(kind.items("test", config.seed), config.addition))
    grades, texts = graded(engine, kind, items, 48)
    _sample(samples, "addition", items, texts, grades, 4)
    yield share("addition/2digit", grades, kind.chance(items), config.goals.get("addition/2digit"))


def _needle(engine, processor, config: EvalConfig, samples: list[dict]):
    kind = make_task("needle", processor, config.needle_length, {"tests": config.needle})
    items = list(kind.items("test", config.seed))
    grades, texts = graded(engine, kind, items, 16)
    yield share("needle/2x", grades, kind.chance(items), config.goals.get("needle/2x"),
                f"{config.needle_length} tokens")  # fmt: skip


def _bits(model, processor, config: EvalConfig, training_text: Mapping[str, Sequence[str]]):
    for name in (*nursery.LANGUAGES, "code"):
        documents = (nursery.code("val") if name == "code" else nursery.texts(name, "val"))[: config.documents]
        documents = [d[:20000] for d in documents]
        if not documents:
            continue
        training = training_text["code" if name == "code" else f"text/{name}"]
        chance = unigram_bits_per_byte(processor, training, documents)
        value, n, error = bits_per_byte(model, processor, documents, config.window)
        yield bits(f"bpb/{name}", value, n, error, chance, config.goals.get(f"bpb/{name}"))
