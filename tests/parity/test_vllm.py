"""vLLM serves an export: the same prompts and the same greedy tokens as transformers and puna, text and pictures.

Opt-in, since vLLM pins its own transformers and is installed by a recipe (docs/serving.md):

    PUNA_VLLM_PYTHON=venv/bin/python pytest -m vllm tests/parity/test_vllm.py

PUNA_VLLM_MODEL=FOLDER adds a trained model, anything `puna.load` reads. All three compute in float32 on one thread, and
vLLM and transformers know nothing but the exported folder (serving-and-evaluation.md C.6).
"""

import base64
import dataclasses
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from parity_helpers import CHUNK, MAVERICK, SCOUT, TEXT_ONLY, strong_model
from PIL import Image

import puna
from puna.convert import export_hf

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("PUNA_VLLM_PYTHON")
TOKENS = 40  # of an answer: past a chunk's border
STUB = """\
import torch

library = torch.library.Library("torchvision", "DEF")  # beside torch's CPU build torchvision lacks its own operators
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
SHAPES = {  # vLLM's CPU build has no kernel for heads of 16
    "scout": SCOUT, "maverick": dataclasses.replace(MAVERICK, head_dim=32), "text": TEXT_ONLY["scout"],
    "untuned": dataclasses.replace(SCOUT, temperature_tuning=False),
}  # fmt: skip


def picture(*colours, side):
    """Stripes of colours; twice a tile's side is four tiles and one of the whole. vLLM's CPU build (0.32) can't read
    pictures of a single tile: oneDNN refuses the strides of its patch embedding and the engine dies."""
    image = Image.new("RGB", (side, side))
    for i, colour in enumerate(colours):
        image.paste(colour, (0, i * side // len(colours), side, (i + 1) * side // len(colours)))
    return image


def conversations(vision):
    """Messages as puna takes them."""
    long = "the quick brown fox jumps over the lazy dog and " * 12
    found = [
        [{"role": "user", "content": "What is 2 + 3?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": long}],
    ]
    if vision is not None:
        side = 2 * vision.image_size
        flag, other = picture("red", "white", side=side), picture("blue", "green", side=side * 3 // 2)
        ask = [{"type": "image", "image": flag}, {"type": "text", "text": "What is this?"}]
        more = [{"type": "text", "text": "Compare"}, {"type": "image", "image": other}]
        found += [
            [{"role": "user", "content": ask}],
            [{"role": "user", "content": ask}, {"role": "assistant", "content": "flag"},
             {"role": "user", "content": [*more, {"type": "image", "image": picture("black", side=side)}]}],
        ]  # fmt: skip
    return found


def as_openai(messages):
    """The same with pictures as data URIs."""

    def part(each):
        if each["type"] == "text":
            return each
        out = io.BytesIO()
        each["image"].save(out, "PNG")
        return {"type": "image_url",
                "image_url": {"url": "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()}}  # fmt: skip

    return [m if isinstance(m["content"], str) else m | {"content": [part(p) for p in m["content"]]} for m in messages]


def served(folder, messages, work):
    """What vllm_answers.py found in a process of vLLM's own environment."""
    if not PYTHON:
        pytest.skip("PUNA_VLLM_PYTHON names no Python with vLLM")
    (work / "site").mkdir()
    (work / "site" / "sitecustomize.py").write_text(STUB)
    (work / "ask.json").write_text(json.dumps([as_openai(m) for m in messages]))
    command = [PYTHON, str(Path(__file__).parent / "vllm_answers.py"), folder, "ask.json", "answers.json", str(TOKENS)]
    done = subprocess.run([str(word) for word in command], cwd=work, capture_output=True, text=True, timeout=900,
                          env={**os.environ, "PYTHONPATH": str(work / "site")})  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads((work / "answers.json").read_text())
    print(found["versions"], [len(answer) for answer in found["vllm"]])
    return found


def greedy(model, encoded, tiles, stop):
    """The literal answer: the whole sequence again for every token."""
    tokens, answer = torch.from_numpy(encoded.tokens).long()[None], []
    with torch.no_grad():
        while len(answer) < TOKENS and not (answer and answer[-1] in stop):
            answer.append(int(model(tokens, tiles)[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([answer[-1:]])], dim=1)
    return answer


def check(model, processor, folder, work):
    messages = conversations(model.config.vision)
    found = served(folder, messages, work)
    assert found["vllm"] == found["transformers"] and found["prompts"] == found["prompts_transformers"]
    lengths = []
    for i, each in enumerate(messages):
        encoded = processor.encode_chat(each, generation_prompt=True)
        assert encoded.tokens.tolist() == found["prompts"][i]
        ours = greedy(model, encoded, processor.tiles(encoded.pictures), processor.tokenizer.stop_ids)
        assert ours == found["vllm"][i], i
        lengths.append(len(encoded) + len(ours))
    assert len({tuple(answer) for answer in found["vllm"]}) == len(messages), "the prompt makes no difference"
    return found, lengths


@pytest.mark.parametrize("name", SHAPES)
def test_vllm_transformers_and_puna_answer_alike(tmp_path, tiny_processor, name):
    tokenizer = tiny_processor.tokenizer
    patch = None if SHAPES[name].vision is None else tokenizer.patch
    model = strong_model(dataclasses.replace(SHAPES[name], vocab_size=tokenizer.vocab_size, patch_token=patch), seed=3)
    with torch.no_grad():
        model.output.weight[tokenizer.patch] = 0.0  # random weights might say it, and a picture's token is no answer
    folder = export_hf(model, tiny_processor, tmp_path / "hf")
    _, lengths = check(model, tiny_processor, folder, tmp_path)
    assert max(lengths) > 2 * CHUNK + TOKENS


def test_the_temperature_key_is_what_makes_it_so(tmp_path, tiny_processor):
    """Without it in generation_config.json vLLM answers otherwise: the comparison can fail, and the trap is real."""
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    folder = export_hf(strong_model(config, seed=3), tiny_processor, tmp_path / "hf")
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    assert values.pop("attn_temperature_tuning") is True
    path.write_text(json.dumps(values))
    found = served(folder, conversations(config.vision), tmp_path)
    assert found["prompts"] == found["prompts_transformers"] and found["vllm"] != found["transformers"]


@pytest.mark.skipif("PUNA_VLLM_MODEL" not in os.environ, reason="PUNA_VLLM_MODEL names no trained model")
def test_a_trained_model_answers_alike(tmp_path):
    model, processor = puna.load(os.environ["PUNA_VLLM_MODEL"], dtype=torch.float32)
    folder = export_hf(model, processor, tmp_path / "hf")
    found, _ = check(model, processor, folder, tmp_path)
    for answer in found["vllm"]:
        print(processor.tokenizer.decode(answer))
