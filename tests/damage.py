"""Ways to damage a checkpoint, and to make a change of it look as if it had been saved so."""

import json

from puna.convert.puna import write_run


def flip_byte(path, place, value=0xFF):
    """Changes one byte of a file; negative places count from its end."""
    data = bytearray(path.read_bytes())
    data[place] ^= value
    path.write_bytes(bytes(data))


def tensor_place(path, name):
    """Where a tensor's bytes begin in a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]


def reseal(folder, change=lambda run: None):
    """Writes run.json anew, as if the checkpoint had been saved as it is now (and `change` makes it)."""
    run = json.loads((folder / "run.json").read_text())
    run.pop("files", None), run.pop("sha256", None)
    change(run)
    write_run(folder, run)
