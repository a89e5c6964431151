"""report.json, one result file in the project's one shape, and report.html, the same to be read by people."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from puna import __version__
from puna.eval.rows import Row
from puna.fields import to_dict
from puna.processor.grounding import parse_boxes
from puna.train.checkpoint import cpu_name, steps
from puna.train.metrics import read


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    return {"puna": __version__, "torch": torch.__version__, "python": platform.python_version()}


def commit() -> str:
    """The commit of the source tree puna runs from, or 'unknown' when it is installed."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def stage_summary(folder: Path, seconds: Mapping[str, float]) -> dict[str, dict]:
    """Per stage: steps, tokens, tokens per source's share of rows, seconds, last loss."""
    found = {}
    for name, took in seconds.items():
        lines = [x for x in read(folder / name / "metrics.jsonl") if "loss" in x]
        entry: dict = {"seconds": round(took, 1)}
        if lines:
            sources: dict[str, int] = {}
            for line in lines:
                for source, count in line["sources"].items():
                    sources[source] = sources.get(source, 0) + count
            entry |= {
                "steps": len(lines),
                "tokens": sum(x["tokens"] for x in lines),
                "loss": lines[-1]["loss"],
                "rows": dict(sorted(sources.items())),
                "skipped": sum(x["skipped"] for x in lines),
                "training_seconds": round(sum(x["seconds"] for x in lines), 1),
            }
        found[name] = entry
    return found


