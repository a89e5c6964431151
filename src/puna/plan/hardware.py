"""GPUs, their links and prices, from a TOML file that users copy and edit (`hardware.toml` is the one that ships)."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from puna.errors import PunaError
from puna.fields import build, nearest

GIB = 2**30
SHIPPED = Path(__file__).with_name("hardware.toml")


@dataclass(frozen=True)
class Gpu:
    """One kind of device; units in hardware.toml."""

    name: str
    memory: float
    reserve: float
    bandwidth: float
    bf16: float
    fp8: float
    fp32: float
    mfu: float
    mfu_fp8: float
    node: int
    link: float
    network: float
    price: float
    source: str = ""

    def __post_init__(self):
        for name in ("memory", "bandwidth", "node"):
            if not getattr(self, name) > 0:
                raise PunaError(f"{self.name}: {name} must be positive, got {getattr(self, name)}")

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return (self.memory - self.reserve) * GIB

    def flops(self, kind: str) -> float:
        """FLOP/s that layers reach with products in "bf16", "fp8" or "fp32". PunaError: it has no such units."""
        if not getattr(self, kind):
            raise PunaError(f"{self.name} has no {kind} units: choose another --precision")
        return getattr(self, kind) * 1e12 * (self.mfu_fp8 if kind == "fp8" else self.mfu)


@dataclass(frozen=True)
class Assumptions:
    """What a data sheet doesn't say; meanings in hardware.toml."""

    link_efficiency: float = 0.8
    latency_us: float = 15.0
    overlap: float = 0.8
    overlap_exchange: float = 0.0
    decode_bandwidth: float = 0.7


@dataclass(frozen=True)
class Hardware:
    """A whole file."""

    gpus: dict[str, Gpu]
    assumptions: Assumptions
    prices: str = ""


@dataclass(frozen=True)
class Cluster:
    """`count` GPUs of one kind in nodes of `gpu.node`."""

    count: int
    gpu: Gpu
    assumptions: Assumptions

    def seconds(self, sent: float, calls: int, group: int, stride: int = 1, exchange: bool = False) -> float:
        """Time of `calls` collectives in which each of `group` ranks, `stride` apart, sends `sent` bytes in all.

        A ring through whole nodes enters and leaves each by the adapters of all its members there, so its bandwidth is
        members x network, at most link. In an exchange (all-to-all) the part for other nodes goes through a rank's own
        adapter, beside the rest.
        """
        if group == 1 or not sent:
            return 0.0
        gpu, inside = self.gpu, max(1, min(group, self.gpu.node // stride))
        if inside == group:
            seconds = sent / (gpu.link * 1e9)
        elif exchange:
            away = (group - inside) / (group - 1)
            seconds = max(sent * away / gpu.network, sent * (1 - away) / (gpu.link or gpu.network)) / 1e9
        else:
            seconds = sent / (min(inside * gpu.network, gpu.link or gpu.network) * 1e9)
        return seconds / self.assumptions.link_efficiency + calls * self.assumptions.latency_us * 1e-6


def load(path: str | Path | None = None) -> Hardware:
    """The shipped table, or a user's. PunaError naming the file, the GPU and the field."""
    file = Path(path) if path else SHIPPED
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PunaError(f"--hardware {file} can't be read as TOML ({error}): copy {SHIPPED} and change it") from None
    try:
        known = {"gpus", "assumptions", "prices"}
        for key in values:
            if key not in known:
                raise PunaError(f"no table {key!r}; did you mean {nearest(key, known)!r}?")
        gpus = {name.lower(): build(Gpu, each, f"gpus.{name}.") for name, each in values.get("gpus", {}).items()}
        if not gpus:
            raise PunaError("it has no [gpus.NAME]")
        return Hardware(gpus, build(Assumptions, values.get("assumptions", {}), "assumptions."),
                        str(values.get("prices", "")))  # fmt: skip
    except (PunaError, AttributeError) as error:
        raise PunaError(f"--hardware {file}: {error}") from None


def cluster(text: str, hardware: Hardware) -> Cluster:
    """The cluster that `--gpus 8xh100` (or `h100`) means. PunaError with the nearest kind there is."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9_-]*)", text.lower())
    if not found or found.group(1) and int(found.group(1)) < 1:
        raise PunaError(f"--gpus {text!r} must be like 8xh100: how many, x, and one of {', '.join(hardware.gpus)}")
    kind = found.group(2)
    if kind not in hardware.gpus:
        raise PunaError(f"--gpus {text}: there is no GPU {kind!r}; did you mean {nearest(kind, hardware.gpus)!r}? "
                        f"({', '.join(hardware.gpus)}; your own: --hardware FILE)")  # fmt: skip
    count, gpu = int(found.group(1) or 1), hardware.gpus[kind]
    for needed, name in ((min(count, gpu.node) > 1, "link"), (count > gpu.node, "network")):
        if needed and not getattr(gpu, name):
            raise PunaError(f"--gpus {text}: {kind} has no {name} in the table of hardware, so one can't reach another")
    return Cluster(count, gpu, hardware.assumptions)
