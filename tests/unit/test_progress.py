"""What a terminal shows while `puna convert` works, seen through a pseudo-terminal; and nothing of it elsewhere."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from training_helpers import lively_model

from puna.convert.puna import save

SLOWED = """
import sys, time
import puna.convert.folder as folder
whole = folder.move
def move(*args):
    time.sleep(PAUSE)
    whole(*args)
folder.move = move
from puna.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("progress") / "model"
    model = lively_model(dtype=torch.float32)
    save(model, None, folder)
    return folder, sum(p.numel() for p in model.parameters())


def command(model, target, pause=0.1):  # about the time between two pictures of the bar
    program = SLOWED.replace("PAUSE", str(pause))
    return [sys.executable, "-c", program, "convert", str(model), str(target), "--to", "meta", "--shards", "1"]


def in_a_terminal(words, **streams):
    """(what a terminal of 100 columns was sent, the rest of a pipe that is no terminal); stderr goes to it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    # Without colours what is left to do is drawn as spaces, so that the bar's length can be counted.
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(words, stdin=slave, stderr=slave, env=env, **({"stdout": slave} | streams))
    os.close(slave)
    sent = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux's way to say that the last process is gone
            break
        if not piece:
            break
        sent += piece
    os.close(master)
    out = process.stdout.read().decode() if process.stdout else ""
    assert process.wait() == 0, sent
    return sent.decode(), out


def drawn(sent):
    """Each picture of the bar: (characters of the bar, percent, bytes done, bytes in all)."""
    found = []
    for line in sent.split("\r"):
        line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
        numbers = re.search(r"(\d+)% *([\d.]+)/([\d.]+) (bytes|kB|MB)", line)
        if numbers:
            scale = {"bytes": 1, "kB": 1e3, "MB": 1e6}[numbers[4]]
            found.append((line.count("━"), int(numbers[1]), float(numbers[2]) * scale, float(numbers[3]) * scale))
    return found


def test_bar_percentages_and_bytes_advance_in_a_terminal(model, tmp_path):
    folder, parameters = model
    sent, _ = in_a_terminal(command(folder, tmp_path / "out"))
    pictures = [each for each in drawn(sent) if each[3]]
    bars, percents, done, total = zip(*pictures, strict=True)
    for values in (bars, percents, done):
        assert list(values) == sorted(values) and len(set(values)) >= 6, values
    assert set(total) == {total[0]} and total[0] == pytest.approx(4 * parameters, rel=0.1)
    assert (percents[-1], done[-1]) == (100, total[0]) and bars[0] < 5 < 35 < bars[-1]
    assert all(abs(percent - 100 * d / total[0]) < 2 for percent, d in zip(percents, done, strict=True))
    assert "B/s" in sent and re.search(r"0:00:0\d", sent)
    last = sent[sent.rindex("%") :]
    assert "\x1b[2K" in last and "\x1b[?25h" in sent, "the bar goes and the cursor comes back"
    assert f"out: {parameters:,} parameters" in last and (tmp_path / "out").is_dir()


def test_the_bar_is_on_stderr(model, tmp_path):
    """`puna convert … | tee log` in a terminal: the bar is seen, the log holds the result alone."""
    folder, parameters = model
    sent, out = in_a_terminal(command(folder, tmp_path / "out"), stdout=subprocess.PIPE)
    assert len({percent for _, percent, *_ in drawn(sent)}) >= 6
    assert out == f"{tmp_path / 'out'}: {parameters:,} parameters, without a tokenizer\n"


def test_elsewhere_there_is_none(model, tmp_path):
    folder, parameters = model
    done = subprocess.run(command(folder, tmp_path / "out", 0.02), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == f"{tmp_path / 'out'}: {parameters:,} parameters, without a tokenizer\n"
