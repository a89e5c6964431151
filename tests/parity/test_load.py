"""`puna.load`: every kind of folder, the hashes of a checkpoint, and what happens when something is damaged."""

import dataclasses
import json
import os
import warnings

import pytest
import torch
from damage import flip_byte, reseal, tensor_place
from parity_helpers import SCOUT, TEXT_ONLY, strong_model, text, with_pictures
from safetensors.torch import load_file, save_file

import puna
from puna.convert import export_hf
from puna.convert.puna import save, tensor_hash
from puna.errors import PunaError


def values(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a, b):
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def flip_a_bit(folder, name="layers.1.moe.experts.w2"):
    """Changes one bit of one tensor, leaving file and header whole."""
    path = folder / "model.safetensors"
    flip_byte(path, tensor_place(path, name) + 20, 1)


@pytest.fixture
def run(tmp_path):
    """runs/NAME with a finished pretrain (2 checkpoints), a finished midtrain (2) and an unfinished sft (1); the models
    by folder."""
    models = {}
    for seed, (stage, step, finished) in enumerate(
        [
            ("pretrain", 50, False),
            ("pretrain", 100, True),
            ("midtrain", 8, False),
            ("midtrain", 16, True),
            ("sft", 4, False),
        ]
    ):
        model = strong_model(TEXT_ONLY["scout"], seed=seed)
        folder = f"{stage}/step-{step:08d}"
        save(model, None, tmp_path / "run" / folder, step=step, finished=finished)
        models[folder] = model
    return tmp_path / "run", models


def test_checkpoint_round_trip(tmp_path, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    model = strong_model(config)
    folder = save(model, tiny_processor, tmp_path / "step-00000007", step=7)
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.safetensors",
        "processor.json",
        "run.json",
        "tokenizer.json",
    ]
    record = json.loads((folder / "run.json").read_text())
    assert record["format"] == 1 and record["step"] == 7 and record["finished"] is True
    assert record["hashes"] == {name: tensor_hash(p) for name, p in model.named_parameters()}
    again, processor = puna.load(folder)
    assert again.config == config and same(again, model) and not again.training
    assert processor.image == tiny_processor.image and processor.tokenizer.encode("abc 12") == tokenizer.encode(
        "abc 12"
    )
    tokens, tiles = with_pictures(config, 50)
    assert torch.equal(again(tokens, tiles), model(tokens, tiles))
    half, _ = puna.load(str(folder), dtype=torch.bfloat16, device="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16
    with pytest.raises(PunaError, match="exists"):
        save(model, None, folder)


def test_hash_is_of_the_bytes():
    """Stable across runs and layouts: a constant computed by hand, a transposed copy, another dtype."""
    import hashlib

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = hashlib.sha256(bytes.fromhex("0000803f000000400000404000008040")).hexdigest()
    assert tensor_hash(x) == expected == tensor_hash(x.T.contiguous().T)
    assert tensor_hash(x.T) != expected != tensor_hash(x.bfloat16())
    assert tensor_hash(torch.tensor(1.0)) == hashlib.sha256(bytes.fromhex("0000803f")).hexdigest()


def test_bfloat16_checkpoint(tmp_path):
    model = strong_model(TEXT_ONLY["maverick"]).bfloat16()
    folder = save(model, None, tmp_path / "c")
    assert same(puna.load(folder)[0], model)
    hashes = {name: tensor_hash(parameter) for name, parameter in model.named_parameters()}
    assert hashes == json.loads((folder / "run.json").read_text())["hashes"]


def test_stage_run_and_checkpoint(run):
    folder, models = run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(puna.load(folder)[0], models["midtrain/step-00000016"])  # sft is not finished
        assert same(puna.load(folder / "sft")[0], models["sft/step-00000004"])
        assert same(puna.load(folder / "pretrain")[0], models["pretrain/step-00000100"])
        assert same(puna.load(folder / "pretrain" / "step-00000050")[0], models["pretrain/step-00000050"])


def test_a_finished_sft_goes_first(run):
    folder, models = run
    model = strong_model(TEXT_ONLY["scout"], seed=9)
    save(model, None, folder / "sft" / "step-00000012", step=12)
    assert same(puna.load(folder)[0], model)


def test_steps_are_numbers(tmp_path):
    """step-1000 is newer than step-999, whatever the zeros."""
    for seed, name in enumerate(("step-999", "step-1000")):
        save(strong_model(TEXT_ONLY["scout"], seed=seed), None, tmp_path / "stage" / name)
    (tmp_path / "stage" / "step-2000.tmp").mkdir()  # an interrupted save under its temporary name
    assert same(puna.load(tmp_path / "stage")[0], strong_model(TEXT_ONLY["scout"], seed=1))


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(run):
    folder, models = run
    flip_a_bit(folder / "midtrain" / "step-00000016")
    for path in (folder, folder / "midtrain"):
        with pytest.warns(UserWarning, match="layers.1.moe.experts.w2 does not match its hash"):
            assert same(puna.load(path)[0], models["midtrain/step-00000008"])
    with pytest.raises(PunaError, match="layers.1.moe.experts.w2 does not match its hash"):
        puna.load(folder / "midtrain" / "step-00000016")


@pytest.mark.filterwarnings("ignore")
def test_every_damage_is_found(run):
    """Truncated, emptied, missing and foreign files; each named checkpoint is an error of one line, the stage goes
    on."""
    folder, models = run
    newest = folder / "pretrain" / "step-00000100"
    good = {p.name: p.read_bytes() for p in newest.iterdir()}

    def edit_run(change):
        reseal(newest, change)

    def drop_tensor():
        tensors = load_file(newest / "model.safetensors")
        del tensors["norm.weight"]
        save_file(tensors, newest / "model.safetensors")

    def bend_tensor():
        tensors = load_file(newest / "model.safetensors")
        tensors["norm.weight"] = tensors["norm.weight"][1:].clone()
        save_file(tensors, newest / "model.safetensors")

    damages = [
        (lambda: (newest / "model.safetensors").write_bytes(good["model.safetensors"][:-100]), "truncated"),
        (lambda: (newest / "model.safetensors").write_bytes(b""), "truncated"),
        (lambda: (newest / "model.safetensors").unlink(), "model.safetensors"),
        (lambda: (newest / "run.json").write_bytes(good["run.json"][:40]), "run.json"),
        (lambda: edit_run(lambda r: r.pop("hashes")), "hashes"),
        (lambda: edit_run(lambda r: r["hashes"].pop("norm.weight")), "norm.weight"),
        (lambda: edit_run(lambda r: r["config"]["model"].pop("d_model")), "d_model"),
        (drop_tensor, "lacks tensor norm.weight"),
        (bend_tensor, "norm.weight has shape"),
    ]
    for damage, match in damages:
        damage()
        with pytest.raises(PunaError, match=match) as caught:
            puna.load(newest)
        assert "\n" not in str(caught.value)
        assert same(puna.load(folder / "pretrain")[0], models["pretrain/step-00000050"]), match
        for name, data in good.items():
            (newest / name).write_bytes(data)
    assert same(puna.load(folder / "pretrain")[0], models["pretrain/step-00000100"])


@pytest.mark.filterwarnings("ignore")
def test_all_checkpoints_damaged(run):
    folder, _ = run
    for checkpoint in (folder / "pretrain").iterdir():
        flip_a_bit(checkpoint, "norm.weight")
    with pytest.raises(PunaError, match="all checkpoints of .*pretrain are damaged.*norm.weight"):
        puna.load(folder / "pretrain")


def test_a_newer_format_is_no_damage(run):
    """A checkpoint of a newer puna must not be passed over for an older one silently."""
    folder, _ = run
    path = folder / "pretrain" / "step-00000100" / "run.json"
    reseal(path.parent, lambda record: record.update(format=2))
    for place in (path.parent, folder / "pretrain"):
        with pytest.raises(PunaError, match="newer puna"):
            puna.load(place)


def test_what_is_no_model(tmp_path, run):
    def fails(path, match):
        with pytest.raises(PunaError, match=match) as caught:
            puna.load(path)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "nowhere", "no model at")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no model")
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", "is a file")
    for name, match in (("params.json", "consolidated.00.pth"), ("consolidated.00.pth", "params.json is missing")):
        meta = tmp_path / f"meta-{name}"
        meta.mkdir()
        (meta / name).write_text("{}")
        fails(meta, match)
    folder, _ = run
    for stage in ("pretrain", "midtrain"):
        (folder / stage).rename(tmp_path / stage)
    fails(folder, "no stage .* finished")
    (folder / "sft" / "step-00000004" / "run.json").unlink()
    (folder / "sft" / "step-00000004").rename(tmp_path / "bare")
    fails(tmp_path / "bare", "neither run.json")


