"""A run's report: report.json, one result file in the project's one shape, and report.html, one page for people.

The page is made from report.json and the stages' metrics.jsonl alone, so `rebuild` makes it again at any time; a stage
that never ran is left out. A goal that was not met is said in the first line.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from puna.errors import PunaError
from puna.eval import plots, record
from puna.eval.rows import BITS, Row, Sample
from puna.eval.template import PAGE, STYLE
from puna.processor.grounding import parse_boxes
from puna.tasks.pictures import PictureRef
from puna.train import metrics

COLOURS = ("var(--t0)", "var(--t1)", "var(--t2)", "var(--t3)", "var(--quiet)", "var(--ink)")


def write(
    folder: Path, rows: Sequence[Row], samples: Sequence[Sample], config: Any, seconds: float | Mapping[str, float]
) -> dict:
    """Writes report.json and report.html into a run's folder; returns what report.json holds.

    config: the run's configuration (a dataclass or JSON values). seconds: in all, or by part. Errors: PunaError when
    the disk refuses.
    """
    values = record.result_json(rows, config, seconds, Path(folder), samples)
    save(Path(folder) / "report.html", page(Path(folder), values))
    save(Path(folder) / "report.json", json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return values


def rebuild(folder: str | Path, out: Path | None = None, config: Any = None) -> Path:
    """Makes the page of an existing run again, from its report.json and metrics, in `out` (None: its report.html).

    config: the configuration of a run that has no report.json yet, whose page then shows how far it is. Returns the
    page's path. Errors: PunaError when report.json is damaged, or missing where no config is given.
    """
    folder = Path(folder)
    path = out or folder / "report.html"
    if config is None or (folder / "report.json").is_file():
        values = record.read_report(folder)
    else:
        stages = record.stages(folder, config)
        values = record.result_json([], config, {name: stage["seconds"] for name, stage in stages.items()}, folder)
    save(path, page(folder, values))
    return path


def save(path: Path, text: str) -> None:
    """Writes a page or a result whole, or leaves what was there. PunaError when the disk refuses."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    except OSError as error:
        raise PunaError(f"can't write {path}: {error.strerror or error}; free some disk space and run again") from error
    finally:
        with suppress(OSError):  # on a read-only disk even this is refused
            work.unlink(missing_ok=True)


def page(folder: Path, values: Mapping[str, Any]) -> str:
    """The whole report as one HTML page without external resources or scripts."""
    rows = [row(each) for each in values["results"]]
    judged = [row for row in rows if row["met"] is not None]
    model = values.get("model") or {"name": folder.name}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    stages = values.get("stages") or {}
    return environment.from_string(PAGE).render(
        style=Markup(STYLE), model={"sha256": "", "finished": True} | model, versions=values["versions"],
        device={"gpu": None} | values["device"], commit=values["commit"], raised=duration(values["seconds"]),
        goals=len(judged), met=sum(row["met"] for row in judged),
        missed=[f"{row['name']} ({row['shown']}, goal {row['goal'] or 'below chance'})" for row in judged
                if not row["met"]],
        headline=[row for row in rows if _headline(row["name"])], languages=_languages(rows),
        samples=[_sample(Sample.from_dict(sample)) for sample in values.get("samples", [])],
        facts=_facts(model), charts=charts(folder), said=said(folder),
        stages=[_stage(name, each) for name, each in stages.items()],
        parts=[(name, duration(took)) for name, took in values.get("parts", {}).items()],
        tiles=any("tiles" in each for each in stages.values()), counting=_counting(folder),
        configuration=json.dumps(values["config"], indent=1, ensure_ascii=False),
    )  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------------------


def _headline(name: str) -> bool:
    """Rows of the first table; the other languages have their own."""
    kind, _, rest = name.partition("/")
    return kind not in ("naming", "bpb") or rest in ("en", "en/shuffled", "code")


