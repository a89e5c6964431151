"""The smaller commands: convert, report, recipe, data, tokenizer."""

from __future__ import annotations

import inspect
import json
import sys
from itertools import islice, pairwise
from pathlib import Path

from puna.cli import show
from puna.cli.settings import apply, existing_run, read, run_config
from puna.errors import PunaError
from puna.fields import build, nearest, to_dict

SHOWN = 400  # characters of a sample


def convert(args) -> None:
    """Writes a model in another format, parameter by parameter; an interrupted one goes on."""
    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from puna.convert.folder import write_folder
    from puna.convert.huggingface import HuggingFaceFormat
    from puna.convert.load import identity, open_model
    from puna.convert.meta import MetaFormat
    from puna.convert.puna import CheckpointFormat

    for option, given in (("--shards", args.shards is not None), ("--fp8", args.fp8)):
        if given and args.to != "meta":
            raise PunaError(f"{option} is for --to meta alone")
    target = Path(args.target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):  # said before a long check, not after it
        raise PunaError(f"{target} exists already: remove it or choose another name")
    store, processor = open_model(args.source)
    form = {
        "hf": lambda: HuggingFaceFormat(processor),
        "puna": lambda: CheckpointFormat(processor),
        "meta": lambda: MetaFormat(processor, 8 if args.shards is None else args.shards, args.fp8),
    }[args.to]()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("")
        write_folder(
            store, form, target, getattr(torch, args.dtype) if args.dtype else None, identity(store),
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    count = sum(shape.numel() for shape in store.shapes().values())
    print(f"{target}: {count:,} parameters" + ("" if processor else ", without a tokenizer"))


def report(args) -> None:
    """A run's results, or how far it is."""
    from puna.eval.record import read_report
    from puna.stages import STAGES

    folder = existing_run(args.folder)
    stages = [stage for stage in STAGES if (folder / stage).is_dir()]
    for stage in stages:
        show.stage(folder / stage)
    path = folder / "report.json"
    if path.is_file():
        print()
        show.report(read_report(folder))
        print(f"\nreport   {folder / 'report.html'}")
    elif stages:
        print("no evaluation yet: `puna raise` makes report.html at its end")
    else:
        raise PunaError(f"{folder} is no run: it has neither report.json nor a stage's folder")


def recipe_ls(args) -> None:
    """All recipes, each with the first line of its docstring."""
    from puna.recipes import RECIPES

    show.table(("recipe", "what it raises"),
               [(name, inspect.getdoc(make).splitlines()[0]) for name, make in RECIPES.items()])  # fmt: skip


def recipe_show(args) -> None:
    """The resolved settings, in a form that can be given back as a .json."""
    from puna.stages import RunConfig, StageRun

    values, one_stage, _ = read(args.recipe)
    run = build(StageRun if one_stage else RunConfig, apply(values, args.overrides))
    print(json.dumps(to_dict(run), indent=1))


def recipe_cp(args) -> None:
    """Writes the module of a recipe, whole, with a `recipe()` at its end."""
    from puna.processor.files import write_atomic
    from puna.recipes import RECIPES

    target = Path(args.file)
    if args.recipe not in RECIPES:
        raise PunaError(f"unknown recipe {args.recipe!r}; did you mean {nearest(args.recipe, RECIPES)!r}?")
    if target.suffix != ".py":
        raise PunaError(f"{target}: a recipe is a .py file")
    if target.exists():
        raise PunaError(f"{target} exists already: remove it or choose another name")
    code = inspect.getsource(sys.modules[RECIPES[args.recipe].__module__])
    last = (
        'def recipe(minutes: float | None = None) -> RunConfig:\n    """This file\'s own recipe."""\n'
        f"    return {args.recipe}(minutes)\n"
    )
    write_atomic(target, f"{code.rstrip()}\n\n\n{last}")
    print(f"{target}: change it, then `puna raise {target} --name NAME`")


def data_ls(args) -> None:
    """All sources, the nursery's languages with their sizes, its origins with their licences."""
    from puna import nursery
    from puna.data.sources import names

    manifest = nursery.manifest()
    print("sources (with file:PATH for text, JSONL or Parquet of your own)")
    groups: dict[str, list[str]] = {}
    for name in names():
        group, slash, rest = name.partition("/")
        groups.setdefault(group + slash, []).append(rest)
    show.table(("name", "of"), [(group, " ".join(rest)) for group, rest in groups.items()])
    print()
    columns = ("train_bytes", "train_documents", "val_bytes", "val_documents", "prose_bytes")
    show.table(
        ("text", *(column.replace("_", " ") for column in columns)),
        [(lang, *(f"{entry.get(c, 0):,}" for c in columns)) for lang, entry in manifest["languages"].items()],
    )
    print(f"\n{len(nursery.concepts()):,} things in {len(nursery.STYLES_TRAIN)} + 1 styles of pictures\n")
    show.table(("origin", "licence", "what"),
               [(name, s["licence"], s["title"]) for name, s in manifest["sources"].items()])  # fmt: skip


def data_show(args) -> None:
    """A recipe's mixture, or samples of a source."""
    from puna.recipes import RECIPES

    if args.name in RECIPES or args.name.endswith((".py", ".json")):
        _show_mixture(args.name)
    else:
        _show_source(args.name, args.split, args.samples)


def _show_mixture(recipe: str) -> None:
    from puna.data import DataConfig

    values, one_stage, _ = read(recipe)
    parts = {k: v for k, v in values.items() if isinstance(v, dict) and "data" in v and "train" in v}
    for name, part in ({values["stage"]: values} if one_stage else parts).items():
        data, steps, rows = build(DataConfig, part["data"], "data."), part["train"]["steps"], part["train"]["rows"]
        mixture = data.mixture(dict.fromkeys(data.used, rows * steps), steps, rows)
        for first, last in pairwise([*data.begins(steps), steps]):
            when = f"steps {first:,} to {last:,}, " if data.then else ""
            total = (last - first) * rows
            print(f"{name}: {when}{total:,} rows of {data.seq_len} tokens")
            before, after = mixture.counts(first * rows), mixture.counts(last * rows)
            given = {source: after[source] - before[source] for source in mixture.names}
            show.table(("source", "share of rows", "rows"),
                       [(k, f"{100 * v / total:.1f} %", v) for k, v in given.items() if v])  # fmt: skip
            print()


def _show_source(name: str, split: str, samples: int) -> None:
    from puna import tasks
    from puna.data.sources import names, texts

    if name not in names() and not name.startswith("file:"):
        raise PunaError(f"unknown data source {name!r}; did you mean {nearest(name, names())!r}? See `puna data ls`")
    if name in tasks.DOCUMENTS:
        for segments in islice(tasks.DOCUMENTS[name]().documents(), samples):
            _sample("".join(s if isinstance(s, str) else _drawn(s) for s in segments))
    elif name.startswith("sft/"):
        if name == "sft/needle":
            task = tasks.task("needle", length=2000, count=len)
        else:
            task = tasks.task(name.removeprefix("sft/"))
        for item in islice(task.items("test" if split == "val" else "train"), samples):
            _sample("\n".join(f"{m['role']}: {_content(m['content'])}" for m in item.messages))
    else:
        documents = texts(name, split)
        size = sum(len(text.encode()) for text in documents)
        print(f"{name} ({split}): {len(documents):,} documents, {size:,} bytes of UTF-8\n")
        for text in documents[:samples]:
            _sample(text)


def _sample(text: str) -> None:
    print(text[:SHOWN] + (f" … ({len(text):,} characters)" if len(text) > SHOWN else ""))
    print("-" * 40)


def _drawn(picture) -> str:
    w, h = picture.size
    return f"[picture {w}x{h} {picture.to_json()}]"


def _content(content) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else _drawn(part["image"]) for part in content)


