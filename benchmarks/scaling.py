"""What 1, 2 and 4 processes send in a training step, against the planner's formulas; what a cluster would make of it.

    python benchmarks/scaling.py --out scaling.json            (about 10 minutes on two busy cores)
    python benchmarks/scaling.py --quick --out scaling.json    (a few layouts)

Processes on one machine share its cores, so their speed says nothing. Two things are measured instead.

**Volume.** A meter sits in torch's dispatcher and counts every collective of one `train_step`: bytes a process sends,
on a ring (plan/communication.py), by what they are for. The planner is asked for the same rank of the same layout; only
the experts' rows depend on the data, so there the formula is given the routing counts that were measured. Equal means
equal: the goal is a difference of 0 bytes. Sums of a few numbers (counts, losses, norms) and features of pictures are
not in the formulas and are reported beside.

**Equality.** Each layout's loss, of the same rows and the same seed, against that of one process.

**Simulated**: the time of a step on n machines as fast as this one, from a measured step of one process here and the
planner's bytes over links of a *stated* speed. No such cluster was used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from puna import recipes
from puna.data import Batch
from puna.eval.record import commit, device, plain, versions
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.model.moe import moe_layers
from puna.parallel.layout import Layout
from puna.plan import communication, hardware
from puna.plan.memory import PRECISIONS, Schedule
from puna.testing.distributed import Pool
from puna.train.step import train_step
from puna.train.terms import NextToken

T, ROWS, CHUNK, PATCH = 64, 8, 16, 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout to be measured. kind: of model; precision: one of the planner's."""

    world: int
    layout: dict
    micros: int = 2
    kind: str = "scout"
    precision: str = "float32"
    recompute: int = 0

    @property
    def config(self) -> ModelConfig:
        experts = dict(n_experts=8, moe_step=2, qk_norm=False) if self.kind == "maverick" else dict(
            n_experts=4, moe_step=1, qk_norm=True)  # fmt: skip
        tower = VisionConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=24, adapter_width=20)
        return ModelConfig(
            vocab_size=66, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=8, expert_width=24, dense_width=40,
            chunk=CHUNK, max_context=4 * T, patch_token=PATCH if self.kind == "pictures" else None,
            vision=tower if self.kind == "pictures" else None, **experts,
        )  # fmt: skip

    @property
    def whole(self) -> Layout:
        return Layout(**self.layout).resolve(self.world)

    @property
    def schedule(self) -> Schedule:
        tiles = 1.0 if self.kind == "pictures" else 0.0
        return Schedule(ROWS // self.whole.rows // self.micros, self.micros, self.recompute, tiles=tiles)


CASES = {
    "one": Case(1, {}),
    "fsdp2": Case(2, {}),
    "fsdp4": Case(4, {}, kind="maverick"),
    "fsdp2, mixed": Case(2, {}, precision="mixed"),
    "fsdp2, bfloat16": Case(2, {}, precision="bfloat16"),
    "copies": Case(2, dict(dp_replicate=2)),
    "hsdp": Case(4, dict(dp_replicate=2)),
    "ep2": Case(2, dict(ep=2)),
    "ep4": Case(4, dict(ep=4), kind="maverick"),
    "ep2 fsdp4": Case(4, dict(ep=2)),
    "tp2": Case(2, dict(tp=2)),
    "tp2, recomputed": Case(2, dict(tp=2, ep=2), kind="maverick", recompute=1),
    "tp2 fsdp2, mixed": Case(4, dict(tp=2), precision="mixed"),
    "tp2 ep4": Case(4, dict(tp=2, ep=4)),
    "cp2": Case(2, dict(cp=2)),
    "cp4, recomputed": Case(4, dict(cp=4), recompute=2),
    "cp2 tp2": Case(4, dict(cp=2, tp=2)),
    "pp2": Case(2, dict(pp=2), micros=4),
    "pp2, two runs each": Case(2, dict(pp=2, pp_chunks=2), micros=4, kind="maverick"),
    "pp4": Case(4, dict(pp=4), micros=8, kind="maverick"),
    "pp2 fsdp2": Case(4, dict(pp=2), micros=4),
    "pp2 copies": Case(4, dict(pp=2, dp_replicate=2), micros=4),
    "pp2 ep2, two runs each": Case(4, dict(pp=2, pp_chunks=2, ep=2), micros=2),
    "pp2 tp2, mixed": Case(4, dict(pp=2, tp=2), micros=4, precision="mixed"),
    "pictures, fsdp2": Case(2, {}, kind="pictures"),
    "pictures, tp2": Case(2, dict(tp=2), kind="pictures"),
    "pictures, pp2 fsdp2": Case(4, dict(pp=2), micros=2, kind="pictures"),
}
QUICK = ("one", "fsdp2, mixed", "hsdp", "ep2 fsdp4", "tp2, recomputed", "cp2", "pp2 fsdp2", "pp2 ep2, two runs each")


# ---- counting


def _bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))


