"""Pictures as recipes: a few numbers that say how to draw, drawn only when needed.

A training run shows tens of thousands of different pictures; kept as pixels they would fill the memory, kept as
recipes they are JSON. A PictureRef has a `.size` without drawing and an `.open()` that draws the same RGB picture
every time.

`EmojiPicture` is one nursery picture. Without a seed it stands plain on white: the test form. With a seed it is
augmented: another background, scale, shift, small rotation, mirrored where that keeps the meaning (never an arrow, a
flag, a clock or letters), a colour matrix (hue, saturation, brightness), sometimes a light blur. The colour matrix is
the hue rotation of the SVG filter specification, M = L + s (cos h (I - L) + sin h K) with L the luma rows, so s < 1
is partial greyscale.

`Scene` puts 3 to 6 nursery pictures on one background and knows their boxes exactly: each is cropped to its visible
pixels (alpha >= VISIBLE) before it is scaled and pasted, and the box is measured again on the scaled alpha.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter

from puna import nursery
from puna.errors import PunaError
from puna.processor.grounding import to_normalised
from puna.tasks import backgrounds
from puna.tasks.seeding import rng

VISIBLE = 32  # alpha (of 255) from which a pixel counts as part of an object: soft shadows' last rims do not
SIDE = 64
SCENE_SIDE = 128

# White comes often, since that is how the plain pictures of tests look.
BACKGROUND_WEIGHTS = {
    "white": 12, "solid": 3, "gradient": 2, "clouds": 1, "noise": 1, "stripes": 1, "checker": 1,
}  # fmt: skip

_SIDED = (
    "left right arrow arrows flag keycap button letter letters input clock o’clock o'clock thirty watch hourglass "
    "forward reverse back next previous play east west symbol sign mark abc abcd soon on top end question exclamation "
    "calendar newspaper keyboard plus minus check numbers latin zodiac music note notes hundred points"
)
MEANINGFUL_SIDES = frozenset(_SIDED.split())


class PictureRef(ABC):
    """A picture that can be drawn: `.size` (width, height) in pixels, `.open()` -> PIL RGB image, `.to_json()`."""

    kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[PictureRef]]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        PictureRef._kinds[cls.kind] = cls

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, without drawing."""

    @abstractmethod
    def open(self) -> Image.Image:
        """The RGB picture; the same pixels each time."""

    def to_json(self) -> dict:
        """The recipe: `kind` and the fields."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(data: dict) -> PictureRef:
        """The inverse of `to_json`. PunaError for an unknown kind or wrong fields."""
        fields = dict(data)
        kind = fields.pop("kind", None)
        if kind not in PictureRef._kinds:
            raise PunaError(f"unknown picture kind {kind!r}; known are {', '.join(PictureRef._kinds)}")
        try:
            return PictureRef._kinds[kind](**fields)
        except TypeError as error:
            raise PunaError(f"picture of kind {kind!r} has wrong fields: {error}") from error


@lru_cache(maxsize=1)
def by_id() -> dict:
    """All nursery concepts by id."""
    return {concept.id: concept for concept in nursery.concepts()}


def styles(concept: str) -> tuple[str, ...]:
    """The training styles this concept is drawn in; the held-out style is never among them."""
    return by_id()[concept].styles


@lru_cache(maxsize=4096)
def _source(concept: str, style: str) -> Image.Image:
    """The nursery's RGBA picture, kept in memory."""
    return nursery.picture(concept, style).convert("RGBA")


@lru_cache(maxsize=4096)
def _cut_out(concept: str, style: str) -> Image.Image:
    """The nursery's picture cropped to its visible pixels."""
    image = _source(concept, style)
    box = visible_box(image)
    if box is None:
        raise PunaError(f"picture {concept} in style {style!r} has no visible pixel")
    return image.crop(box)


