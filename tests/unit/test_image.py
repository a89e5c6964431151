"""Pictures to tiles: the published vectors, pixel for pixel order, and hostile files."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from puna.errors import PunaError
from puna.processor import ImageProcessor, open_picture, to_rgb
from puna.processor.image import Canvas

LLAMA4 = ImageProcessor()
NANO = ImageProcessor(tile=64, patch=8, max_tiles=4)
VECTORS = [  # llama4-facts.md §3.4: w, h, rows, cols, resized w, resized h, encoder tiles, tokens
    (336, 336, 1, 1, 336, 336, 1, 147),
    (100, 100, 1, 1, 336, 336, 1, 147),
    (300, 800, 3, 1, 300, 800, 4, 582),
    (640, 480, 2, 2, 640, 480, 5, 727),
    (1024, 768, 3, 4, 1024, 768, 13, 1887),
    (1920, 1080, 3, 5, 1680, 945, 16, 2322),
    (1080, 1920, 5, 3, 945, 1680, 16, 2322),
    (4000, 3000, 3, 4, 1344, 1008, 13, 1887),
    (2048, 512, 2, 7, 2048, 512, 15, 2177),
    (10000, 500, 1, 16, 5376, 268, 17, 2467),
]


@pytest.mark.parametrize(("w", "h", "rows", "cols", "rw", "rh", "tiles", "tokens"), VECTORS)
def test_published_vectors(w, h, rows, cols, rw, rh, tiles, tokens):
    assert LLAMA4.plan(w, h) == Canvas(rows, cols, rw, rh, tiles)
    assert LLAMA4.tokens(w, h) == tokens


def test_the_largest_picture_takes_2467_tokens():
    sizes = [(a, b) for a in range(50, 8000, 397) for b in range(50, 8000, 397)]
    assert max(LLAMA4.tokens(*size) for size in sizes) <= 2467
    assert LLAMA4.tokens_per_tile == 144 and NANO.tokens_per_tile == 16


def test_plan_keeps_its_promises_at_any_size():
    for w in (1, 2, 63, 64, 65, 100, 129, 700, 20_000):
        for h in (1, 3, 64, 66, 128, 333, 20_000):
            c = NANO.plan(w, h)
            assert c.rows * c.cols <= 4 and c.tiles == c.rows * c.cols + (c.rows * c.cols > 1)
            assert 1 <= c.width <= c.cols * 64 and 1 <= c.height <= c.rows * 64
            assert c.width == min(max(w, 64), c.cols * 64) or c.height == min(max(h, 64), c.rows * 64)
            assert NANO.plan(h, w) == Canvas(c.cols, c.rows, c.height, c.width, c.tiles)


def test_resize_to_max_canvas_takes_more_tiles():
    large = ImageProcessor(resize_to_max_canvas=True)
    assert LLAMA4.plan(336, 336).tiles == 1
    assert large.plan(336, 336) == Canvas(4, 4, 336, 336, 17)
    assert large.plan(4000, 3000) == LLAMA4.plan(4000, 3000)  # nothing fits unshrunk: the option changes nothing


def test_tiles_come_row_by_row_then_the_global_one():
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    picture = Image.fromarray(colours.repeat(64, 0).repeat(64, 1))
    tiles = NANO.tiles(picture)
    assert tiles.shape == (5, 3, 64, 64) and tiles.dtype == torch.float32 and tiles.is_contiguous()
    expected = torch.from_numpy(colours.reshape(4, 3)).float() / 255 * 2 - 1
    assert torch.equal(tiles[:4], expected[:, :, None, None].expand(-1, -1, 64, 64))
    assert torch.equal(tiles[4, :, [0, 0, -1, -1], [0, -1, 0, -1]].T, expected)  # the global tile's corners


def test_padding_is_black_before_normalisation_and_small_pictures_grow_to_one_tile():
    white = NANO.tiles(Image.new("RGB", (64, 32), "white"))
    assert white.shape == (1, 3, 64, 64)
    assert (white[0, :, :32] == 1).all() and (white[0, :, 32:] == -1).all()
    grown = NANO.tiles(Image.new("RGB", (8, 8), "white"))
    assert (grown == 1).all()
    not_grown = NANO.tiles(Image.new("RGB", (70, 70), "white"))  # 2x2 canvas, stays 70 wide
    assert not_grown.shape[0] == 5 and (not_grown[0] == 1).all()
    assert (not_grown[1, :, :, :6] == 1).all() and (not_grown[1, :, :, 6:] == -1).all()
    assert (not_grown[4] == 1).all()  # the global tile is filled, not padded


def test_the_global_tile_is_squeezed_with_distortion():
    wide = Image.new("RGB", (128, 64), "white")
    tiles = NANO.tiles(wide)
    assert tiles.shape[0] == 3 and (tiles == 1).all()


def test_normalisation_is_mean_and_std_one_half():
    grey = NANO.tiles(Image.new("RGB", (64, 64), (0, 51, 255)))
    assert torch.allclose(grey[0, :, 0, 0], torch.tensor([-1.0, (51 / 255 - 0.5) / 0.5, 1.0]), atol=1e-6)


def test_resizing_is_bilinear_with_antialiasing():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    canvas = NANO.plan(300, 200)
    expected = np.asarray(picture.resize((canvas.width, canvas.height), Image.Resampling.BILINEAR))
    first = (NANO.tiles(picture)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(first - expected[:64, :64]).max() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_survive(size):
    tiles = NANO.tiles(Image.new("RGB", size, "white"))
    assert tiles.shape[0] == NANO.plan(*size).tiles and torch.isfinite(tiles).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tile": 336, "patch": 15}, "not a multiple"),
        ({"tile": 12, "patch": 4}, "not a whole number"),
        ({"tile": 0}, "positive whole"),
        ({"max_tiles": 0}, "positive whole"),
        ({"patch": "14"}, "positive whole"),
    ],
)
def test_impossible_settings_are_told(arguments, said):
    with pytest.raises(PunaError, match=said):
        ImageProcessor(**arguments)


def test_empty_pictures_are_told():
    with pytest.raises(PunaError, match="empty"):
        LLAMA4.plan(0, 5)


# ------------------------------------------------------------------- oracle
def test_against_transformers_image_processor():
    """Where torchvision is installed: same tiles but for the back-end's rounding (bfloat16 output, own resize)."""
    # One that was built for another torch raises RuntimeError and is no oracle.
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    theirs = pytest.importorskip("transformers.models.llama4.image_processing_llama4").Llama4ImageProcessor()
    generator = np.random.default_rng(0)
    for w, h in ((336, 336), (100, 100), (300, 800), (640, 480), (1024, 768), (500, 300)):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        picture = coarse.resize((w, h), Image.Resampling.BICUBIC)
        reference = theirs(picture, return_tensors="pt")["pixel_values"].float()
        tiles = LLAMA4.tiles(picture)
        assert tiles.shape == reference.shape
        assert (tiles - reference).abs().max() < 0.03