def _exchanged(x, group, splits) -> float:
    rows = splits[group.rank()] if splits else len(x) / group.size()
    return _bytes(x) * (1 - rows / len(x)) if len(x) else 0.0


SENT = {  # an operation of torch.distributed: its group's place among the arguments, what a process sends on a ring
    "_allgather_base_": (2, lambda a, g: (g.size() - 1) * _bytes(a[1])),
    "_reduce_scatter_base_": (2, lambda a, g: (g.size() - 1) * _bytes(a[0])),
    "allreduce_": (1, lambda a, g: 2 * (g.size() - 1) / g.size() * _bytes(a[0])),
    "alltoall_base_": (2, lambda a, g: _exchanged(a[1], g, a[4])),
    "allgather_": (2, lambda a, g: (g.size() - 1) * _bytes(a[1])),
    "send": (1, lambda a, g: _bytes(a[0])),
    "recv_": (1, lambda a, g: 0.0),
}


def _purpose(operation: str) -> str:
    """What a collective is for, from the code that asked for it. A backward asks for what its forward was."""
    frame, noted = sys._getframe(2), None
    while frame is not None:
        file, called = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("_fsdp_param_group.py"):
            name = frame.f_locals["self"]._module_fqn or ""
            if operation == "allreduce_":
                found = "HSDP"
            elif name.endswith(".experts"):
                found = "FSDP experts"
            else:
                found = "FSDP" if name.endswith((".attention", ".shared", ".feed_forward")) else "FSDP rest"
        elif file.endswith("parallel/collectives.py") and called in ("forward", "backward"):
            noted, found = frame.f_locals["ctx"], None
            if called == "backward" and hasattr(noted, "purpose"):
                found = noted.purpose
        else:
            found = {
                "parallel/expert.py": "experts", "parallel/apply.py": "tensor", "parallel/pipeline.py": "pipeline",
                "parallel/mesh.py": "sums", "parallel/context.py": "pictures" if called == "features" else "context",
            }.get("/".join(file.split("/")[-2:]))  # fmt: skip
            if found == "pictures" and operation == "allreduce_":
                found = "sums"  # whether any process has a picture
        if found:
            if noted is not None:
                noted.purpose = found
            return found
        frame = frame.f_back
    raise RuntimeError(f"nobody asked for {operation}")


class Meter(TorchDispatchMode):
    """Adds up bytes sent and calls, by purpose, of whatever runs inside."""

    def __init__(self):
        super().__init__()
        self.sent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name not in SENT:
                raise RuntimeError(f"the meter doesn't know {name}")
            place, count = SENT[name]
            group = dist.ProcessGroup.unbox(args[place])
            if group.size() > 1 and name != "recv_":
                purpose = _purpose(name)
                self.sent[purpose] += count(args, group)
                self.calls[purpose] += 1
        return func(*args, **(kwargs or {}))