def visible_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of the pixels with alpha >= VISIBLE, the last two exclusive; None if there are
    none."""
    visible_HW = np.asarray(image.getchannel("A")) >= VISIBLE
    ys, xs = visible_HW.any(1).nonzero()[0], visible_HW.any(0).nonzero()[0]
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(xs) else None


@lru_cache(maxsize=8192)
def may_mirror(concept: str) -> bool:
    """Whether a mirrored picture still shows the same thing; by group and by words of the English name."""
    concept = by_id()[concept]
    group = concept.group.casefold()
    if "flag" in group or "symbol" in group:
        return False
    words = concept.names.get("en", "").casefold().replace("-", " ").replace(":", " ").split()
    return not MEANINGFUL_SIDES.intersection(words) and not any(word.isdigit() or len(word) == 1 for word in words)


def colour_matrix(hue: float, saturation: float, brightness: float) -> tuple[float, ...]:
    """The 3x4 matrix, row by row, of a hue rotation (radians), saturation and brightness. Source: SVG filter
    effects."""
    c, s = math.cos(hue) * saturation * brightness, math.sin(hue) * saturation * brightness
    b = brightness
    return (
        0.213 * b + 0.787 * c - 0.213 * s, 0.715 * b - 0.715 * c - 0.715 * s, 0.072 * b - 0.072 * c + 0.928 * s, 0,
        0.213 * b - 0.213 * c + 0.143 * s, 0.715 * b + 0.285 * c + 0.140 * s, 0.072 * b - 0.072 * c - 0.283 * s, 0,
        0.213 * b - 0.213 * c - 0.787 * s, 0.715 * b - 0.715 * c + 0.715 * s, 0.072 * b + 0.928 * c + 0.072 * s, 0,
    )  # fmt: skip


def _inverse_affine(scale: float, angle: float, shift_x: float, shift_y: float, mirror: bool) -> tuple[float, ...]:
    """Pillow's six numbers (output pixel -> input pixel) of: mirror, scale and rotate about the centre, then shift."""
    centre = SIDE / 2
    a, b = math.cos(angle) / scale, math.sin(angle) / scale
    d, e = -b, a
    if mirror:
        a, b = -a, -b
    dx, dy = centre + shift_x, centre + shift_y
    return a, b, centre - a * dx - b * dy, d, e, centre - d * dx - e * dy


@dataclass(frozen=True)
class EmojiPicture(PictureRef):
    """One concept drawn in one style, SIDE x SIDE pixels; plain on white without `seed`, augmented with one."""

    concept: str
    style: str
    seed: int | None = None
    kind: ClassVar[str] = "emoji"

    @property
    def size(self) -> tuple[int, int]:
        return SIDE, SIDE

    def open(self) -> Image.Image:
        source = _source(self.concept, self.style)
        if self.seed is None:
            picture = Image.new("RGB", source.size, backgrounds.WHITE)
            picture.paste(source, (0, 0), source)
            return picture
        rand = rng("emoji", self.concept, self.style, self.seed)
        kind = rand.choices(list(BACKGROUND_WEIGHTS), list(BACKGROUND_WEIGHTS.values()))[0]
        picture = backgrounds.background(kind, rand, SIDE, SIDE)
        scale = rand.uniform(0.85, 1.08)
        angle = math.radians(rand.uniform(-8, 8)) if rand.random() < 0.4 else 0.0
        room = SIDE * max(0.04, (1 - scale) / 2)  # small pictures wander, large ones stay in sight
        shift_x, shift_y = rand.uniform(-room, room), rand.uniform(-room, room)
        mirror = rand.random() < 0.5 and may_mirror(self.concept)
        affine = _inverse_affine(scale, angle, shift_x, shift_y, mirror)
        drawn = source.transform(source.size, Image.AFFINE, affine, Image.BILINEAR)
        picture.paste(drawn, (0, 0), drawn)
        if rand.random() < 0.7:
            saturation = rand.uniform(0.1, 0.6) if rand.random() < 0.12 else rand.uniform(0.75, 1.25)
            matrix = colour_matrix(math.radians(rand.uniform(-12, 12)), saturation, rand.uniform(0.75, 1.15))
            picture = picture.convert("RGB", matrix)
        if rand.random() < 0.2:
            picture = picture.filter(ImageFilter.GaussianBlur(rand.uniform(0.3, 0.9)))
        return picture


