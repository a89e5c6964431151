"""The processes: who am I in the layout's grid, and the groups that talk.

FSDP takes meshes of two dimensions, (copies, shards). The same ranks are seen three ways, by what a parameter is cut by
(layout.py): `full`, `dense` (beside tp) and `expert` (beside ep). All are reshapes of the one order of ranks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from puna.errors import PunaError
from puna.parallel.layout import Layout, world_size

LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|[Tt]imed out|NCCL|Socket|connectFullMesh")


class Mesh:
    """This process among the others of a resolved layout; the default process group exists."""

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", timeout: float = 600.0):
        self.layout, self.device, self.rank = layout, torch.device(device), dist.get_rank()
        self.timeout = timedelta(seconds=timeout)
        n, kind = layout, self.device.type
        self.grid = init_device_mesh(kind, (n.pp, n.dp_replicate, n.dp_shard, n.cp, n.tp),
                                     mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"))  # fmt: skip
        names = ("pp", "copies", "shards")
        shapes = (n.pp, n.dp_replicate)
        self.full = init_device_mesh(kind, (*shapes, n.copy), mesh_dim_names=names)[names[1:]]
        dense = init_device_mesh(kind, (*shapes, n.dp_shard * n.cp, n.tp), mesh_dim_names=(*names, "tp"))
        expert = init_device_mesh(kind, (*shapes, n.copy // n.ep, n.ep), mesh_dim_names=(*names, "ep"))
        row = init_device_mesh(kind, (*shapes, n.dp_shard, n.cp * n.tp), mesh_dim_names=(*names, "row"))
        stage = init_device_mesh(kind, (n.pp, n.dp_replicate * n.copy), mesh_dim_names=("pp", "stage"))
        self.dense, self.expert = dense[names[1:]], expert[names[1:]]
        self.pp, self.cp, self.tp, self.ep = (m.get_group() for m in (
            self.grid["pp"], self.grid["cp"], self.grid["tp"], expert["ep"]))  # fmt: skip
        self.row = row["row"].get_group()  # the cp x tp processes that work on the same rows
        self.stage = stage["stage"].get_group()  # all that have the same blocks
        at = dict(zip(self.grid.mesh_dim_names, self.grid.get_coordinate(), strict=True))
        self.at = at | {"ep": dist.get_rank(self.ep), "row": dist.get_rank(self.row)}
        self.rows_index = at["dp_replicate"] * n.dp_shard + at["dp_shard"]
        # where all wait for what one does alone, however long that takes; a dead process is noticed all the same
        self.patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def union(self, values: list) -> list:
        """What any stage of a pipeline has, sorted; the values as they are where all processes have all blocks."""
        if self.layout.pp == 1:
            return values
        return sorted({value for each in self.exchange(values) for value in each})

    def gather(self, value: Any) -> list | None:
        """Every process's value, in their order, on the main one; None elsewhere."""
        found = [None] * self.layout.world if self.is_main else None
        dist.gather_object(value, found)
        return found

    def exchange(self, value: Any) -> list:
        """Every process's value, in their order, on each."""
        found = [None] * self.layout.world
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return bool(self.sum(torch.tensor(int(flag))))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block on the main process, then on the others: one makes files, all read them."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def wait(self) -> None:
        """Returns when all processes have come here: for what may take longer than a collective's timeout."""
        dist.barrier(self.patient)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: files, progress, warnings."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on each."""
        value = value.detach().to(self.device, copy=True)
        dist.all_reduce(value)
        return value

    def sum_named(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all processes; one that lacks a name adds nothing (only a pipeline's last stage has them)."""
        names = self.union(list(values))
        zero = torch.zeros(())
        summed = self.sum(torch.stack([torch.as_tensor(values.get(name, zero)).double().cpu() for name in names]))
        return dict(zip(names, summed, strict=True))


@contextmanager
def processes(layout: Layout, timeout: float = 600.0) -> Iterator[Mesh]:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and leaves them at the
    end. NCCL beside CUDA, else gloo. timeout: seconds until a process that waits for another gives up. PunaError where
    another process is gone."""
    layout = layout.resolve(world_size())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        yield Mesh(layout, device, timeout)
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        first = re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0][:200]
        raise PunaError(
            f"process {os.environ['RANK']} lost another process ({first}): see what that one said; the same command "
            "goes on from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