def tokenizer_train(args) -> None:
    """Trains the tokenizer of a recipe into a folder of its own."""
    from puna.stages import make_processor

    folder = Path(args.out)
    if (folder / "tokenizer.json").exists():
        raise PunaError(f"{folder} holds a tokenizer already: choose another --out")
    run = run_config(args)
    processor = make_processor(run.tokenizer, run.model.vision, folder, run.seed)
    print(f"{folder / 'tokenizer.json'}: {processor.tokenizer.vocab_size:,} tokens")


def tokenizer_stats(args) -> None:
    """Bytes per token and tokens per word on held-out text, by language, beside other tokenizers'."""
    import time

    from puna.eval.fertility import CHARACTERS, load_tokenizer, measure, result_rows
    from puna.eval.record import result_json
    from puna.processor.files import write_atomic

    begun, files = time.perf_counter(), [str(_tokenizer_file(Path(args.tokenizer))), *args.against]
    names = [args.tokenizer, *args.against]
    if len(set(names)) < len(names):
        raise PunaError("each tokenizer can be measured once: leave the repeated --against out")
    fits = {}
    for name, file in zip(names, files, strict=True):
        tokenizer = load_tokenizer(file)
        print(f"{name}: {tokenizer.vocab_size:,} tokens")
        fits[name] = measure(tokenizer)
    for name, measured in fits.items():
        print(f"\n{name}")
        show.table(
            ("text", "bytes", "tokens", "bytes per token", f"tokens to {names[0]}'s", "tokens per word"),
            [(fit.name, f"{fit.bytes:,}", f"{fit.tokens:,}", f"{fit.bytes_per_token:.3f}",
              f"{fit.tokens / first.tokens:.3f}",
              f"{fit.fertility:.3f}" + (" per character" if fit.unit == CHARACTERS else ""))
             for fit, first in zip(measured, fits[names[0]], strict=True)],
        )  # fmt: skip
    if args.out:
        config = {"tokenizer": args.tokenizer, "against": args.against}
        values = result_json(result_rows(fits), config, time.perf_counter() - begun)
        write_atomic(args.out, json.dumps(values, indent=1) + "\n")


def _tokenizer_file(path: Path) -> Path:
    from puna.convert.load import STAGES, checkpoints

    folders = [path, path / "tokenizer", *checkpoints(path)]
    for stage in STAGES:
        folders += checkpoints(path / stage)
    names = ("tokenizer.json", "tokenizer.model")
    for file in (path, *(folder / name for folder in folders for name in names)):
        if file.is_file():
            return file
    raise PunaError(f"there is no tokenizer.json at {path}: train one with `puna tokenizer train --out {path}`")
