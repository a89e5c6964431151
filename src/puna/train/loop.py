"""The one training loop. A stage gives it data, a loss term and a schedule; it does the rest, and nothing else does.

    for step in range(done, steps):
        learning rate  ->  batches(step)  ->  balance of the router (faded)  ->  train_step  ->  metrics
        every so often: evaluate, checkpoint; on SIGTERM or SIGINT: checkpoint and stop

Killed at any moment, the same call goes on from the newest whole checkpoint and ends in bitwise equal weights (same
threads, torch and CPU). A non-finite step changes nothing and is reported; several in a row stop the run.
"""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from puna.data import Batch
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.regions import compiling
from puna.optim import OPTIMIZERS
from puna.optim.adamw import set_lr
from puna.optim.schedule import anneal, wsd
from puna.precision import fp8_training
from puna.train import checkpoint, memory
from puna.train.balance import BALANCING, Balancer, balance_metrics
from puna.train.config import TrainConfig
from puna.train.metrics import Display, MetricsFile, NoMetrics
from puna.train.step import train_step
from puna.train.terms import NextToken, Term
from puna.train.trackers import Tracker
from puna.train.workers import Workers, side_by_side

if TYPE_CHECKING:  # one process needs no torch.distributed
    from puna.parallel.mesh import Mesh


