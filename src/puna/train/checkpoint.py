"""Checkpoints of a running stage: the one format of `convert/puna.py` plus what training needs to go on.

    step-00000200/   model.safetensors, tokenizer.json, processor.json   what `puna.load` reads; of a model with
                     (adapter.safetensors)                                adapters these alone
                     optimizer.safetensors                                moments, balance, random state
                     run.json                                             resolved configuration, step, hash per tensor

A checkpoint is written into a hidden folder, flushed to the disk and renamed: a folder with its final name is whole.
The data needs no state of its own, because its order is a function of the step.

**Many processes write the very files that one would**, byte for byte. A safetensors file is laid out from shapes alone,
so each process writes the blocks it holds (`parallel.layout.Part`) where they belong, and of copies one. What comes out
depends on no layout: it is loaded, converted and gone on from by any number of processes, each reading its blocks.
torch's own distributed format is a file a process and a pickle that says what lies where: another format to convert
from, and one that can run code.

    process 0       planned ->                    whole ->                     run.json, rename
    all                      blocks -> written ->          -> hashes of some ->

Every tensor is hashed by one process, which has it whole or reads it back. The processes meet through files
(`meeting.py`), not through collectives, so all this can run in a thread beside training (**asynchronous**): then only a
copy of the process's own numbers in memory is waited for. Where one process dies, the others give up after a timeout;
the hidden folder never gets its name.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from puna.convert.layout import SLICE_BYTES, finite
from puna.convert.puna import (
    FORMAT,
    STEP,
    CorruptCheckpoint,
    held,
    read_run,
    tensor_hash,
    verify_files,
    write_run,
)
from puna.convert.stored import Stored, plan_safetensors, read_safetensors
from puna.convert.tensors import parameter_shapes
from puna.errors import PunaError
from puna.fields import to_dict
from puna.model import Llama4
from puna.parallel.layout import Part
from puna.processor.files import sync_folder
from puna.train.balance import Balancer
from puna.train.meeting import GaveUp, Meeting, sweep
from puna.train.step import local

if TYPE_CHECKING:  # one process needs no torch.distributed
    from puna.parallel.mesh import Mesh

OPTIMIZER_FILE = "optimizer.safetensors"


def environment(mesh: Mesh | None = None) -> dict[str, Any]:
    """What must be equal for a resumed run to end in bitwise equal weights."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu_name()}
    return found if mesh is None else found | {"layout": to_dict(mesh.layout)}


def cpu_name() -> str:
    """The processor's model and its widest instruction set, e.g. 'AMD EPYC (AVX512)'."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = found.group(1) if found else name
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def training_tensors(model: Llama4, optimizer: torch.optim.Optimizer, balancer: Balancer) -> dict[str, Tensor]:
    """Optimizer moments by parameter name, the balancer's state, torch's random state; what this process has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {"random_state": torch.get_rng_state()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}/{names[id(parameter)]}"] = local(value.detach())
    return tensors | balancer.tensors()


def parts_of(model: Llama4, parameters: Mapping[str, Tensor]) -> dict[str, Part]:
    """What of each parameter this process has."""
    return {name: model.parts[name] if model.parts else Part.whole(tuple(p.shape)) for name, p in parameters.items()}


Held = dict[str, tuple[Part | None, Tensor]]  # name -> what of the whole it is (None: the same everywhere), numbers


