"""Checkpoints of a running stage: the one format of `convert/puna.py` plus what training needs to go on.

    step-00000200/   model.safetensors, tokenizer.json, processor.json   what `puna.load` reads; of a model with
                     (adapter.safetensors)                                adapters these alone
                     optimizer.safetensors                                moments, balance, random state
                     run.json                                             resolved configuration, step, hash per tensor

A checkpoint is written into a hidden folder, flushed to the disk and renamed: a folder with its final name is whole.
The data needs no state of its own, because its order is a function of the step.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna.convert.layout import finite
from puna.convert.puna import (
    FORMAT,
    STEP,
    CorruptCheckpoint,
    held,
    read_run,
    tensor_hash,
    verify_files,
    write_model,
    write_run,
)
from puna.errors import PunaError
from puna.model import Llama4
from puna.processor.files import sync_folder
from puna.train.balance import Balancer

OPTIMIZER_FILE = "optimizer.safetensors"


def environment() -> dict[str, Any]:
    """What must be equal for a resumed run to end in bitwise equal weights."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu_name()}


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
    """Optimizer moments by parameter name, the balancer's state, torch's random state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {"random_state": torch.get_rng_state()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}/{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    return tensors | {name: tensor.cpu() for name, tensor in balancer.tensors().items()}


def save(stage: Path, step: int, finished: bool, record: dict, model: Llama4, processor, optimizer, balancer,
         mesh=None) -> Path:  # fmt: skip
    """Writes `stage`/step-XXXXXXXX; `step` steps are done. A full disk is a PunaError and leaves nothing behind."""
    target = stage / f"step-{step:08d}"
    work = None
    try:
        stage.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".step-", dir=stage))
        tensors = training_tensors(model, optimizer, balancer)
        save_file(tensors, work / OPTIMIZER_FILE)
        run = {
            "format": FORMAT, "config": record, "step": step, "finished": finished, "environment": environment(),
            "hashes": write_model(model, work), "training_hashes": {k: tensor_hash(v) for k, v in tensors.items()},
        }  # fmt: skip
        if processor is not None:
            processor.save(work)
        write_run(work, run)
        for file in work.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        work.chmod(0o755)
        if target.exists():  # the same step again, after a resume: replace it
            shutil.rmtree(target)
        work.replace(target)
        sync_folder(target.parent)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own error type
        raise PunaError(f"can't write checkpoint {target}: {error}; free some disk space and run again") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise PunaError(f"can't write checkpoint {target}: {error}; free some disk space and run again") from error
        raise
    finally:
        if work is not None and work.exists():
            shutil.rmtree(work, ignore_errors=True)
    return target


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


def _tensors(path: Path, hashes: dict[str, str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except Exception as error:  # any damage of the file, whatever the reader calls it
        raise CorruptCheckpoint(f"{path} can't be read ({error})") from error
    for name in hashes.keys() | tensors.keys():
        if name not in tensors or hashes.get(name) != tensor_hash(tensors[name]):
            raise CorruptCheckpoint(f"{path}: tensor {name} does not match its hash")
        if tensors[name].is_floating_point() and not finite(tensors[name]):
            raise CorruptCheckpoint(f"{path}: tensor {name} holds NaN or infinity, and was saved so")
    return tensors


def restore(folder: Path, model: Llama4, optimizer: torch.optim.Optimizer, balancer: Balancer) -> dict:
    """Reads one checkpoint into a model, its optimizer and its balancer; returns run.json.

    Everything is verified before anything is changed. Errors: CorruptCheckpoint naming file and tensor.
    """
    run = read_run(folder)
    file, parameters = held(model)
    weights = _tensors(folder / file, run["hashes"])
    training = _tensors(folder / OPTIMIZER_FILE, run.get("training_hashes") or {})
    verify_files(folder, run, run.get("files", {}))
    if weights.keys() != parameters.keys():
        name = sorted(weights.keys() ^ parameters.keys())[0]
        raise CorruptCheckpoint(f"{folder}: tensor {name} is missing or unexpected")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, parameter in parameters.items():
        state = {key.split("/", 1)[0]: value for key, value in training.items() if key.split("/", 1)[1:] == [name]}
        if state:
            optimizer.state[parameter] = state
    for name, tensor in balancer.tensors().items():
        if name in training:  # a run that was balanced in another way begins this one's anew
            tensor.copy_(training[name])
    torch.set_rng_state(training["random_state"])
    here = environment()
    different = [k for k in here if (run.get("environment") or {}).get(k) != here[k]]
    if different:
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
           mesh=None) -> dict | None:  # fmt: skip
    """Restores the newest checkpoint that is whole; damaged ones are named in a warning. None: nothing to resume."""
    for folder in steps(stage):
        try:
            return restore(folder, model, optimizer, balancer)
        except CorruptCheckpoint as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
    return None
