"""Pipeline parallelism: each process has some of the blocks, micro-batches pass through them, and back.

    4 processes, 4 micro-batches (1F1B, arXiv 2104.04473)      time ->
    process 0   F0 F1 F2 F3          B0    B1    B2    B3
    process 1      F0 F1 F2       B0 F3 B1    B2    B3
    process 2         F0 F1    B0 F2 B1 F3 B2    B3
    process 3            F0 B0 F1 B1 F2 B2 F3 B3

A process does as many forwards as there are processes behind it, then one forward and one backward in turn, so at most
`pp` micro-batches wait for their backward, however many there are. Idle is (pp - 1) / (micro + pp - 1) of the time.

*Interleaved* (`pp_chunks` v > 1): a process has v runs of blocks, every pp-th of v * pp, and the idle time falls by v
(at v times as many messages). Micro-batches then come in groups of pp.

The order of work (`schedule`) is a pure function. Between two neighbours there is one group of processes for each
direction and kind, so messages of one kind meet in the order of the schedule and no two kinds wait for each other. A
process that waits for a dead one gets an error after the group's timeout.

The first stage embeds and sees pictures, the last one has norm, head and loss; its loss is computed in slices right
after the forward (train/step.py), so that only one micro-batch's logits exist, and its gradient waits with the rest.

**Weights and gradients.** What FSDP shards is gathered once a step and reduced once: a run of blocks keeps its gathered
weights until its last backward, and sums its micro-batches' gradients, whole, in fp32, until then. Sending them for
every micro-batch (as without pipelines) would cost bytes that grow with the micro-batches, of which a pipeline needs
many; the price is 4 bytes of memory a number (arXiv 2104.04473 does the same).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.errors import PunaError
from puna.model import Llama4
from puna.parallel.layout import Layout


@dataclass(frozen=True)
class Work:
    """One thing to do: the forward or backward of a micro-batch through one of this process's runs of blocks."""

    forward: bool
    micro: int
    chunk: int


def schedule(index: int, pp: int, chunks: int, micro: int) -> list[Work]:
    """The order of work of the index-th of `pp` processes. PunaError where micro-batches don't come in groups."""
    if chunks > 1 and micro % pp:
        raise PunaError(f"parallel.pp_chunks {chunks}: train.accumulate {micro} must be a multiple of parallel.pp {pp}")
    total = micro * chunks
    first = pp - 1 - index if chunks == 1 else 2 * (pp - 1 - index) + (chunks - 1) * pp
    warm = min(first, total)

    def work(forward: bool, k: int) -> Work:
        group, within = divmod(k, pp * chunks) if chunks > 1 else (0, k)
        if chunks == 1:
            return Work(forward, k, 0)
        chunk = within // pp
        return Work(forward, group * pp + within % pp, chunk if forward else chunks - 1 - chunk)

    order = [work(True, k) for k in range(warm)]
    for k in range(total - warm):
        order += [work(True, warm + k), work(False, k)]
    return order + [work(False, k) for k in range(total - warm, total)]


def split_layers(n_layers: int, pp: int, chunks: int) -> list[range]:
    """The blocks of each of the pp * chunks stages, in order; what is left over goes to the middle, since the first
    stage embeds and the last one has the head. PunaError where there are fewer blocks than stages."""
    stages = pp * chunks
    if n_layers < stages:
        raise PunaError(f"parallel.pp {pp} x pp_chunks {chunks} exceeds model.n_layers {n_layers}")
    size, left = divmod(n_layers, stages)
    begin = (stages - left) // 2
    found, start = [], 0
    for stage in range(stages):
        stop = start + size + (begin <= stage < begin + left)
        found.append(range(start, stop))
        start = stop
    return found


def own_stages(layout: Layout, n_layers: int, index: int) -> list[range]:
    """The runs of blocks of the index-th process, one a chunk."""
    return split_layers(n_layers, layout.pp, layout.pp_chunks)[index :: layout.pp]


