"""What processes do in the tests of distributed checkpoints: hold known numbers, train on, be damaged, fail."""

import os
import signal
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from dist_helpers import awake, batch, config

from puna.data import Batch
from puna.errors import PunaError
from puna.model import Llama4
from puna.optim import OPTIMIZERS
from puna.optim.adamw import set_lr
from puna.parallel.apply import build_model
from puna.parallel.layout import Layout
from puna.parallel.mesh import Mesh, processes
from puna.stages.common import start_model
from puna.stages.config import StageRun
from puna.train import TrainConfig, checkpoint
from puna.train.balance import Bias
from puna.train.step import local, train_step
from puna.train.terms import NextToken

ROWS = 12


def rows(step: int) -> Batch:
    """Twelve rows, some with pictures."""
    parts = [batch(3 * step + i, packed=i != 1, pictures=i == 0) for i in range(3)]
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in
              ("tokens_BT", "targets_BT", "valid_BT", "doc_ids_BT")]  # fmt: skip
    tiles = torch.cat([part.tiles for part in parts if part.tiles is not None])
    return Batch(*joined, tiles, sum((part.tiles_B for part in parts), ()), ("x",) * ROWS, tuple(range(ROWS)))


class State:
    """A model in training, whole or this process's parts of it."""

    def __init__(self, kind: str, layout: dict | None, optimizer: str = "adamw"):
        self.mesh = None if layout is None else Mesh(Layout(**layout).resolve(dist.get_world_size()))
        self.config, weights = config(kind), awake(config(kind), torch.float32)
        if self.mesh is None:
            self.model = Llama4(self.config)
            self.model.load_state_dict(weights)
        else:
            self.model = build_model(self.config, self.mesh, lambda name, part: part.cut(weights[name]))
        self.optimizer = OPTIMIZERS[optimizer](self.model, 1e-2, 0.1, (0.9, 0.99), 1e-8)
        self.balancer, self.done = Bias(self.model, 0.01), 0
        set_lr(self.optimizer, 1.0)

    @property
    def parts(self):
        return checkpoint.parts_of(self.model, dict(self.model.named_parameters()))

    def fill(self) -> "State":
        """Known numbers in everything that a checkpoint holds."""
        for name, parameter in self.model.named_parameters():
            random = torch.Generator().manual_seed(sum(name.encode()))
            moments = [torch.randn(self.parts[name].shape, generator=random) for _ in range(2)]
            if name == "vision.projector.weight":  # never had a gradient
                continue
            state = self.optimizer.state[parameter]
            for key, whole in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                state[key] = torch.empty_like(parameter.detach())
                local(state[key]).copy_(self.parts[name].cut(whole))
            state["step"] = torch.tensor(7.0)
        for i, bias in enumerate(self.balancer.bias):
            bias.fill_(i + 0.5)
        torch.manual_seed(11)
        return self

    def step(self) -> float:
        self.balancer.apply(1.0)
        share = rows(self.done)
        if self.mesh is not None:
            share = share.split(self.mesh.layout.rows)[self.mesh.rows_index]
        result = train_step(self.model.train(), self.optimizer, [share], NextToken(), 1.0, 1000, self.mesh)
        self.balancer.adjust(result.counts, result.seen)
        self.done += 1
        return result.loss

    def saver(self, stage, asynchronous=False, **options) -> checkpoint.Saver:
        return checkpoint.Saver(Path(stage), self.mesh, asynchronous, **options)

    def save(self, saver, finished=False):
        record = {"model": self.config.to_dict()}
        return saver.save(self.done, finished, record, self.model, None, self.optimizer, self.balancer)

    def resume(self, stage) -> dict | None:
        run = checkpoint.resume(Path(stage), self.model, self.optimizer, self.balancer, self.mesh)
        self.done = run["step"] if run else 0
        return run


def write_known(rank, kind, layout, stage, asynchronous=False):
    """Everything filled in, then a checkpoint; what `save` blocked for is overwritten at once, as training would."""
    state = State(kind, layout).fill()
    with state.saver(stage, asynchronous) as saver:
        state.save(saver)
        if asynchronous:
            with torch.no_grad():
                for tensor in (*state.model.parameters(), *(s["exp_avg"] for s in state.optimizer.state.values())):
                    local(tensor).zero_()
        saver.wait()


