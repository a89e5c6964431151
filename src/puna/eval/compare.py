"""Runs beside each other: the same curves on one axis, every measured row, and where their configurations differ.

Steps are no measure of work: a run of twice the batch reads twice the text in one. So each curve is drawn three times,
over steps, over tokens, and over the FLOPs they cost (`plan/flops.py`, the stages' own row lengths, tiles included);
at equal FLOPs the lower curve is the better recipe. A run may be unfinished, or hold no evaluation yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from puna.convert.tensors import read_json
from puna.errors import PunaError
from puna.eval import plots, record, report
from puna.eval.template import COMPARE, STYLE
from puna.fields import differences
from puna.plan.flops import flops_per_tile, flops_per_token
from puna.train import checkpoint, metrics

AXES = {"steps": "optimizer steps", "tokens": "tokens", "flops": "FLOPs"}
CURVES = {"loss": "Loss, nats per learned token", "grad_norm": "Gradient norm before clipping",
          "router/entropy": "Entropy of the experts' load"}  # fmt: skip


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page of at least two runs to `out`; returns it. Errors: PunaError for a folder that is no run."""
    runs = [_run(Path(folder)) for folder in folders]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):  # a/x and b/x: as much of their paths as tells them apart
        for run in runs:
            run["name"] = str(run["folder"])
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(COMPARE).render(
        style=Markup(STYLE), runs=runs, charts=_charts(runs), rows=_rows(runs), differences=_differences(runs),
        tones=[f"var(--t{i})" if i < plots.TONES else "var(--quiet)" for i in range(len(runs))],
    )  # fmt: skip
    report.save(out, text)
    return out


def configuration(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run: config.json's, else what its stages were each begun with."""
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json").get("run") or {}
    stages = {stage.name: checkpoint.newest(stage) for stage in record.stage_folders(folder)}
    return {name: run["config"] for name, run in stages.items() if run is not None}


def _run(folder: Path) -> dict[str, Any]:
    stages = record.stage_folders(folder)
    if not stages:
        raise PunaError(f"{folder} is no run: it has no stage with a metrics.jsonl")
    values = record.read_report(folder) if (folder / "report.json").is_file() else {}
    config = configuration(folder)
    shape, done, points, bits = record.model_config(folder, config), {"steps": 0, "tokens": 0, "flops": 0.0}, [], []
    for stage in stages:
        length = record.seq_len(stage, config)
        for line in metrics.read(stage / "metrics.jsonl"):
            if "loss" in line:
                tokens = line.get("tokens") or 0
                done["steps"] += 1
                done["tokens"] += tokens
                if shape is not None and length:
                    done["flops"] += flops_per_token(shape, length) * tokens
                    done["flops"] += flops_per_tile(shape) * (line.get("tiles") or 0)
                points.append((dict(done), line))
            elif line.get("eval") == "bpb":
                bits.append((dict(done), line))
    seconds = sum(line.get("seconds") or 0.0 for _, line in points)
    return {
        "name": folder.resolve().name, "folder": folder, "config": config, "points": points, "bits": bits,
        "results": {row["name"]: report.row(row) for row in values.get("results", [])},
        "steps": f"{done['steps']:,}", "tokens": f"{done['tokens']:,}", "flops": report.power(done["flops"]),
        "seconds": report.duration(seconds), "stages": ", ".join(stage.name for stage in stages),
        "rate": f"{done['tokens'] / seconds:,.0f}" if seconds else "",
    }  # fmt: skip


def _charts(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """(title, chart) of every curve over every axis, one line a run."""
    languages = [name for run in runs for _, line in run["bits"] for name in line if name.startswith("bpb/")]
    bits = next((name for name in ("bpb/en", *languages) if name in languages), None)
    curves = [(title, key, "points") for key, title in CURVES.items()]
    if bits:
        curves.insert(1, (f"Bits per byte of held-out text, {bits.removeprefix('bpb/')}", bits, "bits"))
    found = []
    for title, key, kind in curves:
        for axis, what in AXES.items():
            series = []
            for i, run in enumerate(runs):
                points = plots.finite((done[axis], line.get(key)) for done, line in run[kind])
                if kind == "points":
                    points = plots.thin(plots.smooth(points))
                series.append(plots.Series(run["name"], points, i if i < plots.TONES else None))
            label = f"{title}, over {what}"
            if any(x for each in series for x, _ in each.points):
                found.append((label, plots.line_chart(label, series)))
    return [(title, chart) for title, chart in found if chart]


def _rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any] | None]]]:
    names = dict.fromkeys(name for run in runs for name in run["results"])
    return [(name, [run["results"].get(name) for run in runs]) for name in names]


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(path, the value in each run) of every setting that is not the same in all."""
    first = runs[0]["config"]
    paths = sorted({path for run in runs[1:] for path in differences(first, run["config"])} - {"name"})

    def at(values: Any, path: str) -> str:
        """The text of a setting. A source's name may hold dots itself, so the longest key that fits is taken."""
        while path:
            if not isinstance(values, Mapping):
                return "–"
            key = max((k for k in values if path == k or path.startswith(f"{k}.")), key=len, default=None)
            if key is None:
                return "–"
            values, path = values[key], path[len(key) + 1 :]
        return json.dumps(values, ensure_ascii=False)

    return [(path, [at(run["config"], path) for run in runs]) for path in paths]
