"""`puna sft` as a user types it, on somebody's folder and their own chats with pictures: what comes out is what
transformers loads, with equal logits."""

import dataclasses
import json
import warnings

import pytest
import torch
from parity_helpers import CHANGED, CHUNK, SCOUT, assert_same, distance, strong_model, with_pictures
from PIL import Image
from test_meta import as_meta
from test_transformers import from_transformers, hf_logits

import puna
from puna.cli.main import main
from puna.convert import export_hf
from puna.convert.puna import save
from puna.train.metrics import read

transformers = pytest.importorskip("transformers")
SETTINGS = ("--train.steps", "6", "--train.rows", "4", "--train.lr", "1e-3", "--train.warmup", "1", "--train.threads",
            "1", "--data.seq_len", str(4 * CHUNK), "--train.compute_dtype", "float32", "--train.heap_mb", "0",
            "--train.accumulate", "1")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_processor):
    """(a model, a folder with it as hf, meta and puna, and chats.jsonl of both shapes with pictures)."""
    folder, tokenizer = tmp_path_factory.mktemp("finetune"), tiny_processor.tokenizer
    shape = dataclasses.replace(as_meta(SCOUT), vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    model = strong_model(shape)
    export_hf(model, tiny_processor, folder / "hf")
    save(model, tiny_processor, folder / "puna")
    assert main(["convert", str(folder / "puna"), str(folder / "meta"), "--to", "meta", "--shards", "2"]) == 0
    Image.new("RGB", (30, 14), "red").save(folder / "red.png")
    see = {"type": "image_url", "image_url": {"url": "red.png"}}
    rows = [{"messages": [{"role": "user", "content": [see, {"type": "text", "text": f"What? {i}"}]},
                          {"role": "assistant", "content": "A red thing."}]} for i in range(20)]  # fmt: skip
    rows += [{"conversations": [{"from": "human", "value": f"<image>Name it, {i}."}, {"from": "gpt", "value": "Red."}],
              "images": ["red.png"]} for i in range(20)]  # fmt: skip
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return model, folder


def command(monkeypatch, folder, *words):
    """Runs a command in `folder`, without the evaluation of 12 languages."""
    from puna.stages import common

    monkeypatch.chdir(folder)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(common, "bpb_evaluation", lambda *_, **__: lambda model: {"bpb/en": 3.0})
    return main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["hf", "meta", "puna"])
def test_sft_from_any_folder_is_what_transformers_loads(base, monkeypatch, kind):
    model, folder = base
    name = f"from-{kind}"
    words = ("sft", "--init", kind, "--data", "chats.jsonl", "--name", name, *SETTINGS)
    assert command(monkeypatch, folder, *words) == 0
    lines = [line for line in read(folder / "runs" / name / "sft" / "metrics.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] and all(line["tiles"] for line in lines)
    assert command(monkeypatch, folder, "convert", f"runs/{name}", f"{name}-hf", "--to", "hf") == 0
    tuned, _ = puna.load(folder / "runs" / name)
    assert tuned.config == puna.load(folder / kind)[0].config
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    with torch.no_grad():
        logits = tuned(tokens, tiles)
    assert_same(logits, hf_logits(from_transformers(folder / f"{name}-hf"), tokens, tiles))
    assert distance(logits, model(tokens, tiles)) > CHANGED


def test_the_same_training_from_the_same_weights(base, monkeypatch):
    """Whatever folder they came in."""
    model, folder = base
    tuned = [puna.load(folder / "runs" / f"from-{kind}")[0].state_dict() for kind in ("hf", "meta", "puna")]
    for other in tuned[1:]:
        assert all(torch.equal(tuned[0][name], value) for name, value in other.items())


def test_a_bad_row_ends_it_before_a_model_is_read(base, monkeypatch, capsys):
    _, folder = base
    good = (folder / "chats.jsonl").read_text()
    (folder / "bad.jsonl").write_text(good + '\n{"messages": [{"role": "user", "content": "hm"}]}')

    def loaded(*_, **__):
        raise AssertionError("a model was read")

    monkeypatch.setattr("puna.stages.common.start_model", loaded)
    words = ("sft", "--init", "hf", "--data", "bad.jsonl", "--name", "bad", *SETTINGS)
    assert command(monkeypatch, folder, *words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "bad.jsonl, line 41: the last message must be the assistant's" in error
    assert not (folder / "runs" / "bad" / "sft").exists()