# ------------------------------------------------------------------- files from strangers
def packed(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", (40, 20), (200, 30, 30))
    picture.paste((30, 30, 200), (20, 0, 40, 20))
    return picture.convert(mode)


MODES = [("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "L")]


@pytest.mark.parametrize(("kind", "mode"), [*MODES, ("PNG", "1"), ("JPEG", "L")])
def test_formats_and_modes(kind, mode, tmp_path):
    data = packed(scene(mode), kind)
    (tmp_path / "picture").write_bytes(data)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    pictures = [open_picture(data), open_picture(tmp_path / "picture"), open_picture(url)]
    assert all(p.mode == "RGB" and p.size == (40, 20) for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 1
    expected = scene(mode).convert("RGB")
    assert np.abs(np.asarray(pictures[0], int) - np.asarray(expected, int)).mean() < 6


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert open_picture(packed(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(packed(half, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    assert open_picture(packed(half, "WEBP", lossless=True)).getpixel((0, 0)) == (127, 127, 127)
    assert open_picture(packed(Image.new("LA", (8, 8), (0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9] + [0] * 762)
    for kind in ("PNG", "GIF"):
        assert open_picture(packed(palette, kind, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
        assert open_picture(packed(palette, kind)).getpixel((0, 0)) == (9, 9, 9)
    keyed = packed(Image.new("RGB", (8, 8), (5, 6, 7)), "PNG", transparency=(5, 6, 7))
    assert open_picture(keyed).getpixel((0, 0)) == (255, 255, 255)
    assert (NANO.tiles(clear) == 1).all()  # pictures that were never files are treated alike


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    assert [open_picture(packed(grey, "PNG")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert to_rgb(Image.fromarray(np.array([[0x7F00]], np.int32))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = packed(scene(), "JPEG", exif=exif, quality=95)
    picture = open_picture(data)
    assert picture.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()
    assert picture.size == ((40, 20) if orientation < 5 else (20, 40))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_the_picture():
    data = packed(scene(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert open_picture(data).size == (40, 20)


def test_only_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (10, 10), c) for c in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = packed(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_picture(data).getpixel((5, 5)) == (255, 0, 0)


def _bomb(side: int) -> bytes:
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


PNG = packed(Image.effect_noise((60, 60), 90), "PNG")
JPEG = packed(Image.effect_noise((60, 60), 90), "JPEG")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"", "empty"),
        (b"\x00\x01hello", "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        (b"%PDF-1.7\n", "not a PNG"),
        (packed(Image.new("RGB", (4, 4)), "TIFF"), "not a PNG"),
        (packed(Image.new("RGB", (4, 4)), "BMP"), "not a PNG"),
        (packed(Image.new("RGB", (4, 4)), "PPM"), "not a PNG"),
        (PNG[: len(PNG) // 2], "damaged or truncated"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated"),
        (PNG[:20], "damaged"),
        (_bomb(8_000), "too large"),
        (_bomb(10_000), "too large"),
        (_bomb(30_000), "too large"),
        (_bomb(100), "damaged or truncated"),
        ("http://127.0.0.1/a.png", "not fetched"),
        ("HTTPS://example.org/a.png", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("ftp://x/y", "not fetched"),
        ("//server/share/a.png", "not fetched"),
        ("\\\\server\\share\\a.png", "not fetched"),
        ("/etc/passwd", "must be a data URL"),
        ("a.png", "must be a data URL"),
        ("", "must be a data URL"),
        ("data:text/html;base64,AAAA", "must start with data:image"),
        ("data:image/svg+xml;base64,AAAA", "must start with data:image"),
        ("data:image/png,rawbytes", "must start with data:image"),
        ("data:image/png;base64", "must start with data:image"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,AAA", "base64 is damaged"),
        ("data:image/png;base64,AA!A", "base64 is damaged"),
        ("data:image/png;base64,ÄÖÜß", "base64 is damaged"),
        (None, "must be bytes, a path or a data URL"),
        (5, "must be bytes, a path or a data URL"),
    ],
)
def test_hostile_pictures_are_told(source, said):
    with pytest.raises(PunaError, match=said):
        open_picture(source)


def test_limits_are_settable_and_checked_before_reading(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in (PNG, path, url):
        assert open_picture(source, max_bytes=len(PNG), max_pixels=3600).size == (60, 60)
        with pytest.raises(PunaError, match="too large"):
            open_picture(source, max_bytes=len(PNG) - 1)
        with pytest.raises(PunaError, match="too large: 60x60"):
            open_picture(source, max_pixels=3599)


def test_missing_files_and_folders_are_told(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(PunaError, match="no picture file"):
            open_picture(path)


def test_damage_anywhere_is_told_or_survived():
    """Every error on flipped bytes is a PunaError: nothing of the decoders leaks out."""
    generator = np.random.default_rng(0)
    originals = [PNG, JPEG, packed(scene("P"), "GIF"), packed(scene(), "WEBP")]
    told = 0
    for trial in range(300):
        data = bytearray(originals[trial % 4])
        for _ in range(4):
            data[generator.integers(8, len(data))] = generator.integers(256)
        try:
            assert open_picture(bytes(data)).mode == "RGB"
        except PunaError:
            told += 1
    assert told > 20
