"""`puna raise`: a whole life in miniature, the stages in order, each step named while it runs.

    data check -> tokenizer -> [vision ->] pretrain -> midtrain -> sft -> evaluation -> report.html, report.json

Every step leaves its result in the run's folder and is skipped when it is already there, so the same command goes on
after any interruption. `--minutes N` becomes numbers of steps once, before anything else: the recipe's steps times
N / recipe minutes, times how fast this machine is against the recipe's, within a factor of two either way. They are
written into config.json, and nothing looks at the clock afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch

from puna import nursery
from puna.convert.tensors import read_json
from puna.data import Batch
from puna.errors import PunaError
from puna.eval import record, report, suite
from puna.fields import build, differences, to_dict
from puna.lock import lock
from puna.model import Llama4
from puna.optim import build_adamw
from puna.processor.files import write_atomic
from puna.stages import RUN, RunConfig, make_processor
from puna.stages.common import fit_model, is_finished
from puna.train import memory
from puna.train.loop import compute_dtype
from puna.train.step import train_step
from puna.train.terms import NextToken
from puna.train.workers import side_by_side

CONFIG = "config.json"


def say(text: str, quiet: bool) -> None:
    """Names the step that begins."""
    if not quiet:
        print(f"\n{text}", file=sys.stderr, flush=True)


def probe(run: RunConfig, steps: int = 3) -> float:
    """Training tokens per second of this machine on the recipe's own model and batch (random tokens)."""
    part = run.pretrain
    memory.keep_freed_memory()
    model = Llama4(run.model, seed=run.seed)
    model.compute_dtype = compute_dtype(part.train.compute_dtype, model.tok_embeddings.weight.device)
    optimizer = build_adamw(model, 1e-4, 0.1, (0.9, 0.95), 1e-8)
    shape = (part.train.rows, part.data.seq_len)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, run.model.vocab_size, shape, generator=generator)
    docs = (torch.arange(shape[1]) // 64).expand(shape).contiguous()
    batch = Batch(tokens, tokens, torch.ones(shape, dtype=torch.bool), docs, None, (0,) * shape[0],
                  ("probe",) * shape[0], tuple(range(shape[0])))  # fmt: skip
    model.train()
    batches, seconds = batch.split(part.train.accumulate), []
    with side_by_side(model, part.train.workers) as workers:
        for _ in range(steps):
            begin = time.perf_counter()
            train_step(model, optimizer, batches, NextToken(), 1.0, part.train.slice, workers=workers)
            seconds.append(time.perf_counter() - begin)
    return tokens.numel() / min(seconds)


def for_minutes(run: RunConfig, minutes: float, speed: float) -> RunConfig:
    """The recipe for another duration: steps of every stage scaled once, by time and by this machine's speed.

    speed: measured tokens per second; only its ratio to `run.speed` counts, held within 1/2..2.
    """
    if not 0 < minutes < math.inf:
        raise PunaError(f"--minutes must be positive and finite, got {minutes}")
    scale = minutes / run.minutes * min(2.0, max(0.5, speed / run.speed))
    changed = {}
    for name in run.stages:
        part = getattr(run, name)
        steps = max(2, round(part.train.steps * scale))
        options = {
            source: values | ({"items": max(64, round(values["items"] * min(4.0, scale)))} if "items" in values else {})
            for source, values in part.data.options.items()
        }
        changed[name] = dataclasses.replace(
            part,
            data=dataclasses.replace(part.data, options=options),
            train=dataclasses.replace(
                part.train, steps=steps, warmup=max(1, round(part.train.warmup * min(1.0, scale))),
                checkpoint_every=max(1, round(part.train.checkpoint_every * scale)),
                eval_every=max(1, round(part.train.eval_every * scale)),
            ),
        )  # fmt: skip
    evaluation = suite.smaller(run.eval) if minutes < run.minutes / 4 else suite.for_minutes(run.eval, minutes)
    return dataclasses.replace(run, minutes=minutes, eval=evaluation, **changed)


def resolve(run: RunConfig, folder: Path, minutes: float | None) -> RunConfig:
    """The configuration of this run: what config.json says where it exists, else the recipe's, then written there.

    Errors: PunaError naming the fields in which an existing run differs.
    """
    path = folder / CONFIG
    if path.is_file():
        saved = read_json(path)
        asked = {"recipe": to_dict(run), "minutes": minutes}
        different = differences(saved["asked"], asked)
        if different:
            raise PunaError(
                f"{folder} was begun with another {', '.join(different[:4])}: "
                "choose another --name, or --fresh to start over"
            )
        return build(RunConfig, saved["run"])
    resolved = run if minutes is None else for_minutes(run, minutes, probe(run))
    text = json.dumps({"asked": {"recipe": to_dict(run), "minutes": minutes}, "run": to_dict(resolved)}, indent=1)
    write_atomic(path, text + "\n")
    return resolved


def raise_model(run: RunConfig, folder: Path, minutes: float | None = None, fresh: bool = False,
                quiet: bool = False, track: tuple[str, ...] = ()) -> dict:  # fmt: skip
    """Raises a model in `folder`; returns what report.json holds. A finished run is only read."""
    with lock(folder):
        if fresh:
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        say(f"1/{4 + len(run.stages)} data: checking the nursery", quiet)
        nursery.verify()
        run = resolve(run, folder, minutes)
        if (folder / "report.json").is_file() and all(is_finished(folder, s) for s in run.stages):
            return record.read_report(folder)
        begin = time.perf_counter()
        last = 4 + len(run.stages)
        say(f"2/{last} tokenizer", quiet)
        processor = make_processor(run.tokenizer, run.model.vision, folder / "tokenizer", run.seed)
        model, seconds = None, {"tokenizer": time.perf_counter() - begin}
        validation = {lang: nursery.texts(lang, "val")[:1] for lang in nursery.LANGUAGES}
        for number, name in enumerate(run.stages, 3):
            say(f"{number}/{last} {name}: {getattr(run, name).train.steps} steps", quiet)
            begin = time.perf_counter()
            stage = run.stage(name).with_model(fit_model(run.model, processor))
            model = RUN[name](stage, folder, processor, validation=validation, quiet=quiet, track=track)
            seconds[name] = time.perf_counter() - begin
        say(f"{last - 1}/{last} evaluation", quiet)
        begin = time.perf_counter()
        training_text = {f"text/{lang}": nursery.texts(lang) for lang in nursery.LANGUAGES}
        rows, samples = suite.run(model, processor, run.eval, training_text | {"code": nursery.code()}, quiet=quiet)
        seconds["evaluation"] = time.perf_counter() - begin
        say(f"{last}/{last} report", quiet)
        return report.write(folder, rows, samples, run, seconds)