def compare_known(rank, kind, layout, stage):
    """Resumes on this layout; names of what is not as `fill` made it."""
    state, known = State(kind, layout), State(kind, layout).fill()
    with torch.no_grad():
        for parameter in state.model.parameters():
            local(parameter).fill_(9)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert state.resume(stage)["step"] == 0
    wrong = [] if torch.equal(torch.get_rng_state(), torch.manual_seed(11).get_state()) else ["random state"]
    wrong += [f"balance {i}" for i, (a, b) in enumerate(zip(state.balancer.bias, known.balancer.bias, strict=True))
              if not torch.equal(a, b)]  # fmt: skip
    others = dict(known.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        mine, theirs = state.optimizer.state.get(parameter, {}), known.optimizer.state.get(others[name], {})
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            assert type(mine[key]) is type(theirs[key]) and mine[key].dtype == theirs[key].dtype, (name, key)
        pairs = [(parameter.detach(), others[name].detach()), *((mine[key], theirs[key]) for key in mine)]
        wrong += [name for a, b in pairs if not torch.equal(local(a), local(b))]
    return wrong


def train_on(rank, kind, layout, stage, until, asynchronous=True, optimizer="adamw", **options):
    """Resumes what there is, trains, with a checkpoint behind every step; the losses."""
    state = State(kind, layout, optimizer)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another layout
        state.resume(stage)
    losses = {}
    with state.saver(stage, asynchronous, keep=2, **options) as saver:
        while state.done < until:
            step = state.done
            losses[step] = state.step()
            state.save(saver, state.done == until)
        saver.wait()
    return losses


def starts_from(rank, layout, init):
    """What --init gives this process: (names of parts that are not the model's, or the error; warnings)."""
    mesh = Mesh(Layout(**layout).resolve(dist.get_world_size()))
    run = StageRun("pretrain", "x", config("maverick"), None, None, TrainConfig(compute_dtype="float32"))
    weights = awake(config("maverick"), torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model, _ = start_model(run, None, init, Path("nowhere"), mesh)
        except PunaError as error:
            return str(error), []
    wrong = [name for name, p in model.named_parameters()
             if not torch.equal(local(p.detach()), model.parts[name].cut(weights[name]))]  # fmt: skip
    return wrong, [str(w.message) for w in caught]


def resumes(rank, kind, layout, stage):
    """(what restoring the newest checkpoint raised, step resumed from, warnings)."""
    state = State(kind, layout)
    raised = ""
    try:
        folder = checkpoint.steps(Path(stage))[0]
        checkpoint.restore(folder, state.model, state.optimizer, state.balancer, state.mesh)
    except PunaError as error:
        raised = f"{type(error).__name__}: {error}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = state.resume(stage)
    return raised, run and run["step"], [str(w.message) for w in caught]


def fails(rank, kind, layout, stage, who, how, asynchronous):
    """A second checkpoint in which one process fails; (error, files left behind). The third one is whole."""
    state = State(kind, layout).fill()
    saver = state.saver(stage, asynchronous, timeout=6.0)
    state.done = 1
    state.save(saver)
    saver.wait()
    original = checkpoint.Stored.write_block

    def full(*_):
        raise OSError(28, "No space left on device")

    if rank == who and how == "disk":
        checkpoint.Stored.write_block = full
    if rank == who and how == "silent":
        saver._write = lambda *_: None
    state.done, error = 2, ""
    try:
        state.save(saver)
        saver.wait()
    except PunaError as caught:
        error = str(caught)
    checkpoint.Stored.write_block = original
    saver.__dict__.pop("_write", None)
    dist.barrier()
    left = sorted(path.name for path in Path(stage).iterdir())
    dist.barrier()
    state.done = 3
    state.save(saver)
    saver.wait()
    return error, left


def main(rank: int, port: int, errors: str, stage: str, asynchronous: bool, killed: bool) -> None:
    """A process of a job of two: three steps. killed: process 1 is, while it writes the second step's checkpoint."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    with processes(Layout(), timeout=60):
        if rank == 1 and killed:
            original = checkpoint.Stored.write_block

            def write_block(self, *given):
                if (Path(stage) / "step-00000001").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                original(self, *given)

            checkpoint.Stored.write_block = write_block
        train_on(rank, "scout", {}, stage, 3, asynchronous, timeout=6.0)
