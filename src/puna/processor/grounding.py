"""Boxes and points in text: ``<box label="cat">102,40,377,512</box>``, ``<point label="eye">200,96</point>``.

A model that can point needs a written form for a rectangle, and for a place without a size. Ours: whole numbers from
0 to 999, left, top, right, bottom, as shares of the *original* picture (0 is the left or top edge, 999 the right or
bottom one), whatever tiling the picture went through. Whole numbers keep it at one to three digits a side; the label
says what was found. This module is the form's only writer and reader in Python; the page's grounding.js reads the same
grammar, and a test compares the two.

Llama 4's own training format is not published (llama4-facts.md §3.5); this one is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from puna.errors import PunaError

SCALE = 999
_BOX = re.compile(r'<box label="([^"<>]*)">([^<>]{1,64})</box>')
_POINT = re.compile(r'<point label="([^"<>]*)">([^<>]{1,64})</point>')
_SIDE = r"\s*([0-9]{1,3})\s*"
_ESCAPES = (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"))  # "&" first here, last when undone


@dataclass(frozen=True)
class Box:
    """A labelled rectangle, sides in 0..999 of the original picture, x1 < x2 and y1 < y2."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def coordinates(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2)."""
        return (self.x1, self.y1, self.x2, self.y2)


@dataclass(frozen=True)
class Point:
    """A labelled place, x and y in 0..999 of the original picture."""

    label: str
    x: int
    y: int


def format_box(label: str, box: Sequence[int]) -> str:
    """The text of one box; `box` = (x1, y1, x2, y2) in 0..999. Raises `PunaError` for a box that `parse_boxes` would
    drop."""
    if len(box) != 4 or any(int(side) != side for side in box if math.isfinite(side)) or not _valid(box):
        raise PunaError(f"not a box of whole numbers 0..{SCALE} with x1 < x2 and y1 < y2: {tuple(box)}")
    return f'<box label="{_escaped(label)}">{",".join(str(int(side)) for side in box)}</box>'


def format_point(label: str, x: int, y: int) -> str:
    """The text of one point. Raises `PunaError` for one that `parse_points` would drop."""
    if any(not math.isfinite(side) or int(side) != side or not 0 <= side <= SCALE for side in (x, y)):
        raise PunaError(f"not a point of whole numbers 0..{SCALE}: {(x, y)}")
    return f'<point label="{_escaped(label)}">{int(x)},{int(y)}</point>'


def parse_boxes(text: str) -> list[Box]:
    """All valid boxes in a model's answer, in order. Malformed, empty, swapped or outlying ones are dropped."""
    return [Box(label, *sides) for label, sides in _found(_BOX, text, 4) if _valid(sides)]


def parse_points(text: str) -> list[Point]:
    """All valid points in a model's answer, in order. Malformed or outlying ones are dropped."""
    return [Point(label, *sides) for label, sides in _found(_POINT, text, 2)]


def _found(form: re.Pattern, text: str, count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(label, numbers) of each match that holds `count` numbers."""
    for match in form.finditer(text):
        numbers = re.fullmatch(",".join([_SIDE] * count), match[2])
        if numbers:
            label = match[1]
            for plain, escaped in reversed(_ESCAPES):
                label = label.replace(escaped, plain)
            yield label, tuple(map(int, numbers.groups()))


def _escaped(label: str) -> str:
    for plain, escaped in _ESCAPES:
        label = label.replace(plain, escaped)
    return label


def iou(a: Box | Sequence[float], b: Box | Sequence[float]) -> float:
    """Intersection over union in [0, 1]; 0 when either box is empty, swapped or not finite. Any common unit."""
    a, b = (box.coordinates if isinstance(box, Box) else tuple(box) for box in (a, b))
    if any(len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3] for box in (a, b)):
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def to_normalised(box: Sequence[float], w: int, h: int) -> tuple[int, int, int, int]:
    """A box in pixels of a `w` x `h` picture as whole numbers 0..999: cut to the picture, rounded, at least 1 wide and
    high. Raises `PunaError` when nothing of the box lies in the picture."""
    x1, y1, x2, y2 = box
    if w < 1 or h < 1 or not all(map(math.isfinite, box)) or not (max(x1, 0) < min(x2, w) and max(y1, 0) < min(y2, h)):
        raise PunaError(f"box {tuple(box)} is empty or outside the picture of {w}x{h} pixels")
    left, right = _span(x1, x2, w)
    top, bottom = _span(y1, y2, h)
    return left, top, right, bottom


def to_pixels(box: Box | Sequence[int], w: int, h: int) -> tuple[float, float, float, float]:
    """A box in 0..999 as pixel coordinates of a `w` x `h` picture: the inverse of `to_normalised` up to its
    rounding."""
    x1, y1, x2, y2 = box.coordinates if isinstance(box, Box) else box
    return x1 * w / SCALE, y1 * h / SCALE, x2 * w / SCALE, y2 * h / SCALE


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    start, end = (round(min(max(side, 0), size) / size * SCALE) for side in (low, high))
    if start == end:  # too thin for the grid
        start, end = (start, start + 1) if start < SCALE else (SCALE - 1, SCALE)
    return start, end


def _valid(box: Sequence[float]) -> bool:
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= SCALE and 0 <= y1 < y2 <= SCALE