def row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of report.json as text."""
    bits = row["unit"] == BITS

    def shown(value: float | None, digits: int = 1) -> str:
        if value is None:
            return ""
        return f"{value:.3f}" if bits else f"{100 * value:.{digits}f} %"

    goal = shown(row["goal"])
    if goal:
        goal = ("≤ " if row.get("better") == "lower" else "≥ ") + goal
    verdict = {True: Markup('<span class="good">met</span>'), False: Markup('<span class="bad">not met</span>'),
               None: Markup('<span class="quiet">no goal</span>')}[row["met"]]  # fmt: skip
    top = 1.05 * max(x for x in (row["value"], row["chance"], 0.0) if x is not None) if bits else 1.0
    bar = plots.bar(row["value"], row["chance"], row["goal"], top, row["met"])
    return {
        "name": row["name"], "shown": shown(row["value"]) or "not measured", "error": shown(row["stderr"]), "bar": bar,
        "chance": shown(row["chance"]), "goal": goal, "verdict": verdict, "n": f"{row['n']:,}", "met": row["met"],
        "note": row.get("note", ""), "raw": row,
    }  # fmt: skip


def _languages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in rows}
    empty = dict.fromkeys(("shown", "error", "chance", "goal", "verdict", "n"), "")
    found = []
    for lang in dict.fromkeys(name.split("/")[1] for name in by_name if name.split("/")[0] in ("naming", "bpb")):
        naming, bits = by_name.get(f"naming/{lang}", empty), by_name.get(f"bpb/{lang}", empty)
        below, raw = "", bits.get("raw")
        if raw and raw["value"] is not None and raw["chance"]:
            below = f"{100 * (1 - raw['value'] / raw['chance']):.1f} %"
        found.append({"lang": lang, "naming": naming, "bpb": bits, "below": below})
    return found


# ---- answers --------------------------------------------------------------------------------------------------------


def _sample(sample: Sample) -> dict[str, Any]:
    item = sample.item
    question = item.prompt[-1]["content"]
    if not isinstance(question, str):
        question = " ".join(part["text"] for part in question if part["type"] == "text")
    if len(question) > 400:
        question = f"[{len(question):,} characters] … {question[-160:]}"
    boxed = bool(parse_boxes(item.answer))
    pictures = [_picture(p, sample.text if boxed else "", item.answer if boxed else "") for p in item.pictures]
    return {
        "row": sample.row, "question": question, "text": sample.text, "expected": item.answer,
        "right": sample.grade >= 0.5, "picture": Markup("").join(pictures),
    }  # fmt: skip


def _picture(picture: Any, said: str, true: str) -> Markup:
    """The picture in a 0..999 square, with the boxes of two texts."""
    out = io.BytesIO()
    picture.open().convert("RGB").save(out, format="PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    rects = [
        f'<rect class="{kind}" x="{box.x1}" y="{box.y1}" width="{box.x2 - box.x1}" height="{box.y2 - box.y1}"/>'
        for kind, text in (("true", true), ("said", said))
        for box in parse_boxes(text)[:1]
    ]
    return Markup(
        '<svg viewBox="0 0 999 999" role="img" aria-label="the picture">'
        f'<image width="999" height="999" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        f"{''.join(rects)}</svg>"
    )


# ---- the model, the stages ------------------------------------------------------------------------------------------


def _facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {"total": "parameters", "active": "active per token", "vision": "of them vision", "layers": "layers",
              "width": "width", "experts": "experts", "moe_layers": "expert layers", "chunk": "attention chunk",
              "vocabulary": "vocabulary"}  # fmt: skip
    return [(label, f"{model[key]:,}") for key, label in labels.items() if key in model]


def _stage(name: str, stage: Mapping[str, Any]) -> dict[str, Any]:
    seconds, flops = stage["seconds"], stage.get("flops")
    total = max(1, sum(stage["capabilities"].values()))
    mixture = []
    for (kind, tokens), colour in zip(stage["capabilities"].items(), _colours(), strict=False):
        sources = [(s, n) for s, n in stage["sources"].items() if record.capability(s) == kind]
        mixture.append({
            "name": kind, "tokens": tokens, "shown": f"{tokens:,}", "share": f"{100 * tokens / total:.1f} %",
            "colour": colour, "sources": ", ".join(f"{s} {n:,}" for s, n in sources),
        })  # fmt: skip
    return {
        "name": name, "steps": f"{stage['steps']:,}", "tokens": f"{stage['tokens']:,}", "valid": f"{stage['valid']:,}",
        "seq_len": stage.get("seq_len") or "", "time": duration(seconds), "skipped": stage["skipped"],
        "mixture": mixture,
        "rate": f"{stage['tokens'] / seconds:,.0f}" if seconds else "", "flops": power(flops),
        "speed": power(flops / seconds) if flops and seconds else "",
        "loss": "" if stage["loss"] is None else f"{stage['loss']:.3f}",
    }  # fmt: skip


def _colours():
    """Colours without end, fainter each time round."""
    strength = 100
    while strength > 5:
        for colour in COLOURS:
            yield colour if strength == 100 else f"color-mix(in srgb, {colour} {strength}%, var(--bg))"
        strength = strength * 6 // 10
    while True:
        yield "var(--line)"


def _counting(folder: Path) -> str:
    lines = [line for stage in record.stage_folders(folder) for line in metrics.read(stage / "metrics.jsonl")[:1]]
    if lines and all("source_tokens" in line for line in lines):
        return "Tokens fed, padding not counted; pictures count as the tokens they become."
    return "Tokens fed, padding not counted, shared among the sources of a step by their rows."


def duration(seconds: float) -> str:
    """1.5 s, 12 min, 2.3 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def power(value: float | None) -> str | Markup:
    """1.2 × 10¹²."""
    if not value:
        return ""
    mantissa, exponent = f"{value:.2e}".split("e")
    return Markup(f"{mantissa} × 10<sup>{int(exponent)}</sup>")


