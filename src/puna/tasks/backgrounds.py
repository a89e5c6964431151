"""Backgrounds to put pictures on: two disjoint sets of kinds, one for training and one for testing.

A model that only ever saw emoji on white would be lost on a photograph's sky, and a grounding test on backgrounds
seen in training would measure memory. So training draws solid colours, gradients, noise, clouds, stripes and
checkers; scenes of the test split get rings, dots, waves and lattices, which are never trained on. Each is two
colours and a mask, blended in C by Pillow, in well under 0.2 ms; every number comes from the generator that is passed
in.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image

from puna.errors import PunaError

WHITE = (255, 255, 255)


@lru_cache(maxsize=8)
def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x_HW and y_HW as float32, in pixels."""
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    return x_HW, y_HW


def _colour(rand: random.Random) -> tuple[int, int, int]:
    return tuple(rand.randbytes(3))


def _near(rand: random.Random, colour: tuple[int, int, int], reach: int = 70) -> tuple[int, int, int]:
    """A colour at most `reach` away in each channel: patterns stay quieter than what stands on them."""
    return tuple(min(255, max(0, c + rand.randint(-reach, reach))) for c in colour)


def _blend(mask_HW: np.ndarray, low, high) -> Image.Image:
    """low where the mask is 0, high where it is 1."""
    mask = Image.fromarray((mask_HW * 255).astype(np.uint8))
    return Image.composite(Image.new("RGB", mask.size, high), Image.new("RGB", mask.size, low), mask)


def _along(rand: random.Random, width: int, height: int) -> np.ndarray:
    """Signed distance in pixels along a random direction."""
    x_HW, y_HW = _grid(width, height)
    angle = rand.random() * 2 * math.pi
    return math.cos(angle) * (x_HW - width / 2) + math.sin(angle) * (y_HW - height / 2)


def _white(rand, width, height):
    return Image.new("RGB", (width, height), WHITE)


def _solid(rand, width, height):
    return Image.new("RGB", (width, height), _colour(rand))


def _gradient(rand, width, height):
    mask_HW = np.clip(_along(rand, width, height) / math.hypot(width, height) + 0.5, 0, 1)
    return _blend(mask_HW, _colour(rand), _colour(rand))


def _noise(rand, width, height):
    noise = np.frombuffer(rand.randbytes(width * height), np.uint8).reshape(height, width)
    low, high = _colour(rand), _colour(rand)
    mask = Image.fromarray(noise)
    base = Image.composite(Image.new("RGB", mask.size, high), Image.new("RGB", mask.size, low), mask)
    return Image.blend(Image.new("RGB", mask.size, low), base, rand.uniform(0.2, 0.8))


def _clouds(rand, width, height):
    cells = rand.randint(2, 7)
    small = np.frombuffer(rand.randbytes(cells * cells * 3), np.uint8).reshape(cells, cells, 3)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def _stripes(rand, width, height):
    period = rand.uniform(0.08, 0.35) * width
    low = _colour(rand)
    return _blend((_along(rand, width, height) / period) % 1 < 0.5, low, _near(rand, low))


def _checker(rand, width, height):
    x_HW, y_HW = _grid(width, height)
    cell = rand.uniform(0.06, 0.25) * width
    low = _colour(rand)
    return _blend((x_HW // cell + y_HW // cell) % 2, low, _near(rand, low))


def _rings(rand, width, height):
    x_HW, y_HW = _grid(width, height)
    radius_HW = np.hypot(x_HW - rand.random() * width, y_HW - rand.random() * height)
    low = _colour(rand)
    mask_HW = 0.5 + 0.5 * np.sin(radius_HW * (2 * math.pi / (rand.uniform(0.1, 0.4) * width)))
    return _blend(mask_HW, low, _near(rand, low))


def _dots(rand, width, height):
    x_HW, y_HW = _grid(width, height)
    cell = rand.uniform(0.08, 0.2) * width
    radius = rand.uniform(0.2, 0.4) * cell
    low = _colour(rand)
    return _blend(np.hypot(x_HW % cell - cell / 2, y_HW % cell - cell / 2) < radius, low, _near(rand, low))


def _waves(rand, width, height):
    x_HW, y_HW = _grid(width, height)
    period = rand.uniform(0.1, 0.3) * width
    bend_HW = np.sin(x_HW * (2 * math.pi / (rand.uniform(0.3, 0.8) * width))) * rand.uniform(0.02, 0.06) * height
    low = _colour(rand)
    return _blend(((y_HW + bend_HW) / period) % 1, low, _near(rand, low))


def _lattice(rand, width, height):
    x_HW, y_HW = _grid(width, height)
    cell = rand.uniform(0.1, 0.25) * width
    line = rand.uniform(0.15, 0.3)
    low = _colour(rand)
    mask_HW = ((x_HW + y_HW) / cell % 1 < line) | ((x_HW - y_HW) / cell % 1 < line)
    return _blend(mask_HW, low, _near(rand, low))


TRAIN = {
    "white": _white,
    "solid": _solid,
    "gradient": _gradient,
    "noise": _noise,
    "clouds": _clouds,
    "stripes": _stripes,
    "checker": _checker,
}
TEST = {"rings": _rings, "dots": _dots, "waves": _waves, "lattice": _lattice}
KINDS = TRAIN | TEST


def background(kind: str, rand: random.Random, width: int, height: int) -> Image.Image:
    """An RGB background of `width` x `height` pixels. kind: one of `TRAIN` or `TEST`; PunaError otherwise."""
    if kind not in KINDS:
        raise PunaError(f"unknown background {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind](rand, width, height)
