"""What all stages share: data, the model to start from, and handing a Job to the one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from puna.convert.layout import SLICE_BYTES, Store
from puna.convert.load import load_base, open_model, with_model
from puna.convert.puna import CheckpointStore
from puna.convert.tensors import fill
from puna.convert.views import View
from puna.data import Batches, build
from puna.errors import PunaError
from puna.eval import answers_evaluation, bpb_evaluation
from puna.fields import to_dict
from puna.model import Llama4, ModelConfig, lora
from puna.processor import Processor
from puna.stages.config import StageRun
from puna.train import Evaluation, Job, checkpoint, train
from puna.train.loop import compute_dtype
from puna.train.metrics import Display
from puna.train.terms import NextToken, Term

if TYPE_CHECKING:  # one process needs no torch.distributed
    from puna.parallel.layout import Part
    from puna.parallel.mesh import Mesh


def fit_model(config: ModelConfig, processor: Processor) -> ModelConfig:
    """The configuration with what only the processor knows: vocabulary size and the patch token's id."""
    tokenizer, image = processor.tokenizer, processor.image
    if config.vision and image is None:
        raise PunaError("the model has a vision tower, but the processor has no image part: give processor.json")
    if config.vision and image.tile != config.vision.image_size:
        raise PunaError(f"processor tiles are {image.tile} px, model.vision.image_size is {config.vision.image_size}")
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)


def start_model(run: StageRun, processor: Processor, init: str | Path | None, stage: Path,
                mesh: Mesh | None = None) -> tuple[Llama4, dict]:  # fmt: skip
    """The model of `init` (fp32 master weights, adapters added), or a new one from the run's seed; or `init` as it is
    with new adapters, and then what to record about it. Goes on with the same base only (PunaError). Of several
    processes each gets its parts."""
    if mesh is not None:
        return _start_parts(run, processor, init, mesh), {}
    if not run.lora.rank:
        if init is None:
            return Llama4(fit_model(run.model, processor), seed=run.seed), {}
        return with_model(init, lambda store, _: fill(store, torch.float32, None)), {}
    begun = checkpoint.newest(stage)
    expected = begun["config"]["base"]["hashes"] if begun and begun["config"].get("base") else None
    model, base = load_base(init, run.lora.base, expected)
    lora.attach(model, run.lora, run.seed)
    return model, {"base": base}


def _start_parts(run: StageRun, processor: Processor, init: str | Path | None, mesh: Mesh) -> Llama4:
    from puna.parallel.apply import build_model

    compute = compute_dtype(run.train.compute_dtype, mesh.device)

    def from_store(store: Store, _) -> Llama4:
        with checkpoint.agreed(mesh):  # before anything in which processes wait for one another
            _verify_share(store, mesh)
        with checkpoint.agreed(mesh):
            return build_model(store.config, mesh, lambda name, part: stored_part(store, name, part), compute=compute)

    if init is not None:
        return with_model(init, from_store)
    return build_model(fit_model(run.model, processor), mesh, run.seed, compute=compute)