def make_batch(config: ModelConfig) -> Batch:
    """Rows of one document of random tokens; with a tower, one tile in every row."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (ROWS, T), generator=random)
    tiles = None
    if config.vision:
        tokens[:, 4 : 4 + config.vision.tokens_per_tile] = PATCH
        tiles = torch.rand(ROWS, 3, 16, 16, generator=random)
    valid = torch.ones(ROWS, T, dtype=torch.bool)
    valid[:, -1] = False
    docs = torch.zeros(ROWS, T, dtype=torch.int64)
    return Batch(tokens, torch.roll(tokens, -1, 1), valid, docs, tiles, (int(tiles is not None),) * ROWS, ("x",) * ROWS,
                 tuple(range(ROWS)))  # fmt: skip


def measure(rank: int, case: Case, before: int = 3) -> dict:
    """A step of a case on this process, after `before` others: loss, bytes, calls, rows that its tokens sent to each
    expert by layer."""
    from puna.parallel.apply import build_model
    from puna.parallel.mesh import Mesh

    mesh = Mesh(case.whole)
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    model = build_model(case.config, mesh, 1, dtype, torch.bfloat16 if case.precision == "mixed" else None)
    model.recompute = case.recompute
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    routed: dict[int, torch.Tensor] = {}

    def note(moe, _, __):
        if torch._C._current_graph_task_id() == -1:  # not what a backward computes again
            routed[layer[moe]] = routed.get(layer[moe], 0) + moe.counts_E

    batches = make_batch(case.config).split(mesh.layout.rows)[mesh.rows_index].split(case.micros)
    for _ in range(before):  # FSDP's own preparations; a head that starts at zero learns to send gradients back
        train_step(model, optimizer, batches, NextToken(), 1e9, 1024, mesh)
    layer = {block.moe: i for i, block in enumerate(model.layers) if hasattr(block, "moe")}
    for moe in moe_layers(model):
        moe.register_forward_hook(note)
    with Meter() as meter:
        result = train_step(model, optimizer, batches, NextToken(), 1e9, 1024, mesh)
    return {
        "loss": result.loss, "sent": dict(meter.sent), "calls": dict(meter.calls), "stage": mesh.at["pp"],
        "routed": {i: n.tolist() for i, n in routed.items()}, "ep": dist.get_process_group_ranks(mesh.ep),
    }  # fmt: skip


# ---- against the plan


def planned(case: Case, results: list[dict], rank: int) -> dict[str, tuple[float, int]]:
    """(bytes, calls) by purpose that the planner says this rank sends; experts' rows from the routes measured."""
    config, layout, precision = case.config, case.whole, PRECISIONS[case.precision]
    plan = communication.step(config, layout, case.schedule, precision, T, results[rank]["stage"])
    found = {name: (each.sent, each.calls) for name, each in plan.items()}
    if layout.ep > 1:
        group, sent = results[rank]["ep"], 0.0
        for i in results[rank]["routed"]:
            rows = communication.leaving([results[r]["routed"][i] for r in group], layout.ep)[group.index(rank)]
            forwards = 1 + (case.recompute > 0 and i % case.recompute == 0)
            sent += communication.expert_rows(config, *rows, precision.compute, forwards)
            sent += case.micros * forwards * communication.expert_counts(config, layout)
        found["experts"] = (sent, found["experts"][1])
    return found


BESIDE = ("sums", "pictures")  # what the formulas leave out


def compare(case: Case, results: list[dict]) -> dict[str, dict]:
    """By purpose, of the rank that differs most (of those the one that sends most): bytes sent and planned, calls."""
    table: dict[str, dict] = {}
    for rank, result in enumerate(results):
        plan = planned(case, results, rank)
        for name in {*plan, *result["sent"]} - {*BESIDE}:
            (expected, calls), ours = plan.get(name, (0.0, 0)), result["sent"].get(name, 0.0)
            row = {"rank": rank, "ours": ours, "peer": expected, "calls": (result["calls"].get(name, 0), calls)}
            row["off"] = abs(ours - expected)
            if name not in table or (row["off"], ours) > (table[name]["off"], table[name]["ours"]):
                table[name] = row
    return table


# ---- a simulated cluster

LINKS = {"1 Gb/s": 0.125, "25 Gb/s": 3.125, "400 Gb/s": 50.0}  # GB/s of a machine's one adapter