def _held(model: Llama4, optimizer: torch.optim.Optimizer, balancer: Balancer, copy: bool) -> dict[str, Held]:
    """What this process has of each file's tensors, on the CPU; a copy, or perhaps the memory that trains."""
    file, parameters = held(model)
    parts = parts_of(model, parameters)
    found: dict[str, Held] = {file: {name: (parts[name], local(p.detach())) for name, p in parameters.items()}}
    found[OPTIMIZER_FILE] = {}
    for key, tensor in training_tensors(model, optimizer, balancer).items():
        part = parts.get(key.partition("/")[2]) if tensor.dim() else None
        if part is not None and tuple(tensor.shape) != part.local:
            raise PunaError(f"the optimizer's {key} has shape {list(tensor.shape)}, its parameter {list(part.local)}: "
                            "a checkpoint holds numbers and tensors of the parameter's shape")  # fmt: skip
        found[OPTIMIZER_FILE][key] = (part, tensor)
    for tensors in found.values():
        for name, (part, tensor) in tensors.items():
            mine = tensor.cpu().contiguous()
            same = mine.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            tensors[name] = (part, mine.clone() if copy and same else mine)
    return found


@contextmanager
def agreed(mesh: Mesh | None) -> Iterator[None]:
    """A PunaError in this block on one process is raised on all of them; all have to come here."""
    mine = None
    try:
        yield
    except PunaError as error:
        mine = error
    try:
        everyone = [mine] if mesh is None else mesh.exchange(mine)
    except RuntimeError:  # one is dead
        if mine is None:
            raise
        everyone = [mine]
    errors = [error for error in everyone if error is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, GaveUp)), errors[0])


def place(mesh: Mesh | None) -> tuple[int, int]:
    """(index, of): this process among those of the run."""
    return (0, 1) if mesh is None else (mesh.rank, mesh.layout.world)


