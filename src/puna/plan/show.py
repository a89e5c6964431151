"""Plans as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from puna.fields import to_dict
from puna.model import ModelConfig
from puna.model.lora import LoRAConfig
from puna.plan.flops import flops_per_tile, flops_per_token, parameter_count
from puna.plan.footprint import footprint
from puna.plan.hardware import GIB, Cluster
from puna.plan.layout import describe
from puna.plan.memory import PRECISIONS
from puna.plan.serving import ServingPlan
from puna.plan.training import TrainingPlan, Work

GB = 1e9


def make_console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _table(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def _memory(console: Console, made: TrainingPlan | ServingPlan) -> None:
    rows = [(part, f"{size / GB:,.2f}", f"{size / made.usable:.0%}") for part, size in made.memory.items() if size]
    rows.append(("all", f"{made.used / GB:,.2f}", f"{made.used / made.usable:.0%}"))
    rows.append(("usable", f"{made.usable / GB:,.2f}", ""))
    rows.append(("missing" if made.over > 0 else "left", f"{abs(made.over) / GB:,.2f}", ""))
    _table(console, "memory of the fullest GPU", ("part", "GB", "of usable"), rows)


def model(console: Console, config: ModelConfig, name: str, cluster: Cluster, seq_len: int) -> None:
    count = parameter_count(config)
    work = flops_per_token(config, seq_len) / GB
    console.print(f"{name}: {count.total / GB:,.3f}B parameters, {count.active / GB:,.3f}B active; training takes "
                  f"{work:,.2f} GFLOP a token in rows of {seq_len:,}")  # fmt: skip
    gpu = cluster.gpu
    console.print(f"{cluster.count:,} x {gpu.name}, {gpu.memory - gpu.reserve:.1f} of {gpu.memory} GiB usable, "
                  f"{gpu.bandwidth:,.0f} GB/s, ${gpu.price:.2f} an hour")  # fmt: skip


def training(console: Console, plans: list[TrainingPlan], tokens: float) -> None:
    best = plans[0]
    console.print(f"\n{best.precision}, {describe(best.layout)}: {best.rows:,} rows, {best.tokens:,} tokens a step, "
                  f"{best.schedule.micros:,} micro-batches of {best.schedule.rows} on each rank")  # fmt: skip
    if best.layout.world < best.gpus:
        console.print(f"{best.layout.world:,} of the {best.gpus:,} GPUs compute; the others are spares, and paid for")
    _memory(console, best)
    if not best.fits:
        return
    _table(console, "a step of the slowest rank", ("", "s", "share"),
           [(name, f"{value:.3f}", f"{value / best.step:.0%}") for name, value in best.seconds.items()]
           + [("all", f"{best.step:.3f}", "")])  # fmt: skip
    _table(console, "sent by a rank in a step", ("", "GB", "ranks", "calls"),
           [(name, f"{t.sent / GB:,.3f}", f"{t.group:,}", f"{t.calls:,}") for name, t in best.traffic.items()]
           or [("nothing", "0", "1", "0")])  # fmt: skip
    _layouts(console, "layouts that fit, the fastest first", plans)
    days = best.days(tokens)
    console.print(f"\n{tokens / GB:,.0f}B tokens: {days:,.1f} days, {days * 24 * best.gpus:,.0f} GPU-hours, "
                  f"${best.dollars(tokens):,.0f}")  # fmt: skip


def _layouts(console: Console, title: str, plans: list[TrainingPlan]) -> None:
    head = ("layout", "rows", "recompute", "GB", "step, s", "tokens/s/GPU", "MFU", "$/B tokens")
    rows = []
    for p in plans:
        s = p.schedule
        again = {0: "none", 1: "all"}.get(s.recompute, f"1 in {s.recompute}")
        rows.append((describe(p.layout), str(s.rows), again,
                     f"{p.used / GB:.1f}", f"{p.step:.3f}", f"{p.tokens_per_second / p.gpus:,.0f}", f"{p.mfu:.1%}",
                     f"{p.dollars(1e9):,.2f}"))  # fmt: skip
    _table(console, title, head, rows)


def serving(console: Console, made: ServingPlan) -> None:
    console.print(f"\n{made.precision} weights, {made.weights / GB:,.2f} GB; {made.cache} keys and values, "
                  f"{made.sequence / GIB:,.2f} GiB a sequence of {made.context:,} tokens, {made.batch} at once")
    _memory(console, made)
    if made.fits:
        console.print(f"the longest single sequence that fits: {made.longest:,} tokens")
        head = ("sequences", "tokens/s", "of each", "bound by", "$/M written", "$/M read or written")
        rows = [(str(r.batch), f"{r.tokens_per_second:,.0f}", f"{1 / r.seconds:,.1f}", r.bound,
                 f"{r.dollars_output:,.3f}", f"{r.dollars_blended:,.3f}") for r in made.rates]  # fmt: skip
        _table(console, "decoding: bounds, not measured", head, rows)


def misses(console: Console, config: ModelConfig, made, precisions: list, smallest) -> None:
    """What would fit, for a plan that does not."""
    console.print(f"\nit does not fit: {made.over / GB:,.2f} GB are missing on each GPU")
    here = "; ".join(f"{p.precision} ({p.used / GB:,.1f} GB a GPU)" for p in precisions)
    console.print(f"on these GPUs: {here or 'no other precision fits either'}")
    where = f"{smallest.gpus:,} of these GPUs" if smallest else "no number of these GPUs that was tried"
    layout = f" ({describe(smallest.layout)})" if isinstance(smallest, TrainingPlan) else ""
    console.print(
        f"in {made.precision}: {where}{layout}" + (f", {smallest.used / GB:,.1f} GB a GPU" if smallest else "")
    )
    if isinstance(made, TrainingPlan):
        if smallest:
            _layouts(console, "there", [smallest])
        lora = sum(footprint(config, LoRAConfig(4, base="int4"), 512).values())
        console.print(f"\nadapters of rank 4 beside int4 experts, 512 tokens at once, on one GPU: {lora / GB:,.1f} GB")


def as_json(config: ModelConfig, cluster: Cluster, work, plans: list, precisions: list, smallest) -> dict:
    """Everything as plain values; bytes, seconds, $."""

    def each(made) -> dict:
        values = to_dict(made) | {"used": made.used, "over": made.over, "fits": made.fits}
        if isinstance(made, TrainingPlan):
            return values | {"step": made.step, "tokens_per_second": made.tokens_per_second,
                             "dollars_per_billion_tokens": made.dollars(1e9)}  # fmt: skip
        return values

    count = parameter_count(config)
    values = {
        "fits": plans[0].fits,
        "model": config.to_dict(),
        "parameters": dataclasses.asdict(count) | {"total": count.total},
        "cluster": to_dict(cluster),
        "work": to_dict(work),
        "plans": [each(made) for made in plans],
        "precisions_that_fit": [each(made) for made in precisions],
        "smallest": each(smallest) if smallest else None,
    }
    if isinstance(work, Work):
        values["flops"] = {"per_token": flops_per_token(config, work.seq_len), "per_tile": flops_per_tile(config)}
        values["precision"] = to_dict(PRECISIONS[work.precision])
    return values