def step_seconds(config: ModelConfig, rows: int, seq_len: int, steps: int) -> list[float]:
    """Seconds of training steps on this process alone, random tokens, in float32."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (rows, seq_len), generator=random)
    valid = torch.ones(rows, seq_len, dtype=torch.bool)
    batch = Batch(tokens, torch.roll(tokens, -1, 1), valid, torch.zeros_like(tokens), None, (0,) * rows, ("x",) * rows,
                  tuple(range(rows)))  # fmt: skip
    model = Llama4(config).train()
    optimizer, seconds = torch.optim.AdamW(model.parameters(), fused=True), []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        train_step(model, optimizer, [batch], NextToken(), 1.0, 1024)
        seconds.append(time.perf_counter() - begin)
    return seconds[2:]


def projected(config: ModelConfig, layout: Layout, rows: int, seq_len: int, link: float) -> float:
    """Seconds that a machine of its own for each rank would send for in a step; nothing hides behind computing."""
    table = hardware.load()
    machine = dataclasses.replace(table.gpus["laptop"], network=link)
    cluster = hardware.Cluster(layout.world, machine, table.assumptions)
    traffic = communication.step(config, layout, Schedule(rows), PRECISIONS["float32"], seq_len)
    return sum(cluster.seconds(t.sent, t.calls, t.group, t.stride, t.exchange) for t in traffic.values())


# ---- the report


def row(name: str, value: float, unit: str, n: int = 1, goal: float | None = None, **more) -> dict:
    """Lower is better."""
    return {"name": name, "value": value, "unit": unit, "n": n, "stderr": None, "chance": None, "goal": goal,
            "met": None if goal is None else value <= goal,
            "ours": None, "peer": None, "ratio": None} | more  # fmt: skip


def volumes(names) -> list[dict]:
    """Measured against planned, and losses against one process."""
    rows = []
    with Pool(4) as pool:
        alone = {kind: pool.run(measure, 1, Case(1, {}, 1, kind), timeout=600)[0]["loss"]
                 for kind in sorted({CASES[name].kind for name in names})}  # fmt: skip
        for name in names:
            case = CASES[name]
            results = pool.run(measure, case.world, case, timeout=600)
            for purpose, each in sorted(compare(case, results).items()):
                ours, peer = each["ours"], each["peer"]
                rows.append(row(f"{name}: {purpose}", each["off"], "bytes off the plan", case.world, 0.0, ours=ours,
                                peer=peer, ratio=ours / peer if peer else None, calls=each["calls"]))  # fmt: skip
            for purpose in BESIDE:
                most = max(result["sent"].get(purpose, 0.0) for result in results)
                if most:
                    rows.append(row(f"{name}: {purpose}", most, "bytes, not planned", case.world, ours=most))
            one = alone[case.kind]
            off = max(abs(result["loss"] - one) / one for result in results)
            goal = 1e-5 if case.precision == "float32" else 1e-2
            rows.append(row(f"{name}: loss", off, "relative to one process", case.world, goal, ours=results[0]["loss"],
                            peer=one, ratio=results[0]["loss"] / one))  # fmt: skip
            print(f"{name:24} loss off by {off:.1e}; " + ", ".join(
                f"{r['name'].split(': ')[1]} {r['ours']:,.0f}" + ("" if r["met"] in (True, None) else
                f" (planned {r['peer']:,.0f})") for r in rows if r["name"].startswith(f"{name}: ")
                and "bytes" in r["unit"]), flush=True)  # fmt: skip
    return rows


def simulated(steps: int, rows: int = 4) -> list[dict]:
    """Steps of nano_scout on clusters of machines like this one."""
    recipe = recipes.get("nano_scout")
    config, seq_len = dataclasses.replace(recipe.model, vision=None, patch_token=None), recipe.pretrain.data.seq_len
    seconds = step_seconds(config, rows, seq_len, steps)
    one = statistics.median(seconds)
    found = [row("measured: one process", one, "s a step", len(seconds), tokens_per_second=rows * seq_len / one,
                 stderr=statistics.stdev(seconds) / len(seconds) ** 0.5)]  # fmt: skip
    for world in (2, 4, 16):
        for layout in (Layout(dp_shard=world), Layout(dp_shard=world, ep=min(world, config.n_experts))):
            for link, speed in LINKS.items():
                sending = projected(config, layout, rows, seq_len, speed)
                found.append(row(f"simulated: {world} machines, ep {layout.ep}, {link}", one + sending, "s a step",
                                 ours=world * one / (one + sending), peer=1.0, ratio=world * one / (one + sending),
                                 sending=sending))  # fmt: skip
    for each in found:
        print(f"{each['name']:44} {each['value']:8.3f} s a step" + (
            f", {each['ratio']:.2f} times one machine's speed" if each["ratio"] else ""), flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON result")
    parser.add_argument("--quick", action="store_true", help="a few layouts, fewer steps")
    args = parser.parse_args()
    begin = time.perf_counter()
    rows = volumes(QUICK if args.quick else CASES) + simulated(3 if args.quick else 7)
    config = {"rows": ROWS, "seq_len": T, "chunk": CHUNK, "links": LINKS, "load": os.getloadavg(), "cases": {
        name: dataclasses.asdict(case) for name, case in CASES.items()}}  # fmt: skip
    result = {"commit": commit(), "versions": versions(), "device": device(), "config": config,
              "seconds": round(time.perf_counter() - begin, 1), "results": rows}  # fmt: skip
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")
    part.replace(args.out)
    goals = [each["met"] for each in rows if each["met"] is not None]
    print(f"{sum(goals)} of {len(goals)} goals met")


if __name__ == "__main__":
    main()