@dataclass(frozen=True)
class Placed:
    """An object of a scene: its concept and style and its box in pixels (right and bottom exclusive)."""

    concept: str
    style: str
    left: int
    top: int
    right: int
    bottom: int

    def box(self, side: int) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 as integers 0-999 of a square picture of `side` pixels."""
        return to_normalised((self.left, self.top, self.right, self.bottom), side, side)


@lru_cache(maxsize=4)
def scene_concepts() -> tuple[str, ...]:
    """Ids of the naming concepts, one of each English name."""
    return tuple({c.names["en"].casefold(): c.id for c in nursery.concepts() if c.naming and "en" in c.names}.values())


@dataclass(frozen=True)
class Scene(PictureRef):
    """3 to 6 objects, each 10-40 % of the side long, on a square canvas, overlapping by less than 5 % of the smaller.

    fewest, most, smallest, largest: other numbers and lengths (shares of the side) make easier lessons, in which a
    thing is found before several are told apart, and large ones before small ones.
    split decides the backgrounds (`backgrounds.TRAIN` or `backgrounds.TEST`) and, with seed, everything else.
    """

    seed: int
    split: str = "train"
    side: int = SCENE_SIDE
    fewest: int = 3
    most: int = 6
    smallest: float = 0.1
    largest: float = 0.4
    kind: ClassVar[str] = "scene"

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise PunaError(f"unknown scene split {self.split!r}; choose 'train' or 'test'")
        if not 1 <= self.fewest <= self.most <= 6:
            raise PunaError(f"a scene has 1 to 6 objects, not {self.fewest} to {self.most}")
        if not 0.05 <= self.smallest <= self.largest <= 1:
            raise PunaError(f"objects of a scene are 0.05 to 1 of its side long, not {self.smallest} to {self.largest}")
        if self.most > 1 and self.largest > 0.45:  # larger ones could leave no room for the next
            raise PunaError(f"several objects of a scene are at most 0.45 of its side long, not {self.largest}")

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def background(self) -> str:
        """The kind of background."""
        kinds = list(backgrounds.TRAIN if self.split == "train" else backgrounds.TEST)
        return rng("scene background", self.split, self.seed).choice(kinds)

    @property
    def objects(self) -> tuple[Placed, ...]:
        """The objects with their exact boxes, in the order they are painted."""
        return tuple(spot for spot, _ in layout(self))

    def open(self) -> Image.Image:
        rand = rng("scene paint", self.split, self.seed)
        picture = backgrounds.background(self.background, rand, self.side, self.side)
        for spot, drawn in layout(self):
            picture.paste(drawn, (spot.left, spot.top), drawn)
        if self.split == "train" and rand.random() < 0.5:
            hue, saturation = math.radians(rand.uniform(-12, 12)), rand.uniform(0.75, 1.25)
            picture = picture.convert("RGB", colour_matrix(hue, saturation, rand.uniform(0.75, 1.15)))
        return picture


@lru_cache(maxsize=64)
def layout(scene: Scene) -> tuple[tuple[Placed, Image.Image], ...]:
    """The objects of a scene, each with its scaled RGBA pixels; few are kept, pixels are heavy."""
    rand = rng("scene", scene.split, scene.seed)
    placed: list[tuple[Placed, Image.Image]] = []
    for concept in rand.sample(scene_concepts(), rand.randint(scene.fewest, scene.most)):
        style = rand.choice(styles(concept))
        cut_out = _cut_out(concept, style)
        longest = rand.uniform(scene.smallest, scene.largest) * scene.side
        while True:
            drawn = _scaled(cut_out, longest)
            spot = _free_spot(rand, concept, style, drawn, scene.side, [other for other, _ in placed])
            if spot is not None:
                placed.append((spot, drawn))
                break
            longest = max(min(0.1, scene.smallest) * scene.side, longest * 0.8)  # crowded: try smaller
    return tuple(placed)


def _free_spot(rand, concept: str, style: str, drawn: Image.Image, side: int, others: list[Placed]) -> Placed | None:
    """A random place without heavy overlap, or None after 20 tries."""
    for _ in range(20):
        left, top = rand.randint(0, side - drawn.width), rand.randint(0, side - drawn.height)
        spot = Placed(concept, style, left, top, left + drawn.width, top + drawn.height)
        if all(_overlap(spot, other) < 0.05 for other in others):
            return spot
    return None


def _scaled(cut_out: Image.Image, longest: float) -> Image.Image:
    """The cut-out with its longer side `longest` pixels, cropped again to what is still visible after scaling."""
    factor = longest / max(cut_out.size)
    width, height = (max(1, round(edge * factor)) for edge in cut_out.size)
    drawn = cut_out.resize((width, height), Image.BOX if factor < 1 else Image.BILINEAR)
    return drawn.crop(visible_box(drawn) or (0, 0, width, height))


def _overlap(a: Placed, b: Placed) -> float:
    """Shared area over the smaller box's area; never less than the IoU."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((o.right - o.left) * (o.bottom - o.top) for o in (a, b))
