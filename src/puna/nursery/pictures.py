"""Captioned pictures: things named in 12 languages, each drawn by several artists.

A *concept* (an apple, a bicycle) has a name per language from Unicode CLDR and one 64 x 64 picture per *style* (one
emoji font's drawing of it). A model that has learnt the concept, not the drawing, also names it in a style it never
saw: ``STYLE_HELD_OUT`` is kept out of all training for that test. A style is one WebP contact sheet, 64 px cells in
row-major order of ``concepts.json``; a sheet is decoded once and cells are cut from it.
"""

import io
from dataclasses import dataclass
from functools import cache, lru_cache

from PIL import Image

from puna.errors import PunaError
from puna.nursery.files import read_bytes, read_json_xz

STYLES_TRAIN = ("twemoji", "openmoji", "fluent3d", "fluentflat", "fluentshaded", "emojione")
STYLE_HELD_OUT = "noto"
CELL = 64  # pixels, side of a picture
COLUMNS = 32  # cells in a row of a contact sheet


@dataclass(frozen=True)
class Concept:
    """A nameable thing.

    id: its code points, e.g. "1f355". names: language -> name. synonyms: language -> further accepted names, each
    shared by at most two concepts. group: e.g. "food-drink/food-fruit". naming: in the naming test set. styles: the
    training styles that draw it (all of them if ``naming``; "emojione" lacks the newer concepts).
    """

    id: str
    names: dict[str, str]
    synonyms: dict[str, tuple[str, ...]]
    group: str
    naming: bool
    styles: tuple[str, ...]


@lru_cache(maxsize=1)
def _table() -> tuple[tuple[Concept, ...], dict[tuple[str, str], int]]:
    rows = read_json_xz("names/concepts.json.xz")
    found, cells = [], {}
    for row in rows:
        found.append(
            Concept(
                id=row["id"],
                names=row["names"],
                synonyms={language: tuple(words) for language, words in row["synonyms"].items()},
                group=row["group"],
                naming=row["naming"],
                styles=tuple(style for style in STYLES_TRAIN if style in row["cells"]),
            )
        )
        cells.update({(row["id"], style): cell for style, cell in row["cells"].items()})
    return tuple(found), cells


def concepts() -> list[Concept]:
    """All concepts, in a fixed order (that of their Unicode chart)."""
    return list(_table()[0])


@cache
def _sheet(style: str) -> Image.Image:
    with Image.open(io.BytesIO(read_bytes(f"pictures/{style}/sheet.webp"))) as sheet:
        return sheet.convert("RGBA")


def picture(concept_id: str, style: str) -> Image.Image:
    """The concept drawn in a style: a fresh RGBA image, 64 x 64, transparent around the thing.

    PunaError for an unknown style or concept, or one that this style does not draw (see ``Concept.styles``).
    """
    cell = _table()[1].get((concept_id, style))
    if cell is None:
        if style not in (*STYLES_TRAIN, STYLE_HELD_OUT):
            raise PunaError(f"unknown picture style {style!r}: use one of {', '.join((*STYLES_TRAIN, STYLE_HELD_OUT))}")
        raise PunaError(f"no picture of concept {concept_id!r} in style {style!r}: see Concept.styles in concepts()")
    row, column = divmod(cell, COLUMNS)
    left, top = column * CELL, row * CELL
    return _sheet(style).crop((left, top, left + CELL, top + CELL))