# ---- curves ---------------------------------------------------------------------------------------------------------


LAYERS = (  # title, list of "router/layers", and the map's ends; None: as measured
    ("Busiest expert's load over the mean, by layer", "max_load", 1.0, None),
    ("Entropy of the load, by layer", "entropy", None, 1.0),
    ("Share of experts without a token, by layer", "dead", 0.0, None),
    ("Balance bias, largest less smallest, in logits, by layer", "bias", 0.0, None),
    ("Auxiliary loss, 1 is even, by layer", "auxiliary", 1.0, None),
    ("Share of tokens that no expert took, by layer", "untaken", 0.0, None),
)


def course(folder: Path) -> tuple[list, list, list]:
    """All stages one after the other: (steps, evaluations of bits per byte, breaks), the first two as (x, line)."""
    steps, evaluations, breaks, offset = [], [], [], 0
    for stage in record.stage_folders(folder):
        lines = metrics.read(stage / "metrics.jsonl")
        breaks.append((offset, stage.name))
        steps += [(offset + line["step"], line) for line in lines if "loss" in line]
        evaluations += [(offset + line["step"], line) for line in lines if line.get("eval") == "bpb"]
        offset += max((line["step"] for line in lines), default=-1) + 1
    return steps, evaluations, breaks


def _by_layer(title: str, steps, name: str, least: float | None, most: float | None, breaks) -> Markup:
    """The map of a router's measure: layers down, steps to the right."""
    lines = [(x, line["router/layers"][name]) for x, line in steps if name in line.get("router/layers", ())]
    depth = max((len(values) for _, values in lines), default=0)
    rows = [(str(i), [(x, values[i]) for x, values in lines if i < len(values)]) for i in range(depth)]
    seen = [y for _, points in rows for _, y in plots.thin(points, 60)]
    if not seen:
        return Markup("")
    ends = (min(seen) if least is None else least, max(seen) if most is None else most)
    return plots.heat(title, rows, *ends, breaks, until=max(x for x, _ in steps))


