"""Films as pictures: which frames, their times, and what becomes of broken files. All films are made here."""

import io
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from puna.errors import PunaError
from puna.processor import Processor
from puna.processor.video import Frame, read_video

SIZE = (64, 48)


def shade(i):
    return 10 + 6 * i  # frame i is this grey


def number(frame):
    """Which frame a picture is, by its grey."""
    return round((np.asarray(frame.picture).mean() - 10) / 6)


def film(count=40, fps=10, kind="mp4", **options):
    """`count` frames of rising grey; key frames are rare, so that seeking matters."""
    av = pytest.importorskip("av")
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", format=kind, options=options) as container:
        stream = container.add_stream("mpeg4" if kind == "mp4" else "libvpx", rate=fps)
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 2_000_000, 12
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
        for i in range(count):
            picture = np.full((SIZE[1], SIZE[0], 3), shade(i), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(file.name).read_bytes()


def animation(kind, count=40, duration=100):
    file = io.BytesIO()
    pictures = [Image.new("RGB", SIZE, (shade(i),) * 3) for i in range(count)]
    options = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=duration, **options)
    return file.getvalue()


MAKERS = {
    "mp4": film,
    "webm": lambda **options: film(kind="webm", **options),
    "gif": lambda **options: animation("GIF", **options),
    "webp": lambda **options: animation("WEBP", **options),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))


@EVERY
def test_frames_are_the_middles_of_equal_parts(make):
    """4 seconds at 10 frames a second, in 4 parts: the frames shown at 0.5, 1.5, 2.5 and 3.5 s."""
    found = read_video(make(), 4)
    assert [number(frame) for frame in found] == [5, 15, 25, 35]
    assert [frame.seconds for frame in found] == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=1e-3)
    assert [frame.time for frame in found] == ["0:00.5", "0:01.5", "0:02.5", "0:03.5"]
    assert {frame.picture.size for frame in found} == {SIZE} and {f.picture.mode for f in found} == {"RGB"}
    assert [number(frame) for frame in read_video(make(), 3)] == [6, 20, 33]
    assert [number(frame) for frame in read_video(make(), 1)] == [20]


@EVERY
def test_a_short_film_gives_every_frame_it_has(make):
    assert [number(frame) for frame in read_video(make(count=3), 8)] == [0, 1, 2]
    assert len(read_video(make())) == 8  # the default


def test_a_still_is_one_frame_and_unequal_durations_count():
    assert [frame.time for frame in read_video(animation("GIF", count=1))] == ["0:00.0"]
    slow_start = animation("GIF", count=4, duration=[1000, 100, 100, 100])
    assert [number(frame) for frame in read_video(slow_start, 2)] == [0]  # frame 0 is shown at 0.3 s and at 1.0 s
    assert [frame.time for frame in read_video(slow_start, 4)] == ["0:00.0", "0:01.0", "0:01.1", "0:01.2"]


def test_times():
    assert [Frame(s, None).time for s in (0, 0.04, 59.96, 62.5, 3601)] == [
        "0:00.0", "0:00.0", "1:00.0", "1:02.5", "60:01.0",
    ]  # fmt: skip


def test_frames_shrink_to_fit(tmp_path):
    path = tmp_path / "film.gif"
    path.write_bytes(animation("GIF"))
    assert {frame.picture.size for frame in read_video(path, 2, side=16)} == {(16, 12)}
    assert {frame.picture.size for frame in read_video(path, 2, side=100)} == {SIZE}


