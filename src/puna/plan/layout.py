"""Which layouts (`puna.parallel.Layout`) a model allows on so many GPUs, and how the command line names one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from puna.errors import PunaError
from puna.fields import nearest
from puna.model import ModelConfig
from puna.parallel.layout import Layout

ONE = Layout(dp_shard=1)


def describe(layout: Layout) -> str:
    sizes = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one rank"


def parse(text: str) -> Layout:
    """The layout of `--layout dp_shard=8,tp=2`; what isn't named is 1, dp_shard what is left."""
    names, sizes = [f.name for f in dataclasses.fields(Layout)], {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in names:
            raise PunaError(f"--layout has no {name!r}; did you mean {nearest(name, names)!r}?")
        if not size.isdigit() or int(size) < 1:
            raise PunaError(f"--layout {name} must be a whole number from 1 on, got {size!r}")
        sizes[name] = int(size)
    return Layout(**sizes)


def check(config: ModelConfig, layout: Layout, world: int, seq_len: int) -> Layout:
    """The layout with dp_shard known. PunaError: this model, or so many GPUs, can't be laid out so."""
    try:
        found = layout.resolve(world)
        found.check(config, seq_len, found.rows * found.pp, found.pp)
        return found
    except PunaError as error:
        raise PunaError(f"--layout: {error}") from None


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def layouts(config: ModelConfig, world: int, seq_len: int, node: int) -> Iterator[Layout]:
    """Layouts of `world` ranks that the model allows: tensor parallelism inside nodes, stages of equal length, of one,
    two or four runs of blocks."""
    experts = config.n_experts if config.moe_layers else 1
    for pp in (n for n in divisors(world) if config.n_layers % n == 0):
        turns = [v for v in (1, 2, 4) if config.n_layers % (pp * v) == 0] if pp > 1 else [1]
        for tp in (n for n in divisors(world // pp) if n <= node):
            for cp in (n for n in divisors(world // pp // tp) if n == 1 or seq_len % (n * config.chunk) == 0):
                dp = world // pp // tp // cp
                for dp_shard in (n for n in divisors(dp) if n <= 1024 or n == dp):
                    for ep in (n for n in divisors(dp_shard * cp * tp) if experts % n == 0):
                        for v in turns:
                            layout = Layout(dp // dp_shard, dp_shard, cp, tp, pp, ep, v)
                            try:
                                layout.check(config, seq_len, layout.rows * pp, pp)
                            except PunaError:
                                continue
                            yield layout