class Stopped(Exception):
    """The run was asked to stop by a signal, has saved a checkpoint, and can be resumed."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; the same command goes on")
        self.code = 128 + number


@dataclass(frozen=True)
class Evaluation:
    """`run(model)` -> {name: value}, called every `every` steps and after the last one. Values are numbers, or what
    else JSON can say; only numbers are shown and tracked."""

    name: str
    every: int
    run: Callable[[Llama4], dict[str, Any]]


@dataclass
class Job:
    """One stage to be trained: what the loop needs and nothing of how it was made."""

    name: str
    folder: Path
    model: Llama4
    processor: Any
    source: Callable[[int], Batch]  # step -> the whole step's batch; micro-batches are cut from it
    train: TrainConfig
    record: dict  # resolved configuration, saved in run.json; record["model"] is the model's
    term: Term = field(default_factory=NextToken)
    evaluations: tuple[Evaluation, ...] = ()
    quiet: bool = False
    track: tuple[str, ...] = ()  # trackers that follow metrics.jsonl (train/trackers.py)
    mesh: Mesh | None = None  # the processes that train together; the main one writes and shows


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the machine multiplies it natively, else float32."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if platform.machine().lower() in ("x86_64", "amd64"):  # there AVX-512 alone counts as support, and is slower
        native = native and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


@contextmanager
def _signals():
    """Collects SIGTERM and SIGINT instead of dying in the middle of a step (main thread only)."""
    received: list[int] = []
    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, lambda n, _: received.append(n))
    except ValueError:  # not the main thread: the caller's business
        pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(job: Job) -> Llama4:
    """Trains (or finishes) a job; returns its model, in evaluation mode, without the router's bias.

    Errors: PunaError when `max_skips` steps in a row are not finite or a checkpoint cannot be written;
    Stopped after a signal. In each case the last good checkpoint is intact.
    """
    config, model = job.train, job.model
    kept = memory.keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    if job.mesh is None:  # else FSDP had to know it before
        model.compute_dtype = compute_dtype(config.compute_dtype, model.tok_embeddings.weight.device)
    optimizer = OPTIMIZERS[config.optimizer](
        model, config.lr, config.weight_decay, (config.beta1, config.beta2), config.eps,
        config.multipliers,
    )  # fmt: skip
    balancer = BALANCING[config.balancing](model, config.balance)
    begun = checkpoint.newest(job.folder)
    was = begun["config"].get("train", {}).get("optimizer", "adamw") if begun else config.optimizer
    if was != config.optimizer and not begun["finished"]:
        raise PunaError(f"{job.folder} was begun with train.optimizer {was}, whose moments {config.optimizer} can't go "
                        f"on from: set train.optimizer {was}, or choose another folder")  # fmt: skip
    run = checkpoint.resume(job.folder, model, optimizer, balancer, job.mesh)
    done = run["step"] if run else 0
    model.recompute = config.recompute
    if run and run["finished"]:
        return _finish(model, balancer)
    fp8_training.attach(model, config.fp8)
    if kept:
        memory.grow_heap(config.heap_mb << 20)
    title = f"{job.folder.resolve().parent.name}/{job.name}"
    main = job.mesh is None or job.mesh.is_main
    trackers = [Tracker(name, job.folder, title, job.record) for name in dict.fromkeys(job.track) if main]
    followers = [tracker.follow for tracker in trackers]
    metrics = MetricsFile(job.folder / "metrics.jsonl", done, followers) if main else NoMetrics()
    display = Display(job.name, config.steps, done, job.quiet or not main)
    try:
        place = next(model.parameters()).device.type
        if config.workers > 1 and (job.mesh is not None or place != "cpu"):
            raise PunaError("train.workers are threads of one process on a CPU: set train.workers 1")
        with (_signals() as received, compiling(config.compile, place), _saver(job) as saver,
              side_by_side(model, config.workers) as workers):  # fmt: skip
            _steps(job, optimizer, balancer, saver, done, metrics, display, received, workers)
    finally:
        metrics.close()
        display.close()
        for tracker in trackers:
            tracker.end()
    return _finish(model, balancer)


def _finish(model: Llama4, balancer: Balancer) -> Llama4:
    balancer.detach()
    fp8_training.detach(model)
    return model.eval()


def _saver(job: Job) -> checkpoint.Saver:
    """Asynchronous where several processes train, unless the configuration says otherwise."""
    config, several = job.train, job.mesh is not None
    asynchronous = several if config.checkpoint_async is None else config.checkpoint_async
    every = config.keep_every * config.checkpoint_every
    return checkpoint.Saver(job.folder, job.mesh, asynchronous, config.keep, every)


def _steps(job: Job, optimizer, balancer, saver, done: int, metrics, display, received: list[int],
           workers: Workers | None) -> None:  # fmt: skip
    config, model, mesh = job.train, job.model, job.mesh
    skips, start, device = 0, time.perf_counter(), next(model.parameters()).device
    for step in range(done, config.steps):
        begin = time.perf_counter()
        model.train()
        multiplier = wsd(step, config.steps, config.warmup, config.decay, config.floor)
        head = wsd(step, config.steps, config.warmup_head or config.warmup, config.decay, config.floor)
        set_lr(optimizer, multiplier, head)
        batch = job.source(step).to(device)
        balancer.apply(anneal(step, config.steps), batch.tokens_BT.numel() * (mesh.layout.rows if mesh else 1))
        waited = time.perf_counter() - begin
        result = train_step(model, optimizer, batch.split(config.accumulate), job.term, config.clip, config.slice, mesh,
                            workers)  # fmt: skip
        if not result.skipped:
            balancer.adjust(result.counts, result.seen)
            balance_metrics(balancer, result.metrics)
        seconds = time.perf_counter() - begin
        read = _read(batch, mesh)
        metrics.write(
            step=step, loss=result.loss, lr=config.lr * multiplier, grad_norm=result.grad_norm, tokens=result.tokens,
            valid=result.valid, seconds=seconds, waited=waited, skipped=result.skipped, **read,
            **result.metrics,
        )  # fmt: skip
        left = (time.perf_counter() - start) / (step + 1 - done) * (config.steps - step - 1)
        display.step(step + 1, result.loss, result.tokens / seconds, left)
        skips = skips + 1 if result.skipped else 0
        if result.skipped:
            display.note(f"{job.name}: step {step} skipped, loss {result.loss} and gradient norm {result.grad_norm}")
        if skips >= config.max_skips:
            raise PunaError(
                f"{job.name}: {skips} steps in a row could not be used (last: step {step}): their loss or gradient was "
                "not finite, or no token in them counts; nothing of them was kept. Lower train.lr or look at the data, "
                "then run again"
            )
        last, stop = step + 1 == config.steps, bool(received) if mesh is None else mesh.any(bool(received))
        _evaluate(job, balancer, step + 1, last, metrics, display)
        if last or stop or (step + 1) % config.checkpoint_every == 0:
            saver.save(step + 1, last, job.record, model, job.processor, optimizer, balancer)
        if last or stop:
            saver.wait()
        if stop:  # after the last step too: what comes behind this stage must not begin
            raise Stopped(received[0] if received else signal.SIGTERM, step)


def _read(batch: Batch, mesh: Mesh | None) -> dict[str, Any]:
    """What a step read: rows and tokens by source, tiles; of all processes, once per row."""
    mine = [batch.sources, batch.source_tokens, {"": 0 if batch.tiles is None else len(batch.tiles)}]
    parts = [mine] if mesh is None else mesh.gather(mine if not mesh.at["row"] and not mesh.at["pp"] else [{}, {}, {}])
    total: list[dict] = [{}, {}, {}]
    for part in parts or ():
        for into, values in zip(total, part, strict=True):
            for name, value in values.items():
                into[name] = into.get(name, 0) + value
    return {"sources": total[0], "source_tokens": total[1], "tiles": total[2].get("", 0)}


def _evaluate(job: Job, balancer, done: int, last: bool, metrics, display) -> None:
    due = [e for e in job.evaluations if last or done % e.every == 0]
    if not due:
        return
    balancer.detach()
    job.model.eval()
    model = job.model
    if job.mesh is not None:
        from puna.parallel.apply import whole_model

        model = whole_model(job.model, job.mesh)
    for evaluation in due if model is not None else ():
        values = evaluation.run(model.eval())
        metrics.write(step=done, eval=evaluation.name, **values)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if isinstance(value, (int, float)))
        if shown:
            display.note(f"{job.name}  step {done}  {evaluation.name}: {shown}")
    if job.mesh is not None:
        job.mesh.wait()
