"""What the commands print: plain columns, the same in a terminal and in a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

LINES = 40  # of a table that may have hundreds


def bar(*columns):
    """rich's `Progress` on stderr; gone at the end, and nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints columns; numbers to the right, words to the left."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) or _number(str(row[i])) for row in rows)
             for i in range(len(head))]  # fmt: skip
    for line in [list(head), *cells]:
        print("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip())


def _number(text: str) -> bool:
    return bool(text) and all(c in "0123456789.,%+- " for c in text)


def _value(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def report(values: dict) -> None:
    """The rows of a report.json."""
    rows = values.get("results", [])
    met = {True: "met", False: "not met", None: ""}
    table(
        ("name", "value", "stderr", "n", "chance", "goal", ""),
        [
            (row["name"], _value(row["value"]), _value(row.get("stderr")), _value(row.get("n")),
             _value(row.get("chance")), _value(row.get("goal")), met[row.get("met")])
            for row in rows
        ],
    )  # fmt: skip
    with_goal = [row for row in rows if row.get("goal") is not None]
    if with_goal:
        print(f"\n{sum(bool(row.get('met')) for row in with_goal)} of {len(with_goal)} goals met")


def stage(folder: Path) -> None:
    """One stage: how far it is, its last loss, its last evaluation."""
    from puna.train import checkpoint, metrics

    run = checkpoint.newest(folder)
    if run is None:
        print(f"{folder.name}: no checkpoint yet in {folder}")
        return
    steps = run["config"].get("train", {}).get("steps", "?")
    print(f"{folder.name}: {'finished' if run['finished'] else 'not finished'}, step {run['step']} of {steps}")
    losses, evaluation, seconds, tokens = [], {}, 0.0, 0
    for row in metrics.read(folder / "metrics.jsonl"):
        if "loss" in row:
            losses.append(row["loss"])
            seconds, tokens = seconds + row.get("seconds", 0.0), tokens + row.get("tokens", 0)
        elif "eval" in row:
            numbers = {k: v for k, v in row.items() if k not in ("step", "eval", "time") and not isinstance(v, list)}
            evaluation = numbers or evaluation
    if losses:
        last = [loss for loss in losses[-20:] if loss is not None]
        mean = f"{sum(last) / len(last):.4f}" if last else "not finite"
        print(f"loss {mean} over the last {len(losses[-20:])} steps, {tokens:,} tokens in {seconds:.0f} s")
    if evaluation:
        print("  ".join(f"{name} {_value(value)}" for name, value in evaluation.items()))
    print(f"model    {checkpoint.steps(folder)[0]}")


def corpus(made) -> None:
    """What a corpus holds, by source and by language, and what was left out."""
    about = made.about
    print(f"{made.folder}: {about['documents']:,} documents, {about['bytes']:,} bytes of text, "
          f"{about['pictures']:,} pictures in {about['picture_bytes']:,} bytes")  # fmt: skip
    for i, column in enumerate(("source", "language", "licence")):
        found = list(made.by(i).items())
        print()
        table((column, "documents", "bytes", "share", "pictures"),
              [(name, f"{d:,}", f"{b:,}", f"{100 * b / max(about['bytes'], 1):.1f} %", f"{p:,}")
               for name, (d, b, p) in found[:LINES]])  # fmt: skip
        if len(found) > LINES:
            print(f"and {len(found) - LINES} more")
    left = made.left_out()
    reasons = sorted({reason for entry in left.values() for reason in entry} - {"read"})
    print()
    table(("left out of", "read", *reasons),
          [(name, *(f"{entry.get(r, 0):,}" for r in ("read", *reasons))) for name, entry in left.items()])  # fmt: skip
