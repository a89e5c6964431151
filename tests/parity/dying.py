"""A conversion that kills its own process, for the tests of going on."""

import os
import signal
from concurrent.futures import Future
from pathlib import Path

from puna.convert import folder
from puna.convert.huggingface import HuggingFaceFormat
from puna.convert.load import identity, open_model
from puna.convert.meta import MetaFormat
from puna.convert.puna import CheckpointFormat
from puna.testing.distributed import forks

FORMS = {"meta": MetaFormat(None, 2), "hf": HuggingFaceFormat(None), "puna": CheckpointFormat(None)}


class AtOnce:
    """The journal after every parameter, not beside the next ones."""

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        done = Future()
        done.set_result(function(*args))
        return done


def write(source: Path, target: Path, form: str, die: int, moved: Path) -> None:
    folder.FLUSH_BYTES, folder.ThreadPoolExecutor = 1, AtOnce
    whole, left = folder.move, [die]

    def move(*args):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        whole(*args)

    folder.move = move
    store, _ = open_model(source)
    folder.write_folder(store, FORMS[form], target, None, identity(store))
    moved.write_text(str(die - left[0]))


def convert(source: Path, target: Path, form: str, die: int) -> int | None:
    """A conversion in a process of its own, killed before parameter `die`: how many it moved; None where it died so."""
    moved = target.with_name("moved")
    moved.unlink(missing_ok=True)
    process = forks(("puna.convert.folder", "puna.convert.meta")).Process(
        target=write, args=(source, target, form, die, moved))  # fmt: skip
    process.start()
    process.join()
    assert process.exitcode == (0 if moved.exists() else -signal.SIGKILL)
    return int(moved.read_text()) if moved.exists() else None
