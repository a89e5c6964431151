"""A film as pictures: a few of its frames, evenly sampled, each with its time.

Llama 4 learned video as stills (llama4-facts.md §3.5); how they were chosen and written is not published. Ours: the
running time is cut into n equal parts and the frame shown in the middle of each part is taken, small enough for one
tile. In a conversation its time stands before it as text, `[0:01.5]`, so that a model can say *when*.

MP4 and WebM are decoded by PyAV (FFmpeg), with the container's format given and not guessed: FFmpeg's playlist formats
open other files. GIF and WebP are decoded by pillow.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from puna.errors import PunaError
from puna.processor.image import MAX_PIXELS, to_rgb

FRAMES = 8  # of a video that says nothing else
_DAMAGED = "the video is damaged or truncated: its frames cannot be decoded"


@dataclass(frozen=True)
class Frame:
    """An RGB `picture` and the `seconds` from the start at which it appears."""

    seconds: float
    picture: Image.Image

    @property
    def time(self) -> str:
        """minutes:seconds with a tenth, as "1:02.5"."""
        tenths = round(self.seconds * 10)
        return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def read_video(source: bytes | os.PathLike, frames: int = FRAMES, side: int | None = None) -> list[Frame]:
    """At most `frames` frames of an MP4, WebM, GIF or WebP file (its bytes or a `pathlib.Path`), in order.

    side: shrink them to fit in a square of so many pixels. A video of fewer frames gives all it has. Nothing is
    fetched, and a string is never taken for a path. Raises `PunaError`.
    """
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise PunaError(f"frames of a video must be a whole number from 1 on, not {frames!r}")
    if isinstance(source, os.PathLike):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise PunaError(f"cannot read the video {source}: {error.strerror or error}") from error
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    else:
        raise PunaError(f"a video must be a pathlib.Path or the file's bytes, not {type(source).__name__}")
    if not data:
        raise PunaError("the video is empty: 0 bytes")
    kind = _kind(data)
    found = _animation(data, frames) if kind == "animation" else _film(data, kind, frames)
    for frame in found if side else ():
        frame.picture.thumbnail((side, side))
    return found


def film_size(data: bytes) -> tuple[int, int, int]:
    """(width, height, frames) of a video file: its packets or blocks are counted, no pixel is decoded.

    A server bounds with it what `read_video` may be made to do. Raises `PunaError` for what is no readable video."""
    try:
        if (kind := _kind(data)) == "animation":
            with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as film:
                return *film.size, getattr(film, "n_frames", 1)
        with _av().open(io.BytesIO(data), format=kind) as film:
            if not film.streams.video:
                raise PunaError("the video has no pictures: no video stream is in the file")
            stream = film.streams.video[0]
            return stream.width, stream.height, sum(packet.pts is not None for packet in film.demux(stream))
    except PunaError:
        raise
    except Exception as error:  # the parsers raise many types on broken bytes
        raise PunaError(_DAMAGED) from error


def _kind(data: bytes) -> str:
    """Which decoder: "animation" for pillow, or the name of the container format for FFmpeg."""
    if data[:4] == b"GIF8" or (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return "animation"
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "webm"
    raise PunaError("the video is not an MP4, WebM, GIF or WebP file, or its start is damaged")


def _av():
    try:
        import av
    except ImportError as error:
        raise PunaError("MP4 and WebM videos need PyAV: pip install 'puna[video]'") from error
    return av


def _chosen(starts: Sequence[float], end: float, frames: int) -> list[int]:
    """Which of the frames that begin at `starts` are shown in the middles of equal parts of the time to `end`."""
    if len(starts) <= frames:
        return list(range(len(starts)))
    step = (end - starts[0]) / frames
    middles = (starts[0] + (i + 0.5) * step for i in range(frames))
    return sorted({bisect_right(starts, middle) - 1 for middle in middles})


def _animation(data: bytes, frames: int) -> list[Frame]:
    try:
        with Image.open(io.BytesIO(data), formats=("GIF", "WEBP")) as film:
            _check_size(*film.size)
            starts, end = [], 0.0
            for i in range(getattr(film, "n_frames", 1)):
                film.seek(i)
                film.load()
                starts.append(end)
                end += (film.info.get("duration") or 100) / 1000  # browsers show a frame of no duration for 0.1 s
            found = []
            for i in _chosen(starts, end, frames):
                film.seek(i)
                found.append(Frame(starts[i], to_rgb(film.copy())))
            return found
    except PunaError:
        raise
    except Exception as error:  # pillow's parsers raise many types on broken bytes: all of them mean the same here
        raise PunaError(_DAMAGED) from error


def _film(data: bytes, kind: str, frames: int) -> list[Frame]:
    av = _av()
    try:
        with av.open(io.BytesIO(data), format=kind) as film:
            if not film.streams.video:
                raise PunaError("the video has no pictures: no video stream is in the file")
            stream = film.streams.video[0]
            _check_size(stream.width, stream.height)
            shown = {p.pts: p.duration or 0 for p in film.demux(stream) if p.pts is not None and not p.is_discard}
            if not shown:
                raise PunaError("the video is empty: it has no frames")
            starts = sorted(shown)
            end = starts[-1] + shown[starts[-1]]
            said = stream.duration  # in WebM the whole file's alone, which sound may make longer
            if said is None and film.duration and len(film.streams) == 1:
                said = film.duration / av.time_base / stream.time_base
            if said and said - (end - starts[0]) > max(1 / stream.time_base, said / 10):
                raise PunaError(_DAMAGED)
            found = []
            for i in _chosen(starts, end, frames):
                film.seek(starts[i], stream=stream)  # to the key frame before it
                frame = next(f for f in film.decode(stream) if f.pts is not None and f.pts >= starts[i])
                picture = frame.to_image()
                if frame.rotation:  # telephones store pictures lying, and say so
                    picture = picture.rotate(frame.rotation, expand=True)
                found.append(Frame(float((starts[i] - starts[0]) * stream.time_base), picture))
            return found
    except (av.FFmpegError, StopIteration) as error:
        raise PunaError(_DAMAGED) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PunaError(f"the video is too large: {width}x{height} is more than {MAX_PIXELS} pixels; make it smaller")