def _by_part(steps, breaks) -> Markup:
    """Gradient norms of the model's parts, smoothed."""
    parts = sorted({key for _, line in steps for key in line if key.startswith("grad/")})
    tones = {"grad/attention": 0, "grad/experts": 1, "grad/router": 2, "grad/vision": 3}
    series = []
    for part in sorted(parts, key=lambda p: p in tones):
        points = plots.finite((x, line.get(part)) for x, line in steps)
        series.append(plots.Series(part.removeprefix("grad/"), plots.thin(plots.smooth(points)), tones.get(part)))
    return plots.line_chart("gradient norm by part", series, breaks, zero=True)


def said(folder: Path) -> list[dict[str, Any]]:
    """What the model answered to the same prompts while it learnt: one entry a prompt, its answers in order."""
    found: dict[tuple, dict[str, Any]] = {}
    for stage in record.stage_folders(folder):
        for line in metrics.read(stage / "metrics.jsonl"):
            for each in line.get("answers") or []:
                key = (each["prompt"], json.dumps(each["picture"]))
                shown = each["picture"] and _picture(PictureRef.from_json(each["picture"]), "", "")
                entry = found.setdefault(key, {"prompt": each["prompt"], "picture": shown, "answers": []})
                entry["answers"].append((f"{stage.name} {line['step']:,}", each["text"]))
    return list(found.values())


def charts(folder: Path) -> list[tuple[Markup, Markup]]:
    """(title, chart) of everything that was logged, all stages one after the other."""
    steps, evaluations, breaks = course(folder)

    def column(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        return plots.finite((x, line[name] * scale if line.get(name) is not None else None) for x, line in steps)

    def smoothed(title: str, name: str, zero: bool = False, scale: float = 1.0) -> tuple[str, Markup]:
        points = column(name, scale)
        raw, mean = (plots.thin(p) for p in (points, plots.smooth(points)))
        lines = [plots.Series("", raw, 0, faint=True), plots.Series("", mean, 0)]
        return title, plots.line_chart(title, lines, breaks, zero)

    names = sorted({key for _, line in evaluations for key in line if key not in ("step", "eval", "time")})
    tones = {"bpb/en": 0, "bpb/code": 1}
    bits = [
        plots.Series(name.removeprefix("bpb/"), plots.finite((x, line.get(name)) for x, line in evaluations),
                     tones.get(name))
        for name in sorted(names, key=lambda n: n in tones)
    ]  # fmt: skip
    rates = plots.finite(
        (x, line["tokens"] / line["seconds"]) for x, line in steps if line.get("tokens") and line.get("seconds")
    )
    lines = [plots.Series("", plots.thin(rates), 0, faint=True), plots.Series("", plots.thin(plots.smooth(rates)), 0)]
    found = [
        smoothed("Loss, nats per learned token", "loss"),
        ("Bits per byte of held-out text, by language", plots.line_chart("bits per byte", bits, breaks)),
        smoothed("Busiest expert, load over the mean", "router/max_load"),
        smoothed("Evenness of the experts' load: its entropy, 1 is even", "router/entropy"),
        smoothed("Experts without a token, %", "router/dead", True, 100),
        smoothed("Routes that balancing changed, %", "router/flip_share", True, 100),
        *[(title, _by_layer(title, steps, name, least, most, breaks)) for title, name, least, most in LAYERS],
        smoothed("Gradient norm before clipping", "grad_norm", True),
        ("Gradient norm by part", _by_part(steps, breaks)),
        ("Tokens per second", plots.line_chart("tokens per second", lines, breaks, zero=True)),
        smoothed("Learning rate", "lr", True),
    ]
    return [(escape(title), chart) for title, chart in found if chart]
