"""benchmarks/gpu.py from end to end at tiny sizes on the CPU: every part, resumed, without what bare machines lack."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
# A bare machine: torch, numpy, safetensors. Whatever else puna could want is not there.
ABSENT = ("PIL", "tokenizers", "pyarrow", "jinja2", "rich", "matplotlib", "fastapi", "uvicorn", "tyro", "transformers")
BARE = f"import sys, runpy; sys.modules.update(dict.fromkeys({ABSENT})); sys.argv = sys.argv[1:]; " \
       "runpy.run_path(sys.argv[0], run_name='__main__')"  # fmt: skip


def run(*arguments):
    command = [sys.executable, "-c", BARE, str(SCRIPT), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    done = run("--device", "cpu", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_every_part_makes_its_rows(result):
    _, values, printed = result
    assert {"commit", "versions", "device", "config", "seconds", "results"} == set(values)
    rows = {row["name"]: row for row in values["results"]}
    assert set(rows) == {
        "correctness/scout", "correctness/maverick", "correctness/fp8/rowwise", "correctness/fp8/tensorwise",
        "correctness/decode", "train_bf16/mfu", "train_bf16/loss", "train_fp8/speed/rowwise",
        "train_fp8/speed/tensorwise", "train_fp8/loss/rowwise", "train_fp8/loss/tensorwise", "layers/behemoth/off",
        "layers/behemoth/rowwise", "layers/behemoth/tensorwise", "memory/step", "decode/1", "decode/2",
    }  # fmt: skip
    judged = [row["name"] for row in values["results"] if row["met"] is not None]
    assert judged == [name for name in rows if name.startswith("correctness/")], "a CPU's speed is held to no goal"
    assert all(row["met"] for row in values["results"] if row["met"] is not None)
    assert printed.splitlines()[-1] == "5 of 5 goals met"
    for name in ("train_bf16/mfu", "layers/behemoth/off", "decode/1"):
        assert rows[name]["value"] > 0 and rows[name]["n"] == 3
    curve = rows["train_bf16/loss"]
    assert curve["losses"][-1] < curve["losses"][0] and curve["max_load"] >= 1 and not curve["skipped"]
    for recipe in ("rowwise", "tensorwise"):  # FP8 starts from the same weights and data, and goes another way
        other = rows[f"train_fp8/loss/{recipe}"]
        assert other["losses"][0] == pytest.approx(curve["losses"][0], abs=0.01) and other["losses"] != curve["losses"]
        assert abs(other["value"]) < 0.05


def test_the_same_command_makes_the_missing_rows_only(script, result, tmp_path):
    out, values, _ = result
    values["commit"] = script.commit()  # whoever edits while tests run
    values["results"] = [row for row in values["results"] if row["name"] != "correctness/fp8/rowwise"]
    again = tmp_path / "again.json"
    again.write_text(json.dumps(values), encoding="utf-8")
    done = run("--device", "cpu", "--quick", "--only", "correctness", "layers", "--out", again)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()[:-1]] == [
        "correctness/fp8/rowwise"
    ]
    names = {row["name"] for row in json.loads(again.read_text(encoding="utf-8"))["results"]}
    assert names == {row["name"] for row in json.loads(out.read_text(encoding="utf-8"))["results"]}
    other = run("--device", "cpu", "--only", "correctness", "--out", again)  # not --quick
    assert other.returncode == 1 and "holds results of another config" in other.stderr


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--out", tmp_path / "x.json")
    assert done.returncode == 1 and "--device cpu --quick" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_sizes_for_a_gpu(script):
    for name in ("small_scout", "small_maverick"):
        scale = script.scale_of(name, "cuda", False)
        assert scale.seq_len >= 2 * scale.config.chunk >= 2048 and scale.config.head_dim == 128 and scale.steps >= 500
        assert script.scale_of(name, "cuda", True).steps < 500
    layer = scale.layer
    assert (layer.d_model, layer.expert_width, layer.n_heads) == (16384, 24064, 128)
    with torch.device("meta"):  # weights and gradients in bfloat16, with room for activations on 80 GB
        assert 4 * sum(p.numel() for p in script.Llama4(layer).parameters()) < 25e9


def test_micro_batches_that_fit_and_the_fastest_of_them(script, monkeypatch):
    scale = script.scale_of("small_scout", "cpu", True)
    machine, taken = script.Machine("cpu"), []
    monkeypatch.setattr(script, "text_tokens", lambda: torch.zeros(1000, dtype=torch.int64))

    def step(self):
        taken.append((self.rows, self.model.recompute))
        if self.rows > 1 and self.model.recompute != 1:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(script.Training, "step", step)
    monkeypatch.setattr(machine, "seconds", lambda f: (f(), {(1, 0): 3.0, (1, 2): 4.0, (2, 1): 2.0}[taken[-1]])[1])
    training = script.Training(scale, machine)
    assert training.shape() == {"rows": 2, "recompute": 1} and training.done == 0
    monkeypatch.setattr(script.Training, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(SystemExit, match="not even one row of 128 tokens fits"):
        script.Training(scale, machine)