@EVERY
def test_a_video_in_a_message(tiny_processor, make, tmp_path):
    """Each frame one tile behind its time, at the place of the part; the same as its frames given one by one."""
    path = tmp_path / "film"
    path.write_bytes(make())
    parts = [{"type": "text", "text": "Look: "}, {"type": "video", "video": path, "frames": 3},
             {"type": "text", "text": " what is it?"}]  # fmt: skip
    encoded = tiny_processor.encode_chat([{"role": "user", "content": parts}])
    one = "<|image_start|><|image|><|patch|><|patch|><|patch|><|patch|><|image_end|>"
    times = [frame.time for frame in read_video(path, 3)]
    assert f"Look: {''.join(f'[{time}]{one}' for time in times)} what is it?<|eot|>" in tiny_processor.tokenizer.decode(
        encoded.tokens, special=True
    )
    single = [parts[0]]
    for frame in read_video(path, 3, side=16):
        single += [{"type": "text", "text": f"[{frame.time}]"}, {"type": "image", "image": frame.picture}]
    again = tiny_processor.encode_chat([{"role": "user", "content": [*single, parts[2]]}])
    assert (encoded.tokens == again.tokens).all()
    assert (tiny_processor.tiles(encoded.pictures) == tiny_processor.tiles(again.pictures)).all()
    assert tiny_processor.tiles(encoded.pictures).shape[0] == 3
    with pytest.raises(PunaError, match="user messages only"):
        tiny_processor.encode_chat([{"role": "assistant", "content": [parts[1]]}])
    with pytest.raises(PunaError, match="reads text only"):
        Processor(tiny_processor.tokenizer).encode_chat([{"role": "user", "content": parts}])


def test_a_telephones_film_stands_upright():
    """A display matrix in the file says "turn by 90 degrees"."""
    av = pytest.importorskip("av")
    data = bytearray(film(count=2))
    start = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer ...: the matrix, 9 numbers of 16.16
    one = (1 << 16).to_bytes(4, "big")
    assert data[start : start + 4] == one
    zero, minus = bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)
    data[start : start + 20] = zero + one + zero + minus + zero  # clockwise by 90 degrees
    with av.open(io.BytesIO(bytes(data)), format="mp4") as container:
        assert next(container.decode(video=0)).rotation == -90
    assert read_video(bytes(data), 1)[0].picture.size == SIZE[::-1]


@EVERY
def test_a_truncated_film_is_told(make):
    data = make()
    for size in (12, 40, len(data) // 2):
        with pytest.raises(PunaError, match="damaged or truncated|empty"):
            read_video(data[:size], 40)


def test_a_film_whose_index_is_whole_but_its_end_is_gone_is_told():
    data = film(movflags="faststart")  # the index comes first
    assert len(read_video(data, 40)) == 40
    with pytest.raises(PunaError, match="damaged or truncated"):
        read_video(data[: len(data) * 2 // 3], 4)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"", "0 bytes"), (b"hello, this is text", "not an MP4"), (b"\0\0\0\x18ftypisom" + bytes(50), "damaged|empty"),
        (b"GIF89a" + bytes(40), "damaged|empty"), (b"RIFF\x10\0\0\0WEBPVP8X", "damaged"), ("film.mp4", "pathlib.Path"),
        (b"\x1aE\xdf\xa3" + bytes(60), "damaged|empty"), (None, "pathlib.Path"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not an MP4"),
    ],
)  # fmt: skip
def test_what_is_no_film_is_told(source, said):
    with pytest.raises(PunaError, match=said):
        read_video(source)


def test_wrong_numbers_and_paths_are_told(tmp_path, tiny_processor):
    for frames in (0, -1, 2.5, True, "8"):
        with pytest.raises(PunaError, match="frames of a video"):
            read_video(animation("GIF", count=2), frames)
    with pytest.raises(PunaError, match="cannot read the video"):
        read_video(tmp_path / "absent.mp4")
    with pytest.raises(PunaError, match="message 1: cannot read the video"):
        tiny_processor.encode_chat([{"role": "user", "content": [{"type": "video", "video": tmp_path / "absent.mp4"}]}])


def test_sound_alone_is_told():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(PunaError, match="no video stream"):
        read_video(file.getvalue())


def test_without_the_extra_the_error_names_it(monkeypatch):
    data = film(count=1)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(PunaError, match=r"pip install 'puna\[video\]'"):
        read_video(data)
    assert read_video(animation("GIF", count=2))  # pillow's own