def _verify_share(store: Store, mesh: Mesh) -> None:
    """Reads what this process is to verify of a checkpoint of ours; others' formats have no hashes."""
    inner, shapes = store, store.shapes()
    while isinstance(inner, View):
        inner = inner.store
    if isinstance(inner, CheckpointStore):
        sizes = {name: torch.Size(shape).numel() * store.dtype(name).itemsize for name, shape in shapes.items()}
        for name in checkpoint.shared_out(sizes, mesh.layout.world)[mesh.rank]:
            count = shapes[name][0]
            step = max(1, count * SLICE_BYTES // max(1, sizes[name]))
            for start in range(0, count, step):
                store.read(name, start, min(count, start + step))


def stored_part(store: Store, name: str, part: Part) -> torch.Tensor:
    """This process's part of a stored parameter, in float32; the rows it needs are read, and no others."""
    found = torch.empty(part.local)
    for where, own in part.blocks():
        rows = store.read(name, where[0].start, where[0].stop)
        found[own] = rows[(slice(None), *where[1:])].float()
    return found


def run_stage(run: StageRun, folder: Path, processor: Processor, init: str | Path | None = None,
              validation: Mapping[str, list[str]] | None = None, quiet: bool = False,
              read: type[Batches] = Batches, term: Callable[[Llama4], Term] | None = None, only: str = "",
              track: tuple[str, ...] = (), mesh: Mesh | None = None) -> Llama4:  # fmt: skip
    """Trains one stage in `folder`/<stage>, or goes on with it; returns the finished model.

    init: what to start from where the stage has no checkpoint of its own. validation: texts by language for bits per
    byte during training, beside which the model answers a few prompts. read: what makes batches of rows. term: the
    loss, made for the model (None: next token). only: parameters whose names begin otherwise stay as they are. track:
    trackers of its metrics. mesh: the processes that train it together; all call this. Errors: PunaError, with nothing
    half-written.
    """
    if run.lora.rank and init is None:
        raise PunaError("lora.rank: an adapter needs a trained model beside it: give --init MODEL")
    config = fit_model(run.model, processor) if init is None else open_model(init)[0].config
    display = Display(run.stage, 1, quiet=quiet or (mesh is not None and not mesh.is_main))
    rates = run.train.multipliers
    still = config.vision is not None and not (rates["vision"] or rates["sight"] or rates["adapter"])
    if mesh is not None:
        if still:
            raise PunaError(
                "train.lr_vision, lr_sight and lr_adapter of 0 leave the tower out of the backward pass, which one "
                "process does: leave torchrun out, or give one of them a small rate"
            )
        if only or term:
            raise PunaError(f"the stage `{run.stage}` is trained by one process: leave torchrun out")
        if run.lora.rank:
            raise PunaError("lora.rank: adapters are trained by one process: leave torchrun out")
        mesh.layout.check(config, run.data.seq_len, run.train.rows, run.train.accumulate)

    def progress(name: str, done: int, total: int | None) -> None:
        if done == total:
            display.note(f"{run.stage}: data {name}, {done:,} documents")

    display.close()
    if run.data.seq_len > config.max_context:
        raise PunaError(f"data.seq_len {run.data.seq_len} exceeds the model's max_context {config.max_context}")
    # Mistakes in the data are told before a model of any size is read.
    with mesh.main_first() if mesh is not None else nullcontext():
        sources = build(run.data, processor, config.chunk, folder / "data", progress)
    mixture = run.data.mixture({name: len(rows) for name, rows in sources.items()}, run.train.steps, run.train.rows)
    for name, given in mixture.counts(run.train.steps * run.train.rows).items():
        if name.startswith("file:"):
            rows = sources[name]
            left = f"; {rows.dropped} conversations longer than {run.data.seq_len} tokens left out" * bool(rows.dropped)
            display.note(f"{run.stage}: {name}, {len(rows):,} rows, read {given / len(rows):.1f} times{left}")
    model, base = start_model(run, processor, init, folder / run.stage, mesh)
    part = (mesh.rows_index, mesh.layout.rows) if mesh is not None else (0, 1)
    batches = read(sources, mixture, processor, run.train.rows, steps=run.train.steps, seed=run.data.seed, part=part)
    evaluations = ()
    if validation:
        evaluate = bpb_evaluation(processor, validation, window=run.data.seq_len)
        evaluations = (
            Evaluation("bpb", run.train.eval_every, evaluate),
            Evaluation("samples", run.train.eval_every, answers_evaluation(processor)),
        )
    record = to_dict(run) | {"model": config.to_dict(), "init": None if init is None else str(init)} | base
    frozen = [
        parameter for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not name.startswith(only) if only else still and name.startswith("vision."))
    ]  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad_(False)
    job = Job(run.stage, folder / run.stage, model, processor, batches, run.train, record,
              term(model) if term else NextToken(), evaluations, quiet, track, mesh)  # fmt: skip
    model = train(job)
    for parameter in frozen:
        parameter.requires_grad_()
    return model


def is_finished(folder: Path, stage: str) -> bool:
    """Whether a stage's newest checkpoint is its last."""
    run = checkpoint.newest(folder / stage)
    return bool(run and run["finished"])
