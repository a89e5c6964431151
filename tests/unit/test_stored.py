"""Tensors as byte ranges of files, against the libraries that own the formats; and headers that are not true."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from puna.convert.stored import plan_pth, plan_safetensors, read_pth, read_safetensors
from puna.errors import PunaError

SHAPES = {
    "matrix": (torch.bfloat16, (5, 7)), "single": (torch.float32, (1,)), "none": (torch.float32, (0, 3)),
    "experts": (torch.float8_e4m3fn, (4, 2, 3)), "wide": (torch.float64, (3,)), "scalar": (torch.float32, ()),
}  # fmt: skip


def random_values():
    torch.manual_seed(3)
    return {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in SHAPES.items()}


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_files_laid_out_and_filled_in_rows_are_what_the_library_reads(tmp_path, form):
    path, values = tmp_path / f"x.{form}", random_values()
    table = plan_safetensors(path, SHAPES) if form == "safetensors" else plan_pth(path, SHAPES)
    size = path.stat().st_size
    for name, stored in table.items():
        for row in reversed(range(max(1, len(values[name]) if values[name].ndim else 1))):
            if values[name].numel():
                stored.write(row, values[name][row : row + 1] if values[name].ndim else values[name].view(1))
    read = load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
    assert path.stat().st_size == size and read.keys() == SHAPES.keys()
    for name, value in values.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name].float(), value.float()), name
        assert torch.equal(table[name].read().float(), value.float())
    assert torch.equal(table["matrix"].read(1, 4), values["matrix"][1:4])
    if form == "safetensors":
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


BLOCKS = [(slice(1, 3), slice(0, 2), slice(0, 3)), (slice(0, 4), slice(1, 2), slice(0, 3)),
          (slice(1, 4), slice(0, 2), slice(1, 2)), (slice(0, 4), slice(0, 2), slice(0, 3)),
          (slice(2, 2), slice(0, 2), slice(0, 3))]  # fmt: skip


@pytest.mark.parametrize("where", BLOCKS, ids=range(len(BLOCKS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_read_and_written_and_nothing_beside_it(tmp_path, where, dtype):
    table = plan_safetensors(tmp_path / "x.safetensors", {n: (dtype, (4, 2, 3)) for n in "abc"})
    whole = torch.arange(24.0).view(4, 2, 3).to(dtype) - 30
    for stored in table.values():
        stored.write(0, whole)
    expected = whole.clone()
    expected[where] *= 7
    table["b"].write_block(where, whole[where] * 7)
    read = load_file(tmp_path / "x.safetensors")
    assert torch.equal(read["b"], expected) and torch.equal(read["a"], whole) and torch.equal(read["c"], whole)
    assert torch.equal(table["b"].read_block(where), expected[where])


def test_the_block_of_a_number_without_dimensions(tmp_path):
    table = plan_safetensors(tmp_path / "x.safetensors", {n: (torch.float32, ()) for n in "ab"})
    table["b"].write_block((), torch.tensor(3.0))
    assert table["b"].read_block(()) == 3 and table["a"].read_block(()) == 0


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_files_of_the_library_are_read(tmp_path, form):
    path, values = tmp_path / f"x.{form}", random_values()
    if form == "pth":  # views of one storage lie at their own places
        base = torch.arange(12.0).view(4, 3)
        values |= {"view": base[1:], "base": base}
        torch.save(values | {"step": 3}, path)
        table = read_pth(path)
    else:
        save_file(values, path)
        table = read_safetensors(path)
    assert table.keys() == values.keys()
    assert all(torch.equal(stored.read().float(), values[name].float()) for name, stored in table.items())


def lie(header):
    """A file of two tensors whose header says something else."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(40)


GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]}}  # fmt: skip
LIES = {
    "a is said to be \\[2, 4\\] F32 but has 24 bytes": {"a": GOOD["a"] | {"shape": [2, 4]}},
    "a is said to be \\[2, 3\\] F64": {"a": GOOD["a"] | {"dtype": "F64"}},
    "b ends after the file": {"b": {"dtype": "F32", "shape": [8], "data_offsets": [24, 56]}},
    "b does not begin where a ends": {"b": GOOD["b"] | {"data_offsets": [20, 36]}},
    "a is stored as Q4, a type": {"a": GOOD["a"] | {"dtype": "Q4"}},
    "a lacks dtype, shape or data_offsets": {"a": {"dtype": "F32"}},
    "tensor b lacks": {"b": GOOD["b"] | {"shape": [-4]}},
    "24 bytes of no tensor": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "b": None},
}


@pytest.mark.parametrize("match", LIES)
def test_a_lying_header_is_an_error_that_names_the_tensor(tmp_path, match):
    path = tmp_path / "x.safetensors"
    path.write_bytes(lie(GOOD))
    assert read_safetensors(path).keys() == {"a", "b"}
    header = {name: entry for name, entry in (GOOD | LIES[match]).items() if entry is not None}
    path.write_bytes(lie(header))
    with pytest.raises(PunaError, match=match) as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"1234", (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", bytes(8) + b"{}"]
)
def test_what_is_no_safetensors_file(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(PunaError, match="x.safetensors is corrupt"):
        read_safetensors(path)


def test_a_pickle_that_runs_code_is_not_read(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("run!",)

    torch.save({"a": torch.ones(2), "b": Code()}, tmp_path / "x.pth")
    with pytest.raises(PunaError, match="holds more than tensors"):
        read_pth(tmp_path / "x.pth")
