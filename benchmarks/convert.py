"""`puna convert` against copying the same bytes: how much of the disk's rate it keeps, and how little memory it takes.

    python benchmarks/convert.py --out FILE [--quick] [--gigabytes 10]

A folder of Scout's shape (its widths, 16 experts, layers and vocabulary cut so that it has that many GB), bfloat16,
goes from Hugging Face's layout to Meta's eight files and from there to puna's, each as a command of its own; between
the conversions the folder is copied with `cp`. Times include writing everything to the disk (`sync`), and before each
the page cache is emptied where the machine allows it. Peak memory is the process's largest resident set, Python and
torch included; torch alone is measured too. Goals (issue "Exact and open"): 60 % of cp's rate; memory at most
1.2 x (largest tensor + one output shard).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from puna.convert.folder import write_folder
from puna.convert.huggingface import HuggingFaceFormat
from puna.convert.tensors import parameter_shapes
from puna.eval.record import commit, device, versions
from puna.model import preset
from puna.processor.files import write_atomic


class Noise:
    """A model of random numbers, made row by row."""

    def __init__(self, config):
        self.config, self.sizes = config, parameter_shapes(config)
        self.noise = torch.randn(2**22).bfloat16()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.sizes

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, *self.sizes[name][1:])
        count = torch.Size(shape).numel()
        return self.noise.repeat(count // len(self.noise) + 1)[:count].view(shape)


def shaped(gigabytes: float):
    """Scout's widths, as many layers as fit, the rest in the vocabulary; without vision below 4 GB."""
    scout = preset("scout")
    layers = max(1, int((gigabytes - 1) / 4.4))
    config = dataclasses.replace(scout, n_layers=layers, moe_layers=None, nope_layers=None, vocab_size=32768)
    if gigabytes < 4:
        config = dataclasses.replace(config, n_experts=4, vision=None, patch_token=None)
    return config


def command(*words) -> tuple[float, int]:
    """(seconds until all is on the disk, peak resident bytes) of a command."""
    subprocess.run(["sync"], check=True)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        pass
    begin = time.perf_counter()
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--quick", action="store_true", help="2 GB instead of 10")
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    begin, rows = time.perf_counter(), []
    config = shaped(args.gigabytes or (2 if args.quick else 10))
    puna = [sys.executable, "-m", "puna.cli.main"]
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as place:
        work = Path(place)
        source = write_folder(Noise(config), HuggingFaceFormat(None), work / "hf")
        size = sum(path.stat().st_size for path in source.iterdir())
        torch_alone = command(sys.executable, "-c", "import puna.convert, rich.progress")[1]
        print(f"{size / 1e9:.1f} GB; Python and torch take {torch_alone / 1e6:.0f} MB", flush=True)
        paths = {"hf to meta": (source, work / "meta", "meta"), "meta to puna": (work / "meta", work / "puna", "puna")}
        times: dict[str, list[float]] = {name: [] for name in ("cp", *paths)}
        peaks = dict.fromkeys(paths, 0)
        for turn in range(args.rounds):
            times["cp"].append(command("cp", "-r", source, work / "copy")[0])
            shutil.rmtree(work / "copy")
            for name, (a, b, form) in paths.items():
                seconds, peak = command(*puna, "convert", a, b, "--to", form)
                times[name].append(seconds)
                peaks[name] = max(peak, peaks[name])
            print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in times.items()), flush=True)
            shards = {name: max(path.stat().st_size for path in b.iterdir()) for name, (_, b, _) in paths.items()}
            for _, b, _ in paths.values():
                shutil.rmtree(b)
    largest = max(torch.Size(shape).numel() * 2 for shape in parameter_shapes(config).values())
    for name in paths:
        ratios = [cp / ours for cp, ours in zip(times["cp"], times[name], strict=True)]
        ratio, limit = statistics.median(ratios), 1.2 * (largest + shards[name])
        rows += [
            {"name": f"{name}: rate", "ours": size / statistics.median(times[name]) / 1e6, "unit": "MB/s", "goal": 0.6,
             "peer": size / statistics.median(times["cp"]) / 1e6, "ratio": ratio, "n": len(ratios),
             "met": ratio >= 0.6},
            {"name": f"{name}: peak memory", "value": peaks[name] / 1e6, "unit": "MB", "n": len(ratios),
             "goal": limit / 1e6, "met": peaks[name] <= limit, "torch alone": torch_alone / 1e6,
             "largest tensor": largest / 1e6, "output shard": shards[name] / 1e6},
        ]  # fmt: skip
    result = {"commit": commit(), "versions": versions(), "device": device(), "config": {"bytes": size,
              "model": config.to_dict()}, "seconds": time.perf_counter() - begin, "results": rows}  # fmt: skip
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