def test_hugging_face_folder_is_recognised(tmp_path):
    model = strong_model(TEXT_ONLY["scout"])
    folder = export_hf(model, None, tmp_path / "hf")
    tokens = text(model.config, 12)
    assert torch.equal(puna.load(folder)[0](tokens), model(tokens))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    model = strong_model(TEXT_ONLY["scout"])
    for write in (lambda: export_hf(model, None, tmp_path / "hf"), lambda: save(model, None, tmp_path / "puna")):
        with pytest.raises(PunaError, match="No space left"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_loading_allocates_one_model(tmp_path):
    """Streaming: a load's peak is the model and about one tensor, not two models (both layouts)."""
    import subprocess
    import sys

    shape = dict(n_layers=24, moe_layers=None, nope_layers=None, d_model=128, n_experts=16, expert_width=256)
    config = dataclasses.replace(TEXT_ONLY["scout"], **shape)
    model = strong_model(config)
    size = sum(p.numel() * 4 for p in model.parameters())
    largest = max(p.numel() * 4 for p in model.parameters())
    assert size > 10 * largest and size > 100e6
    for folder in (
        export_hf(model, None, tmp_path / "hf", shard_bytes=20_000_000),
        save(model, None, tmp_path / "puna"),
    ):
        code = f"""
import threading, time, torch, puna.convert
torch.set_num_threads(1)
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
puna.convert.load({str(folder)!r}, device="meta")  # torch imports 40 MB for the meta device
before, peak, stop = anonymous(), [0], [False]
def watch():
    while not stop[0]:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
t = threading.Thread(target=watch); t.start()
model, _ = puna.convert.load({str(folder)!r})
stop[0] = True; t.join()
print(max(peak[0], anonymous()) - before)
"""
        grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        assert grown < size + 4 * largest + 10e6, (folder.name, grown / size)