def shared_out(sizes: Mapping[str, int], of: int) -> list[list[str]]:
    """Names by process, so that each has about as many bytes: the largest first, to whom has least."""
    loads, shares = [0] * of, [[] for _ in range(of)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        shares[least].append(name)
    return shares


def _slices(stored: Stored) -> Iterator[Tensor]:
    """A tensor's rows, some at a time."""
    count = stored.shape[0] if stored.shape else 1
    step = max(1, SLICE_BYTES // max(1, stored.row_size))
    for start in range(0, count, step):
        yield stored.read(start, min(count, start + step))


def save(stage: Path, step: int, finished: bool, record: dict, model: Llama4, processor, optimizer, balancer,
         mesh: Mesh | None = None) -> Path:  # fmt: skip
    """Writes `stage`/step-XXXXXXXX; `step` steps are done. A full disk is a PunaError and leaves nothing behind."""
    return Saver(stage, mesh).save(step, finished, record, model, processor, optimizer, balancer)


@dataclass(frozen=True)
class _Job:
    """A checkpoint to be written."""

    target: Path
    work: Path
    run: dict
    processor: Any
    held: dict[str, Held]
    tables: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]  # file -> all its tensors
    mine: set[str]  # names whose numbers this process writes
    keep: int


class Saver:
    """Writes the checkpoints of a stage; of several processes each has one, and all call its methods together.

    asynchronous: `save` returns when the numbers are copied; a thread writes them. An error of it is a PunaError of the
    next `save` or `wait`, on every process. keep, every: what `prune` leaves behind a new checkpoint (0: all).
    timeout: seconds that processes wait for one another; None: as long as in their collectives.
    """

    def __init__(self, stage: Path, mesh: Mesh | None = None, asynchronous: bool = False, keep: int = 0, every: int = 0,
                 timeout: float | None = None):  # fmt: skip
        self.stage, self.mesh, self.asynchronous, self.keep, self.every = stage, mesh, asynchronous, keep, every
        self.index, self.of = place(mesh)
        self.timeout = timeout or (0.0 if mesh is None else mesh.timeout.total_seconds())
        self.cancelled = Event()
        self.thread: Thread | None = None
        self.error: PunaError | None = None

    def save(self, step: int, finished: bool, record: dict, model: Llama4, processor, optimizer, balancer) -> Path:
        """Writes step-XXXXXXXX, or begins to; `step` steps are done. Errors: PunaError; nothing is left behind."""
        self.wait()
        target, work = self.stage / f"step-{step:08d}", None
        with agreed(self.mesh):
            held = _held(model, optimizer, balancer, self.asynchronous)
        with agreed(self.mesh):
            if self.index == 0:
                try:
                    self.stage.mkdir(parents=True, exist_ok=True)
                    work = Path(tempfile.mkdtemp(prefix=".step-", dir=self.stage))
                    work.chmod(0o755)
                except OSError as error:
                    raise _refused(target, error) from error
        names, tables, mine = self._shared(work and work.name, held)
        run = {"format": FORMAT, "config": record, "step": step, "finished": finished,
               "environment": environment(self.mesh)}  # fmt: skip
        job = _Job(target, self.stage / names[0], run, processor, held, tables, mine, 1 if finished else self.keep)
        if self.asynchronous:
            self.thread = Thread(target=self._run, args=(job,), name=f"checkpoint {step}", daemon=True)
            self.thread.start()
        else:
            self._run(job)
            self.wait()
        return target

    def _shared(self, name: str | None, held: dict[str, Held]):
        """(what each process calls the folder, every file's tensors as the file has them, names that this process
        writes). Of the processes that have the same blocks of the model the first one tells of them."""
        mesh = self.mesh
        shapes = {
            file: {key: (tensor.dtype, part.shape if part else tuple(tensor.shape))
                   for key, (part, tensor) in tensors.items()}
            for file, tensors in held.items()
        }  # fmt: skip
        tells = mesh is None or not any(at for axis, at in mesh.at.items() if axis != "pp")
        said = (name, shapes if tells else {})
        everyone = [said] if mesh is None else mesh.exchange(said)
        mine, tables = set(), {file: {} for file in held}
        for index, (_, told) in enumerate(everyone):
            for file, found in told.items():
                new = found.keys() - tables[file].keys()
                tables[file] |= {key: found[key] for key in new}
                if index == self.index:
                    mine |= {key for key in new if held[file][key][0] is None}
        if mesh is None or not mesh.at["dp_replicate"]:
            mine |= {key for tensors in held.values() for key, (part, _) in tensors.items() if part is not None}
        for file, table in tables.items():  # wide numbers first, as the library does, so that all are aligned
            tables[file] = dict(sorted(table.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        return [name for name, _ in everyone], tables, mine

    def wait(self) -> None:
        """Returns when the last checkpoint is whole. Errors: PunaError, on every process."""
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        try:
            with agreed(self.mesh):
                if error is not None:
                    raise error
        finally:
            if self.index == 0:
                sweep(self.stage)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind, *_) -> None:
        """Behind an error that all processes share, the checkpoint under way is finished; else it is given up."""
        if kind is not None and not issubclass(kind, PunaError):
            self.cancelled.set()
        if self.thread is not None:
            self.thread.join()

    def _run(self, job: _Job) -> None:
        meeting = Meeting(job.work, self.index, self.timeout, self.cancelled)
        try:
            self._write(job, meeting)
            if self.index == 0 and self.keep:
                prune(self.stage, job.keep, job.run["step"], self.every)
        except BaseException as error:
            late = meeting.gone.exists()  # then this is what came of another's error
            meeting.give_up()
            if late and isinstance(error, Exception):
                self.error = GaveUp(f"can't write checkpoint {job.target}: another process gave it up")
            elif isinstance(error, PunaError):
                self.error = type(error)(f"can't write checkpoint {job.target}: {error}")
            elif isinstance(error, OSError | RuntimeError):
                self.error = _refused(job.target, error)
            elif isinstance(error, Exception) and self.thread is not None:
                self.error = PunaError(f"can't write checkpoint {job.target}: {type(error).__name__}: {error}")
            else:
                sweep(self.stage)
                raise

    def _write(self, job: _Job, meeting: Meeting) -> None:
        main = self.index == 0
        if main:
            for file, table in job.tables.items():
                plan_safetensors(job.work / file, table)
            if job.processor is not None:
                job.processor.save(job.work)
            meeting.say("planned")
        meeting.hear("planned")
        stored = {file: read_safetensors(job.work / file) for file in job.tables}
        for file, tensors in job.held.items():
            for name, (part, tensor) in tensors.items():
                if name in job.mine:
                    for where, own in (part or Part.whole(tuple(tensor.shape))).blocks():
                        stored[file][name].write_block(where, tensor[own])
            _flush(job.work / file)
        meeting.say("written")
        if main:
            meeting.hear("written", range(self.of))
            meeting.say("whole")
        meeting.hear("whole")
        meeting.say("hashes", {file: self._hashes(stored[file], job.held[file]) for file in stored})
        if main:
            self._finish(job, meeting)

    def _hashes(self, stored: dict[str, Stored], held: Held) -> dict[str, str]:
        """Hashes of this process's share of a file's tensors."""
        found = {}
        for name in shared_out({name: each.size for name, each in stored.items()}, self.of)[self.index]:
            tensor = held[name][1] if name in held else None
            if tensor is not None and tuple(tensor.shape) == stored[name].shape:
                found[name] = tensor_hash(tensor)
            else:
                digest = hashlib.sha256()
                for rows in _slices(stored[name]):
                    digest.update(rows.view(-1).view(torch.uint8).numpy().data)
                found[name] = digest.hexdigest()
        return found

    def _finish(self, job: _Job, meeting: Meeting) -> None:
        said = meeting.hear("hashes", range(self.of))
        meeting.clear()
        weights, training = ({name: found[name] for name in job.tables[file]} for file, found in (
            (file, {n: h for each in said for n, h in each[file].items()}) for file in job.tables))  # fmt: skip
        write_run(job.work, job.run | {"hashes": weights, "training_hashes": training})
        for path in job.work.iterdir():
            _flush(path)
        if job.target.exists():  # the same step again, after a resume: replace it
            shutil.rmtree(job.target)
        job.work.replace(job.target)
        sync_folder(job.target.parent)


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _refused(target: Path, error: Exception) -> PunaError:
    return PunaError(f"can't write checkpoint {target}: {error}; free some disk space and run again")


def steps(stage: Path) -> list[Path]:
    """Checkpoint folders of a stage, newest first."""
    found = [p for p in stage.glob("step-*") if p.is_dir() and STEP.search(p.name)] if stage.is_dir() else []
    return sorted(found, key=lambda p: int(STEP.search(p.name).group(1)), reverse=True)


def prune(stage: Path, keep: int, done: int, every: int = 0) -> None:
    """Removes all but the newest `keep` checkpoints up to step `done` and those at a multiple of `every` steps (0:
    none), what lies beyond it (damaged, or the run would not have gone back behind it), and what a killed writer left.
    """
    found = [(int(STEP.search(p.name).group(1)), p) for p in steps(stage)]
    within = [(step, p) for step, p in found if step <= done]
    kept = within[:keep] + [(step, p) for step, p in within if every and step % every == 0]
    for step_and_path in found:
        if step_and_path not in kept:
            shutil.rmtree(step_and_path[1], ignore_errors=True)
    for stale in stage.glob(".step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _table(path: Path) -> dict[str, Stored]:
    try:
        return read_safetensors(path)
    except PunaError as error:
        raise CorruptCheckpoint(f"{path} can't be read ({error})") from error


def _verify(path: Path, table: dict[str, Stored], hashes: dict[str, str], index: int, of: int) -> None:
    """Reads the index-th of `of` shares of a file's tensors. Errors: CorruptCheckpoint."""
    sizes = {name: table[name].size if name in table else 0 for name in hashes.keys() | table.keys()}
    for name in shared_out(sizes, of)[index]:
        digest, good = hashlib.sha256(), True
        for rows in _slices(table[name]) if name in table else ():
            digest.update(rows.view(-1).view(torch.uint8).numpy().data)
            good = good and (not rows.is_floating_point() or finite(rows))
        if name not in table or hashes.get(name) != digest.hexdigest():
            raise CorruptCheckpoint(f"{path}: tensor {name} does not match its hash")
        if not good:
            raise CorruptCheckpoint(f"{path}: tensor {name} holds NaN or infinity, and was saved so")


def _cut(stored: Stored, part: Part) -> Tensor:
    """The part of a stored tensor, of which no more is read."""
    found = torch.empty(part.local, dtype=stored.dtype)
    for where, own in part.blocks():
        found[own] = stored.read_block(where)
    return found


def _state(stored: Stored, parameter: Tensor, part: Part) -> Tensor:
    """An optimizer's tensor as it keeps it: sharded like its parameter, or a number."""
    if stored.shape != part.shape:
        return stored.read().to(parameter.device)
    found = torch.empty_like(parameter.detach(), dtype=stored.dtype)
    local(found).copy_(_cut(stored, part))
    return found


def restore(folder: Path, model: Llama4, optimizer: torch.optim.Optimizer, balancer: Balancer,
            mesh: Mesh | None = None) -> dict:  # fmt: skip
    """Reads one checkpoint into a model, its optimizer and its balancer; returns run.json.

    Of several processes each verifies a share of the tensors and reads its own parts. Everything is verified before
    anything is changed. Errors: CorruptCheckpoint naming file and tensor, on every process.
    """
    index, of = place(mesh)
    with agreed(mesh):
        run = read_run(folder)
        file, parameters = held(model)
        weights, training = _table(folder / file), _table(folder / OPTIMIZER_FILE)
        _verify(folder / file, weights, run["hashes"], index, of)
        _verify(folder / OPTIMIZER_FILE, training, run.get("training_hashes") or {}, index, of)
        if index == 0:
            verify_files(folder, run, run.get("files", {}))
        parts = parts_of(model, parameters)
        expected = {n: p.shape for n, p in parts.items()} if mesh is None else parameter_shapes(model.config)
        for name in sorted(weights.keys() | expected.keys()):
            if name not in weights or name not in expected or weights[name].shape != expected[name]:
                raise CorruptCheckpoint(f"{folder}: tensor {name} is missing or unexpected")
    with agreed(mesh), torch.no_grad():
        for name, parameter in parameters.items():
            local(parameter).copy_(_cut(weights[name], parts[name]))
        optimizer.state.clear()
        for key, stored in training.items():
            kind, _, name = key.partition("/")
            if name in parameters:
                optimizer.state[parameters[name]][kind] = _state(stored, parameters[name], parts[name])
        for name, tensor in balancer.tensors().items():
            if name in training:  # a run that was balanced in another way begins this one's anew
                tensor.copy_(training[name].read())
    torch.set_rng_state(training["random_state"].read())
    here, there = environment(mesh), run.get("environment") or {}
    different = [k for k in here | there if there.get(k) != here.get(k)]
    if different and index == 0:
        warnings.warn(
            f"resuming {folder.name} with another {', '.join(different)}: the run goes on, but not bitwise as before",
            stacklevel=2,
        )
    return run


def newest(stage: Path) -> dict | None:
    """run.json of the newest readable checkpoint of a stage, or None."""
    for folder in steps(stage):
        try:
            return read_run(folder)
        except CorruptCheckpoint:
            continue
    return None


def resume(stage: Path, model: Llama4, optimizer: torch.optim.Optimizer, balancer: Balancer,
           mesh: Mesh | None = None) -> dict | None:  # fmt: skip
    """Restores the newest checkpoint that is whole; damaged ones are named in a warning. None: nothing to resume.
    Several processes take the same one, of those that the main one sees."""
    found = steps(stage)
    for folder in found if mesh is None else mesh.exchange(found)[0]:
        try:
            return restore(folder, model, optimizer, balancer, mesh)
        except CorruptCheckpoint as error:
            if place(mesh)[0] == 0:
                warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None
