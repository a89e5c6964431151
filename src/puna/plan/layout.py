"""How ranks are laid out, and which layouts a model allows.

    world = dp_replicate x dp_shard x cp x tp x pp          ep divides dp_shard x cp

Neighbouring ranks differ in tp first, then cp, dp_shard, dp_replicate and pp, so that what talks most stays in a node.
Experts are spread over `ep` ranks of dp_shard x cp; what is left of that product shards each expert's own matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from puna.errors import PunaError
from puna.fields import nearest
from puna.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard(self) -> int:
        """Ranks that every parameter outside the experts is sharded over."""
        return self.dp_shard * self.cp

    @property
    def expert_shard(self) -> int:
        """Ranks that the matrices of one expert are sharded over."""
        return self.shard // self.ep

    def __str__(self) -> str:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one rank"


def parse(text: str) -> Layout:
    """The layout of `--layout dp_shard=8,tp=2`; what isn't named is 1."""
    names, sizes = [f.name for f in dataclasses.fields(Layout)], {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in names:
            raise PunaError(f"--layout has no {name!r}; did you mean {nearest(name, names)!r}?")
        if not size.isdigit() or int(size) < 1:
            raise PunaError(f"--layout {name} must be a whole number from 1 on, got {size!r}")
        sizes[name] = int(size)
    return Layout(**sizes)


def obstacle(config: ModelConfig, layout: Layout, seq_len: int) -> str | None:
    """Why this model can't be laid out so; None if it can."""
    c = config
    for name, size, what, count in (
        ("tp", layout.tp, "n_heads", c.n_heads), ("tp", layout.tp, "n_kv_heads", c.n_kv_heads),
        ("pp", layout.pp, "n_layers", c.n_layers),
        ("ep", layout.ep, "n_experts", c.n_experts if c.moe_layers else 1),
        ("ep", layout.ep, "dp_shard x cp", layout.shard),
    ):  # fmt: skip
        if count % size:
            return f"{name}={size} does not divide {what} = {count}"
    if layout.cp > 1 and seq_len % (layout.cp * c.chunk):
        return f"cp={layout.cp} gives no rank whole chunks of {c.chunk} in rows of {seq_len} tokens"
    return None


def divisors(n: int) -> list[int]:
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def layouts(config: ModelConfig, world: int, seq_len: int, node: int) -> Iterator[Layout]:
    """All layouts of `world` ranks that the model allows, tensor parallelism kept inside nodes."""
    for pp in divisors(world):
        for tp in divisors(world // pp):
            if tp > node or config.n_layers % pp or config.n_kv_heads % tp:
                continue
            for cp in divisors(world // pp // tp):
                dp = world // pp // tp // cp
                for dp_shard in (n for n in divisors(dp) if n <= 1024 or n == dp):
                    for ep in divisors(dp_shard * cp):
                        layout = Layout(dp // dp_shard, dp_shard, cp, tp, pp, ep)
                        if obstacle(config, layout, seq_len) is None:
                            yield layout
                        elif cp > 1 and ep == 1:
                            break
