"""What each token of a picture shows, and where: the vision tower's own lesson (`stages/vision.py`).

A tile becomes t x t tokens, each a square cell of the canvas; behind the tiles comes the whole picture on one tile of
its own (llama4-facts.md §3.4). A cell shows the thing that it shares most with: the shared area over the smaller of
cell and box, at least a quarter. Where that thing is, as far as its tile can tell: left, top, right, bottom of what
lies in the tile, as shares of the tile's side. A single nursery picture shows its thing in every cell, somewhere.
"""

from __future__ import annotations

from typing import NamedTuple

from puna.processor.image import ImageProcessor
from puna.tasks.pictures import EmojiPicture, PictureRef, Scene

LEAST = 0.25
NOTHING = ""


class Shown(NamedTuple):
    """What a token shows: a concept's id ("": nothing, None: unknown), and its edges in the tile if they are known."""

    concept: str | None = None
    edges: tuple[float, float, float, float] | None = None


def shown(picture: PictureRef, image: ImageProcessor) -> list[Shown]:
    """What the patch tokens of a picture show, in the tokens' order."""
    if not isinstance(picture, Scene):
        concept = picture.concept if isinstance(picture, EmojiPicture) else None
        return [Shown(concept)] * (image.plan(*picture.size).tiles * image.tokens_per_tile)
    side = round(image.tokens_per_tile**0.5)
    return [found for place in tile_places(picture, image) for found in _of_tile(picture, *place, side)]


def tile_places(picture: PictureRef, image: ImageProcessor) -> list[tuple[float, float, float]]:
    """(top, left, edge) of each tile of a square picture, in its pixels; the last is the whole, if there are more."""
    side = picture.size[0]
    canvas = image.plan(side, side)
    edge = image.tile * side / canvas.width
    tiles = [(row * edge, column * edge, edge) for row in range(canvas.rows) for column in range(canvas.cols)]
    return tiles + [(0.0, 0.0, float(side))] * (canvas.tiles > 1)


def _of_tile(scene: Scene, top: float, left: float, edge: float, side: int) -> list[Shown]:
    """The cells of one tile, side x side, row by row."""
    cell = edge / side
    return [_of_cell(scene, top, left, edge, i * cell, j * cell, cell) for i in range(side) for j in range(side)]


def _of_cell(scene: Scene, top: float, left: float, edge: float, y: float, x: float, cell: float) -> Shown:
    best, result = LEAST, Shown(NOTHING)
    for spot in scene.objects:
        x1, y1, x2, y2 = spot.left - left, spot.top - top, spot.right - left, spot.bottom - top
        width, height = min(x2, x + cell) - max(x1, x), min(y2, y + cell) - max(y1, y)
        if width > 0 and height > 0:
            share = width * height / min(cell * cell, (x2 - x1) * (y2 - y1))
            if share >= best:
                edges = tuple(min(max(side / edge, 0.0), 1.0) for side in (x1, y1, x2, y2))
                best, result = share, Shown(spot.concept, edges)
    return result
