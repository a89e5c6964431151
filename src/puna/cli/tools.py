"""The smaller commands: convert, quantize, report, recipe, tokenizer."""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path

from puna.cli import show
from puna.cli.settings import apply, existing_run, read, run_config
from puna.errors import PunaError
from puna.fields import build, nearest, to_dict


def convert(args) -> None:
    """Writes a model in another format, parameter by parameter; an interrupted one goes on."""
    import torch

    from puna.convert import peft
    from puna.convert.huggingface import HuggingFaceFormat
    from puna.convert.load import identity, open_adapters, with_model
    from puna.convert.meta import MetaFormat
    from puna.convert.puna import CheckpointFormat

    for option, given in (("--shards", args.shards is not None), ("--fp8", args.fp8)):
        if given and args.to != "meta":
            raise PunaError(f"{option} is for --to meta alone")
    target = _new(args.target)
    if args.to == "peft":
        print(f"{target}: {peft.export(*open_adapters(args.source), target):,} parameters of adapters")
        return

    def write(store, processor) -> None:
        form = {
            "hf": lambda: HuggingFaceFormat(processor, origin=getattr(store, "folder", None)),
            "puna": lambda: CheckpointFormat(processor),
            "meta": lambda: MetaFormat(processor, args.shards, args.fp8),
        }[args.to]()
        _write(store, form, target, getattr(torch, args.dtype) if args.dtype else None, identity(store))
        count = sum(map(math.prod, store.shapes().values()))
        print(f"{target}: {count:,} parameters" + ("" if processor else ", without a tokenizer"))

    with_model(args.source, write)


def quantize(args) -> None:
    """Writes a model with its experts as integers, in slices; an interrupted one goes on."""
    from puna.convert.load import identity, with_model
    from puna.convert.puna import CheckpointFormat
    from puna.convert.views import Quantizing
    from puna.precision.quantized import EXPERTS, Quantization

    target = _new(args.target)
    quantization = Quantization(args.to, tuple(args.targets.split(",")) if args.targets else EXPERTS)

    def write(store, processor) -> None:
        view = Quantizing(store, quantization)
        form = CheckpointFormat(processor, quantization=quantization)
        _write(view, form, target, None, f"{identity(store)} {quantization}")
        size = sum(math.prod(shape) * view.dtype(name).itemsize for name, shape in view.shapes().items())
        before = sum(math.prod(shape) * store.dtype(name).itemsize for name, shape in store.shapes().items())
        print(f"{target}: {args.to}, {size / 1e9:,.3f} GB instead of {before / 1e9:,.3f}")

    with_model(args.source, write)
    if args.report:
        _cost(args.source, target, args.to)


def _cost(source: str, target: Path, scheme: str) -> None:
    """Prints what the fewer bits cost, and keeps it beside the weights as cost.json."""
    import puna
    from puna.eval.cost import costs, score
    from puna.processor.files import write_atomic

    def measured(path):
        model, processor = puna.load(path)
        return score(model, processor, progress=lambda name: print(f"  {name}", file=sys.stderr, flush=True))

    print(f"measuring {source}", file=sys.stderr)
    before = measured(source)
    print(f"measuring {target}", file=sys.stderr)
    lines = costs(before, measured(target))
    print(f"{'':20} {'before':>9} {scheme:>9} {'change':>9}")
    for line in lines:
        print(line)
    record = {"source": str(source), "scheme": scheme, "rows": [line.to_dict() for line in lines]}
    write_atomic(target / "cost.json", json.dumps(record, indent=1) + "\n")


def _new(text: str) -> Path:
    """The folder to write, said to be taken before a long check, not after it."""
    target = Path(text)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PunaError(f"{target} exists already: remove it or choose another name")
    return target


def _write(store, form, target: Path, dtype, origin: str) -> None:
    """`write_folder` with a bar."""
    from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TimeRemainingColumn, TransferSpeedColumn

    from puna.convert.folder import write_folder

    columns = (BarColumn(), TaskProgressColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with show.bar(*columns) as bar:
        task = bar.add_task("", total=None)
        write_folder(
            store, form, target, dtype, origin, lambda done, total: bar.update(task, completed=done, total=total)
        )


def report(args) -> None:
    """A run's results, or how far it is; several runs on one page."""
    from puna.eval.compare import compare, configuration
    from puna.eval.record import read_report
    from puna.eval.report import rebuild
    from puna.stages import STAGES

    folders = [existing_run(name) for name in args.folders]
    if len(folders) > 1:
        print(f"report   {compare(folders, Path(args.out or 'compare.html'))}")
        return
    folder = folders[0]
    stages = [stage for stage in STAGES if (folder / stage).is_dir()]
    for stage in stages:
        show.stage(folder / stage)
    path = folder / "report.json"
    if path.is_file():
        print()
        show.report(read_report(folder))
        print(f"\nreport   {args.out or folder / 'report.html'}")
    elif stages:
        print("no evaluation yet: `puna raise` makes report.html at its end")
    else:
        raise PunaError(f"{folder} is no run: it has neither report.json nor a stage's folder")
    if args.out:
        rebuild(folder, Path(args.out), configuration(folder))


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
