"""The model card says what files tell, of these very weights, and nothing else."""

import dataclasses
import hashlib
import json

import pytest
import yaml
from parity_helpers import SCOUT, TEXT_ONLY, strong_model

import puna
from puna.cli.main import main
from puna.convert import export_hf
from puna.convert.card import model_card
from puna.convert.puna import read_run, save
from puna.model.config import ModelConfig

HOSTILE = "<img src=x onerror=alert(1)> | [a](javascript:b)"


def record(config: ModelConfig, stage, init, weights, **more):
    data = {"seq_len": 128, "weights": weights, "then": [{"after": 0.5, "weights": more.pop("then", {})}]}
    train = {"rows": 4, "lr": 0.0015}
    return {"config": {"model": config.to_dict(), "stage": stage, "name": "herd", "init": init, "data": data,
                       "train": train}, "environment": {"torch": "2.13.0", "cpu": "A chip (AVX2)"}} | more  # fmt: skip


@pytest.fixture
def run(tmp_path, tiny_processor, monkeypatch):
    """A run of two stages, and the report of its last weights."""
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    model, folder = strong_model(config), tmp_path / "runs" / "herd"
    first = record(config, "pretrain", None, {"text/de": 1.0, "code": 0.0}, then={"captions": 1.0})
    own = f"file:{tmp_path}/secret/mine.jsonl"
    last = record(config, "sft", str(folder / "pretrain"), {"sft/facts": 0.5, own: 0.5})
    save(model, tiny_processor, folder / "pretrain" / "step-00000030", 30, **first)
    save(model, tiny_processor, folder / "sft" / "step-00000012", 12, **last)
    hashes = read_run(folder / "sft" / "step-00000012")["hashes"]
    joined = "\n".join(f"{name} {digest}" for name, digest in sorted(hashes.items()))
    row = {"name": "naming/en", "value": 0.345, "unit": "share", "n": 200, "stderr": 0.0336, "chance": 0.005}
    report = {"commit": "abc", "model": {"sha256": hashlib.sha256(joined.encode()).hexdigest()},
              "results": [row, row | {"name": "needle/2x", "value": None, "n": 0, "stderr": None}]}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    monkeypatch.chdir(tmp_path)
    return folder


def card(run):
    assert main(["convert", str(run), "out", "--to", "hf"]) == 0
    return (run.parents[1] / "out" / "README.md").read_text(encoding="utf-8")


def test_a_raised_model_tells_its_life_its_data_and_its_numbers(run):
    text = card(run)
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "language": ["de"],
                    "tags": ["llama4", "mixture-of-experts", "puna"]}  # fmt: skip
    model, _ = puna.load(run)
    count = model.parameter_count()
    assert "# herd" in text and f"{count.total:,} parameters, {count.active:,} of them active" in text
    rows = [line for line in text.splitlines() if line.startswith(("| pretrain", "| sft"))]
    assert rows[0] == "| pretrain | 30 | 4 | 128 | 0.0015 | captions, text/de |", "a source of weight 0 was not read"
    assert rows[1] == "| sft | 12 | 4 | 128 | 0.0015 | file:mine.jsonl, sft/facts |"
    assert "from new weights" in text and "torch 2.13.0 on A chip (AVX2)" in text
    assert "| Twemoji 15 graphics | Twitter, Inc and other contributors | CC-BY-4.0 |" in text  # captions
    assert "Country facts" in text and "Firefox" not in text and "Moby-Dick" not in text  # de has no Firefox texts here
    assert "Noto" not in text and "Declaration" not in text, "what is held out was not trained on"
    assert "| naming/en | 0.345 | share | 200 | 0.0336 | 0.005 |" in text
    assert "| needle/2x | not measured | share | 0 |  | 0.005 |" in text
    assert "vllm serve FOLDER --block-size 32" in text and "puna.load(FOLDER)" in text  # chunks of 32
    assert "mine.jsonl" in text and "secret" not in text and str(run.parents[1]) not in text, "a path left the machine"


def test_numbers_of_other_weights_are_not_these(run):
    report = json.loads((run / "report.json").read_text())
    report["model"]["sha256"] = "0" * 64
    (run / "report.json").write_text(json.dumps(report))
    text = card(run)
    assert "None recorded for these weights." in text and "0.345" not in text


def test_what_is_unknown_is_said_to_be(run, tmp_path):
    """From a folder of Hugging Face's, and from Python."""
    main(["convert", str(run), "one", "--to", "hf"])
    main(["convert", "one", "two", "--to", "hf"])
    second = (tmp_path / "two" / "README.md").read_text()
    assert "Not recorded" in second and "## Data" not in second and "## Evaluation" not in second
    config = TEXT_ONLY["scout"]
    text = (export_hf(strong_model(config), None, tmp_path / "three") / "README.md").read_text()
    assert "pipeline_tag: text-generation" in text and "Llama4ForCausalLM" in text and "pixel_values" not in text


def test_hostile_names_stay_text(tmp_path, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    values = record(config, HOSTILE, None, {f"file:/x/{HOSTILE}": 1.0})
    values["config"]["name"] = f"a\n---\n{HOSTILE}"
    folder = save(strong_model(config), tiny_processor, tmp_path / "sft" / "step-00000001", 1, **values)
    text = model_card(config, folder)
    assert "\\<img" in text and "<img" not in text.replace("\\<", "") and "[a]" not in text
    assert [line for line in text.splitlines() if line == "---"] == ["---", "---"]


def test_limits_follow_from_the_shape():
    """Meta's own numbers are at home everywhere; each departure is named."""
    plain = dataclasses.replace(TEXT_ONLY["scout"], nope_layers=None, n_layers=4, moe_layers=None, floor_scale=8192,
                                chunk=8192, max_context=16384)  # fmt: skip
    assert "built in" not in model_card(plain) and "vllm serve FOLDER\n" in model_card(plain)
    for change, named in (({"chunk": 4096}, "chunks of 4096"), ({"floor_scale": 64}, "temperature 64/0.1"),
                          ({"qk_norm": False}, "QK-norm"), ({"nope_layers": (0,)}, "NoPE layers"),
                          ({"head_dim": 16}, "no kernel for heads of 16")):  # fmt: skip
        assert named not in model_card(plain) and named in model_card(dataclasses.replace(plain, **change))
