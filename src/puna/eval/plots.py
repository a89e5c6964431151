"""Line charts and bars as inline SVG: a few hundred bytes each, in the page's own colours, light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 62, 14, 30
TONES = 4  # colours of lines: --t0 .. --t3, and --quiet
POINTS = 240  # most points of a line


@dataclass(frozen=True)
class Series:
    """A line: name, (x, y) points, colour 0..3 or None for a quiet one. faint: drawn thin, without a label."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int | None = 0
    faint: bool = False


def finite(points: Iterable[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Points that can be drawn."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of equal runs."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smooth(points: Sequence[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Exponential mean over about `share` of the points, unbiased at the start."""
    keep, mean, weight, found = 1 - 1 / max(1.0, share * len(points)), 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 3T, 12k, 1.5, 0.02."""
    for size, mark in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if mark == 'k' else size):.3g}{mark}"
    return f"{value:.3g}"


def line_chart(
    label: str, series: Sequence[Series], breaks: Sequence[tuple[float, str]] = (), zero: bool = False
) -> Markup:
    """A chart of `series` over steps; empty text when none has a point.

    label: what the chart shows, for those who can't see it. breaks: where stages begin, (x, name). zero: the axis
    starts at 0.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    low_x, high_x = min([*xs, *(x for x, _ in breaks)]), max(xs)
    low, high = (0.0 if zero else min(ys)), max(ys)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    margin = 0.05 * (high - low)
    low, high = (low if zero else low - margin), high + margin

    def px(x: float) -> float:
        return LEFT + (x - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in ticks(low_x, high_x, 5):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    for x, name in breaks:
        parts.append(f'<line class="break" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="stage" x="{px(x) + 4:.1f}" y="{TOP + 4}">{escape(name)}</text>')
    for s in drawn:
        place = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
        kind = ("t" + str(s.tone % TONES)) if s.tone is not None else "tq"
        if len(s.points) == 1:
            x, y = s.points[0]
            parts.append(f'<circle class="dot {kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5"/>')
        else:
            parts.append(f'<polyline class="line {kind}{" faint" if s.faint else ""}" points="{place}"/>')
    parts += _labels([s for s in drawn if not s.faint], py)
    return Markup("".join([*parts, "</svg>"]))


def heat(label: str, rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], low: float, high: float,
         breaks: Sequence[tuple[float, str]] = (), until: float = 0.0) -> Markup:  # fmt: skip
    """A map: a row for each name, steps to the right, from `low` (pale) to `high` (strong), both said beside it; empty
    text when no row has a point. rows: (name, (x, y) points), the first row at the top. until: where the steps end."""
    drawn = [(name, thin(points, 60)) for name, points in rows if points]
    if not drawn:
        return Markup("")
    xs = [x for _, points in drawn for x, _ in points]
    low_x, high_x = min([*xs, *(x for x, _ in breaks)]), max([*xs, until])
    tall = (HEIGHT - TOP - BOTTOM) / len(drawn)

    def px(x: float) -> float:
        return LEFT + (x - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for i, (name, points) in enumerate(drawn):
        y = TOP + i * tall
        if i % math.ceil(len(drawn) / 16) == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        step = (points[-1][0] - points[0][0]) / (len(points) - 1) if len(points) > 1 else math.inf
        ends = [*(x for x, _ in points[1:]), math.inf]  # where it was not measured the map is empty
        for (x, value), after in zip(points, ends, strict=True):
            end = px(min(after, x + 2 * step, high_x))
            strength = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0
            parts.append(f'<rect class="heat" x="{px(x):.1f}" y="{y:.1f}" width="{max(0.5, end - px(x)):.1f}" '
                         f'height="{tall:.1f}" fill-opacity="{0.04 + 0.96 * strength:.2f}"/>')  # fmt: skip
    for x, name in breaks:
        parts.append(f'<line class="break" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="stage" x="{px(x) + 4:.1f}" y="{TOP - 3}">{escape(name)}</text>')
    for x in ticks(low_x, high_x, 5):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{TOP + 10}">{number(high)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{HEIGHT - BOTTOM}">{number(low)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def _labels(series: Sequence[Series], py) -> list[str]:
    """Names at the lines' ends, moved apart where they would touch."""
    gap = min(12.0, (HEIGHT - TOP - BOTTOM) / max(1, len(series)))
    ends = sorted((py(s.points[-1][1]) + 4, i) for i, s in enumerate(series))
    placed: list[float] = []
    for y, _ in ends:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    overflow = max(0.0, placed[-1] - (HEIGHT - BOTTOM + 4)) if placed else 0.0
    for k in range(len(placed) - 1, -1, -1):  # pushed back up from the bottom
        limit = placed[k + 1] - gap if k + 1 < len(placed) else placed[k] - overflow
        placed[k] = min(placed[k], limit)
    parts = []
    for y, (_, i) in zip(placed, ends, strict=True):
        s = series[i]
        kind = ("t" + str(s.tone % TONES)) if s.tone is not None else "tq"
        parts.append(f'<text class="name {kind}" x="{WIDTH - RIGHT + 6}" y="{y:.1f}">{escape(s.name)}</text>')
    return parts


def bar(value: float | None, chance: float | None, goal: float | None, top: float, met: bool | None) -> Markup:
    """A measured value on a track from 0 to `top`, with a quiet tick at chance and a strong one at the goal."""
    width, height = 150, 16

    def px(x: float) -> float:
        return max(0.0, min(1.0, x / top if top else 0.0)) * (width - 4) + 2

    kind = {True: "good", False: "bad", None: "none"}[met]
    parts = [f'<svg class="bar" viewBox="0 0 {width} {height}" aria-hidden="true">']
    parts.append(f'<rect class="track" x="2" y="5" width="{width - 4}" height="6" rx="3"/>')
    if value is not None:
        parts.append(f'<rect class="fill {kind}" x="2" y="5" width="{max(1.0, px(value) - 2):.1f}" height="6" rx="3"/>')
    for name, place in (("chance", chance), ("goal", goal)):
        if place is not None:
            parts.append(f'<line class="{name}" x1="{px(place):.1f}" x2="{px(place):.1f}" y1="1" y2="15"/>')
    return Markup("".join([*parts, "</svg>"]))
