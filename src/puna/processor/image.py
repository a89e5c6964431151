"""Pictures in, tiles out: Llama 4's way of showing pictures of any shape to a tower that sees one square size.

A picture is laid on a *canvas* of R x C tiles (R*C <= 16), chosen so that it is enlarged or shrunk as little as
possible; what the picture does not cover stays black. The canvas is cut into tiles, and when there is more than one,
the whole picture squeezed into one tile follows as the *global tile*, so the model has the overview beside the
details.

Which canvas? For every allowed (R, C) the scale is ``min(C*tile / w, R*tile / h)``, the factor that makes the picture
fit. If some canvas needs no shrinking (scale >= 1), the smallest such scale wins, otherwise the largest; ties go to
the smaller canvas. We compare integers (scale * w * h), so ties are exact. On its canvas a picture is never enlarged
beyond one tile.

Source: llama4-facts.md §3.3 (steps), §3.4 (vectors). Pillow does the resizing, so torchvision is not needed.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from puna.errors import PunaError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's limit is above ours


@dataclass(frozen=True)
class Canvas:
    """Where a picture lands: `rows` x `cols` tiles, the resized `width` x `height` in pixels, `tiles` for the encoder
    (the global tile counted)."""

    rows: int
    cols: int
    width: int
    height: int
    tiles: int


@dataclass(frozen=True)
class ImageProcessor:
    """Tiles pictures. The defaults are Llama 4's.

    `tile`: side in pixels; `patch`: side of a patch; `max_tiles`: without the global tile; `resize_to_max_canvas`:
    choose the largest canvas that fits instead of the nearest; `pixel_shuffle`: the vision tower's ratio, which
    decides how many tokens a tile becomes.
    """

    tile: int = 336
    patch: int = 14
    max_tiles: int = 16
    resize_to_max_canvas: bool = False
    pixel_shuffle: float = 0.5

    def __post_init__(self) -> None:
        for name in ("tile", "patch", "max_tiles"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PunaError(f"ImageProcessor: {name} must be a positive whole number, not {value!r}")
        if self.tile % self.patch:
            raise PunaError(f"ImageProcessor: tile {self.tile} is not a multiple of patch {self.patch}")
        side = self.tile // self.patch * self.pixel_shuffle
        if side < 1 or side != int(side):
            raise PunaError(
                f"ImageProcessor: {self.tile // self.patch} patches a side times pixel_shuffle {self.pixel_shuffle} "
                "is not a whole number"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Patch tokens of one tile: 144 in Llama 4."""
        return int(self.tile // self.patch * self.pixel_shuffle) ** 2

    def plan(self, w: int, h: int) -> Canvas:
        """The canvas of a picture `w` x `h` pixels. Raises `PunaError` for an empty one."""
        if w < 1 or h < 1:
            raise PunaError(f"a picture of {w}x{h} pixels is empty")
        return _plan(self.tile, self.max_tiles, self.resize_to_max_canvas, int(w), int(h))

    def tokens(self, w: int, h: int) -> int:
        """Tokens a picture `w` x `h` takes in the text, its separators and brackets counted (llama4-facts.md §3.4)."""
        canvas = self.plan(w, h)
        n = canvas.rows * canvas.cols
        return self.tokens_per_tile + 3 if n == 1 else self.tokens_per_tile * (n + 1) + n + 3

    def tiles(self, picture: Image.Image) -> torch.Tensor:
        """float32 tiles [n, 3, tile, tile] in [-1, 1]: row by row, then the global tile when there is more than one."""
        picture = to_rgb(picture)
        canvas = self.plan(*picture.size)
        rows, cols, side = canvas.rows, canvas.cols, self.tile
        pixels = np.zeros((rows * side, cols * side, 3), np.uint8)  # black before normalisation: -1 after it
        pixels[: canvas.height, : canvas.width] = _resized(picture, canvas.width, canvas.height)
        parts = pixels.reshape(rows, side, cols, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)
        if canvas.tiles > 1:
            parts = np.concatenate([parts, _resized(picture, side, side).transpose(2, 0, 1)[None]])
        return torch.from_numpy(np.ascontiguousarray(parts)).float().div_(127.5).sub_(1.0)  # (x / 255 - 0.5) / 0.5


@lru_cache(maxsize=4096)
def _plan(tile: int, max_tiles: int, largest: bool, w: int, h: int) -> Canvas:
    fits, shrinks = [], []
    for rows in range(1, max_tiles + 1):
        for cols in range(1, max_tiles // rows + 1):
            scale = tile * min(cols * h, rows * w)  # times w*h, so that all is whole numbers
            (fits if scale >= w * h else shrinks).append((scale, rows * cols, rows, cols))
    if fits and not largest:
        _, area, rows, cols = min(fits)
    else:
        _, area, rows, cols = min(fits or shrinks, key=lambda c: (-c[0], c[1]))
    # Fit into the canvas, but enlarge no further than to one tile.
    target_w = min(max(w, tile), cols * tile)
    target_h = min(max(h, tile), rows * tile)
    if target_w * h <= target_h * w:
        width, height = target_w, min(max(h * target_w // w, 1), target_h)
    else:
        width, height = min(max(w * target_h // h, 1), target_w), target_h
    return Canvas(rows, cols, width, height, area + (area > 1))


def _resized(picture: Image.Image, width: int, height: int) -> np.ndarray:
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any Pillow picture as RGB: transparency is laid on white, 16-bit grey is scaled to 8 bits."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to 255 instead of scaling it
        return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        if picture.mode in ("RGBa", "La"):
            picture = picture.convert({"RGBa": "RGBA", "La": "LA"}[picture.mode])
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")


# ------------------------------------------------------------------- untrusted pictures
_DATA_URL = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the picture upright


def open_picture(
    source: bytes | os.PathLike | str, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The upright RGB picture in `source`: the bytes of a file, a `pathlib.Path`, or a data URL as a string.

    PNG, JPEG, WebP and GIF are read, of an animation the first frame; EXIF rotation is applied; transparency is laid
    on white. Nothing is ever fetched, and a *string* is never taken for a path, so a server may hand on what a client
    sent. Raises `PunaError` for everything else: other formats, damaged or oversized files, URLs. The pixel limit is
    checked on the header, before any pixel is decoded.
    """
    if isinstance(source, str):
        data = _data_of_url(source, max_bytes)
    elif isinstance(source, os.PathLike):
        data = _data_of_file(Path(source), max_bytes)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        raise PunaError(f"a picture must be bytes, a path or a data URL, not {type(source).__name__}")
    if not data:
        raise PunaError("the picture is empty: 0 bytes")
    _check_bytes(len(data), max_bytes)
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise PunaError("the picture is not a PNG, JPEG, WebP or GIF file, or its start is damaged") from error
    except Image.DecompressionBombError as error:
        raise PunaError(f"the picture is too large: more than {max_pixels} pixels; make it smaller") from error
    except Exception as error:  # Pillow's parsers raise many types on broken bytes: all of them mean the same here
        raise PunaError("the picture is damaged: its header cannot be read") from error
    w, h = picture.size
    if w < 1 or h < 1:
        raise PunaError("the picture is empty: it has no pixels")
    if w * h > max_pixels:
        raise PunaError(f"the picture is too large: {w}x{h} is more than {max_pixels} pixels; make it smaller")
    try:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        return to_rgb(picture if turn is None else picture.transpose(turn))
    except Exception as error:  # as above, now from the decoders
        raise PunaError("the picture is damaged or truncated: its pixels cannot be decoded") from error


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block does not spoil the pixels: the picture is taken as it stands
        return 1


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PunaError(f"the picture is too large: {size} bytes, at most {max_bytes} are read; make it smaller")


def _data_of_url(url: str, max_bytes: int) -> bytes:
    if url[:5].lower() != "data:":
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", url) or url.startswith(("//", "\\\\")):
            scheme = url.split(":", 1)[0][:20] if ":" in url[:21] else "network"
            raise PunaError(f"{scheme} addresses of pictures are not fetched: send the picture as a data URL")
        raise PunaError("a picture given as text must be a data URL (data:image/png;base64,...); wrap a path in Path()")
    head = _DATA_URL.match(url)
    if not head:
        raise PunaError("the data URL must start with data:image/ png, jpeg, webp or gif and ;base64,")
    _check_bytes((len(url) - head.end()) // 4 * 3 - 2, max_bytes)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise PunaError("the data URL's base64 is damaged") from error


def _data_of_file(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():
            raise PunaError(f"no picture file at {path}")
        _check_bytes(path.stat().st_size, max_bytes)
        return path.read_bytes()
    except OSError as error:
        raise PunaError(f"cannot read the picture {path}: {error.strerror or error}") from error