def write(folder: Path, rows: list[Row], samples: list[dict], run, seconds: Mapping[str, float]) -> dict:
    """Writes report.json and report.html into a run's folder; returns what report.json holds."""
    newest = steps(folder / "sft")
    result = {
        "commit": commit(),
        "versions": versions(),
        "device": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
        "config": to_dict(run),
        "seconds": round(sum(seconds.values()), 1),
        "checkpoint": newest[0].name if newest else None,
        "stages": stage_summary(folder, seconds),
        "results": [dataclasses.asdict(row) for row in rows],
    }
    _write(folder / "report.html", page(folder, result, samples))
    _write(folder / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _write(path: Path, text: str) -> None:
    work = path.with_suffix(path.suffix + ".tmp")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


STYLE = """
:root{color-scheme:light dark;--ink:#1d2a24;--soft:#5d6b64;--paper:#fbfaf6;--line:#e2dfd4;
  --good:#2f7d4f;--bad:#b4552d}
@media(prefers-color-scheme:dark){:root{--ink:#e8e6dc;--soft:#a3aaa2;--paper:#171a18;--line:#333a35}}
body{margin:2rem auto;max-width:60rem;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;
  color:var(--ink);background:var(--paper)}
h1{font-weight:650}h2{margin-top:2.5rem;font-weight:600}small,.soft{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .6rem;text-align:left;border-bottom:1px solid var(--line)}
td.n{text-align:right}.good{color:var(--good)}.bad{color:var(--bad)}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:.6rem;padding:.7rem}figure svg{width:100%;border-radius:.4rem}
"""


def page(folder: Path, result: dict, samples: list[dict]) -> str:
    """The whole report as one HTML page without external resources."""
    escape = html.escape
    body = [
        f"<h1>{escape(result['config']['name'])}</h1>",
        f"<p class=soft>{escape(result['device']['cpu'])}, {result['device']['threads']} threads · "
        f"torch {escape(result['versions']['torch'])} · commit {escape(result['commit'][:12])} · "
        f"{result['seconds'] / 60:.1f} minutes in all</p>",
        "<h2>Results</h2>",
        _table(result["results"]),
    ]
    body += ["<h2>Learning</h2>", _curves(folder, result)]
    body += ["<h2>Stages</h2>", _stages(result["stages"])]
    body += ["<h2>Samples</h2><div class=samples>", *(_figure(s) for s in samples), "</div>"]
    config = escape(json.dumps(result["config"], indent=1, ensure_ascii=False))
    body += [f"<h2>Configuration</h2><details><summary>as resolved</summary><pre>{config}</pre></details>"]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>puna report</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(rows: list[dict]) -> str:
    lines = ["<table><tr><th>row<th>value<th>± <th>n<th>chance<th>goal<th></tr>"]
    for row in rows:
        verdict = {True: "<td class=good>met", False: "<td class=bad>not met", None: "<td>"}[row["met"]]
        cells = "".join(
            f"<td class=n>{x}"
            for x in (
                _number(row["value"]),
                _number(row["stderr"]),
                row["n"],
                _number(row["chance"]),
                _number(row["goal"]),
            )
        )
        lines.append(f"<tr><td>{html.escape(row['name'])}{cells}{verdict}</tr>")
    return "".join(lines) + "</table>"


def _stages(stages: dict) -> str:
    lines = ["<table><tr><th>stage<th>steps<th>tokens<th>last loss<th>seconds<th>rows by source</tr>"]
    for name, s in stages.items():
        rows = ", ".join(f"{k} {v}" for k, v in s.get("rows", {}).items())
        loss = _number(s.get("loss"))
        lines.append(
            f"<tr><td>{html.escape(name)}<td class=n>{s.get('steps', '')}<td class=n>{s.get('tokens', '')}"
            f"<td class=n>{loss}<td class=n>{s['seconds']}<td><small>{html.escape(rows)}</small></tr>"
        )
    return "".join(lines) + "</table>"


def _curves(folder: Path, result: dict) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    offset = 0
    for name in result["stages"]:
        lines = read(folder / name / "metrics.jsonl")
        steps_ = [x for x in lines if "loss" in x]
        if not steps_:
            continue
        at = [offset + x["step"] for x in steps_]
        axes[0, 0].plot(at, [x["loss"] for x in steps_], label=name)
        axes[0, 1].plot(at, [x["grad_norm"] for x in steps_], label=name)
        axes[1, 0].plot(at, [x.get("router/max_load", 0) for x in steps_], label=name)
        evals = [x for x in lines if x.get("eval") == "bpb"]
        for lang in sorted({k for x in evals for k in x} - {"step", "eval"}):
            axes[1, 1].plot([offset + x["step"] for x in evals], [x[lang] for x in evals], ".-", lw=1, label=lang)
        offset = at[-1] + 1
    titles = ("loss (nats per token)", "gradient norm", "busiest expert / mean load", "bits per byte")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="curves of all stages" style="width:100%;background:#fff" src="data:image/svg+xml;base64,{data}">'


def _figure(sample: dict) -> str:
    item, parts = sample["item"], []
    for picture in item.pictures[:1]:
        out = io.BytesIO()
        picture.open().convert("RGB").save(out, format="PNG")
        data = base64.b64encode(out.getvalue()).decode()
        boxes = "".join(
            f'<rect x="{b.x1}" y="{b.y1}" width="{b.x2 - b.x1}" height="{b.y2 - b.y1}" fill="none" '
            'stroke="#e4572e" stroke-width="14"/>'
            for b in parse_boxes(sample["answer"])
        )
        parts.append(
            f'<svg viewBox="0 0 1000 1000"><image width="1000" height="1000" '
            f'href="data:image/png;base64,{data}"/>{boxes}</svg>'
        )
    question = item.prompt[-1]["content"]
    if not isinstance(question, str):
        question = " ".join(p["text"] for p in question if p["type"] == "text")
    kind = "good" if sample["grade"] else "bad"
    parts.append(
        f"<figcaption><small>{html.escape(sample['task'])}</small><br>{html.escape(question[-200:])}<br>"
        f'<b class="{kind}">{html.escape(sample["answer"])}</b> <small>({html.escape(item.answer)})</small>'
        "</figcaption>"
    )
    return f"<figure>{''.join(parts)}</figure>"