class Pipeline:
    """Runs a step's micro-batches through the stages. All processes make it, in the same order."""

    def __init__(self, mesh, n_layers: int):
        self.mesh, self.layout = mesh, mesh.layout
        self.stages = own_stages(self.layout, n_layers, mesh.at["pp"])
        self.last_block = n_layers
        ranks = torch.arange(mesh.layout.world).view(self.layout.pp, -1)
        self.links: dict[tuple[int, bool], Any] = {}  # (where the activations come from, forward?) -> group
        for column in ranks.T.tolist():
            for at, rank in enumerate(column):
                for forward in (True, False):
                    group = dist.new_group([rank, column[(at + 1) % len(column)]], timeout=mesh.timeout)
                    if mesh.rank in column:
                        self.links[at, forward] = group
        self.column = ranks[:, dist.get_rank(mesh.stage)].tolist()

    def run(self, model: Llama4, batches: Sequence, loss: Callable[[Any, Tensor], Tensor],
            watch: Callable[[], AbstractContextManager] = nullcontext) -> None:  # fmt: skip
        """Forward and backward of all micro-batches; gradients are added to .grad. loss(batch, hidden) returns the
        gradient of the hidden states, and is called on the last stage. watch() surrounds each forward."""
        at, pp, dtype = self.mesh.at["pp"], self.layout.pp, model.dtype
        waiting: dict[tuple[int, int], tuple[Tensor | None, Tensor, Tensor | None]] = {}
        sending: dict[bool, deque[tuple[Any, Tensor]]] = {True: deque(), False: deque()}
        rows, T = batches[0].tokens_BT.shape
        shape = (rows, len(model.share.own(T)), model.config.d_model)

        def send(x: Tensor, edge: int, forward: bool) -> None:
            to = self.column[(edge + 1) % pp if forward else edge]
            x = x.detach().contiguous()
            sending[forward].append((dist.isend(x, to, group=self.links[edge, forward]), x))
            if len(sending[forward]) > pp * (self.layout.pp_chunks + 1):  # so many later, `schedule` has had it taken
                sending[forward].popleft()[0].wait()  # gloo's handles say nothing before that, and keep the memory

        def receive(edge: int, forward: bool) -> Tensor:
            x = torch.empty(shape, dtype=dtype, device=self.mesh.device)
            dist.recv(x, self.column[edge if forward else (edge + 1) % pp], group=self.links[edge, forward])
            return x

        order = schedule(at, pp, self.layout.pp_chunks, len(batches))
        last_of = {work.chunk: work for work in order if not work.forward}
        _reduce(model, False)
        for work in order:
            batch, layers = batches[work.micro], self.stages[work.chunk]
            key, before = (work.micro, work.chunk), (at - 1) % pp
            first, last = layers.start == 0, layers.stop == self.last_block
            if work.forward:
                x = None if first else receive(before, True).requires_grad_()
                with watch():
                    out = model.hidden(batch.tokens_BT, batch.tiles if first else None, batch.doc_ids_BT, x_BTD=x,
                                       layers=layers)  # fmt: skip
                grad = loss(batch, out) if last else None
                if not last:
                    send(out, at, True)
                waiting[key] = (x, out, grad)
            else:
                x, out, grad = waiting.pop(key)
                if work is order[-1]:
                    _reduce(model, True)  # embedding, tower and head as well
                elif work is last_of[work.chunk]:
                    for i in layers:
                        _reduce(model.layers[i], True)
                out.backward(grad if last else receive(at, False))
                if not first:
                    send(x.grad, before, False)
        for handle, _ in (*sending[True], *sending[False]):
            handle.wait()


def _reduce(module, at_next: bool) -> None:
    """Whether FSDP reduces the gradients of all units in a module, and frees their weights, in their next backward."""
    module.set_requires_gradient_sync(at_next)
    module.set_reshard_after_backward(at_next)
