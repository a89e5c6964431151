"""TensorBoard, trackio and Weights & Biases follow metrics.jsonl; they never lead.

The file is the truth of a run and is always written. A tracker is told the numbers of each of its lines, in order, and
notes beside the file how many it was told (`.track-NAME`), so a resumed run repeats none, and one that is first asked
for in the middle is told the past. What a resumed run computes again is bitwise what was sent, so nothing is corrected.

A tracker that is missing or can't begin is an error before the first step; one that fails later is warned of and left,
and training goes on.
"""

from __future__ import annotations

import json
import math
import uuid
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from puna.errors import PunaError
from puna.processor.files import write_atomic

Log = Callable[[int, dict[str, float]], None]
MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "puna"


def check(names: tuple[str, ...]) -> None:
    """PunaError for a tracker that is unknown or not installed."""
    for name in names:
        if name not in MODULES:
            raise PunaError(f"unknown tracker {name!r}: choose from {', '.join(MODULES)}")
        try:
            import_module(MODULES[name])
        except Exception as error:  # a package that is there and broken says so in its own way
            raise PunaError(f"--track {name} can't be used ({error}): pip install 'puna[track]'") from error


def numbers(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a line, nested ones named by their path: `router/layers/entropy/3`."""
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            yield name, float(value)
        elif isinstance(value, dict):
            yield from numbers(value, f"{name}/")
        elif isinstance(value, list) and all(isinstance(each, (int, float)) for each in value):
            yield from numbers(dict(enumerate(value)), f"{name}/")


class Tracker:
    """One of `MODULES`, following the metrics of the stage in `folder`."""

    def __init__(self, name: str, folder: Path, title: str, config: dict):
        check((name,))
        self.name, self.place, self.seen, self.failed = name, folder / f".track-{name}", 0, False
        state = {"id": uuid.uuid4().hex[:12], "sent": 0}
        try:
            state |= json.loads(self.place.read_text(encoding="utf-8"))
        except FileNotFoundError:  # the first time
            pass
        except (OSError, ValueError) as error:
            raise PunaError(
                f"{self.place} can't be read ({error}): remove it, and {name} is told all lines of the stage once more"
            ) from error
        self.state = state
        try:
            self.log, self.close = OPEN[name](folder, title, state["id"], config)
        except Exception as error:
            raise PunaError(f"--track {name} can't begin: {error}; mend that, or leave it out") from error
        write_atomic(self.place, json.dumps(state))

    def follow(self, line: dict[str, Any]) -> None:
        """Takes the next line of metrics.jsonl: nothing is raised, and none is taken twice."""
        self.seen += 1
        if self.failed or self.seen <= self.state["sent"]:
            return
        self.state["sent"] = self.seen
        try:
            self._note()
            self.log(line["step"], dict(numbers({k: v for k, v in line.items() if k != "step"})))
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"{self.name} failed ({error}): the run goes on without it; metrics.jsonl has all", stacklevel=3
            )

    def _note(self) -> None:
        """Whole or not at all if the process is killed; a step doesn't wait for the disk, as `write_atomic` would."""
        new = self.place.with_name(f"{self.place.name}.new")
        new.write_text(json.dumps(self.state), encoding="utf-8")
        new.replace(self.place)

    def end(self) -> None:
        """Lets the tracker finish what it holds."""
        try:
            self.close()
        except Exception as error:
            warnings.warn(f"{self.name} could not end ({error}); metrics.jsonl has all", stacklevel=3)


def _tensorboard(folder: Path, title: str, id: str, config: dict) -> tuple[Log, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard")

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _trackio(folder: Path, title: str, id: str, config: dict) -> tuple[Log, Callable]:
    import trackio

    # Its runs go by name, and a stage that was begun afresh must not go on in the old one: the id is part of it.
    run = trackio.init(project=PROJECT, name=f"{title} {id[:6]}", config=config, resume="allow", embed=False,
                       auto_log_gpu=False, auto_log_cpu=False)  # fmt: skip
    return lambda step, values: run.log(values, step=step), run.finish


def _wandb(folder: Path, title: str, id: str, config: dict) -> tuple[Log, Callable]:
    import wandb

    run = wandb.init(project=PROJECT, name=title, id=id, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="step")  # its own counter would drop an evaluation's line of the same step
    return lambda step, values: run.log(values | {"step": step}), run.finish


OPEN = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}
