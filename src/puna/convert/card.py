"""The model card of an export, README.md: what a stranger needs to judge and to load the folder, and nothing invented.

Everything said comes from a file: the shape from the configuration, the training from run.json of the checkpoint and of
those it started from (`init`), the data's licences from the nursery's manifest, the numbers from the run's report.json,
and those only if the report is of these very weights (SHA-256 over the tensors' hashes). What no file tells is left
out or said to be unknown; paths of the machine stay at home.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from puna import nursery
from puna.convert.puna import RUN_FILE, STEP, read_run
from puna.convert.tensors import read_json
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vLLM's CPU kernels
SEEN = ("captions", "scenes", "sft/naming", "sft/grounding")  # sources that show pictures of the nursery


def model_card(config: ModelConfig, checkpoint: Path | None = None) -> str:
    """The text of README.md. checkpoint: the folder of ours that the weights come from, None: not known."""
    stages, multimodal = list(_life(checkpoint)) if checkpoint else [], config.vision is not None
    name = _line(stages[0]["config"].get("name", "")) if stages else ""
    sources = sorted({source for run in stages for source in _weights(run)})
    languages = sorted({lang for s in sources for kind, _, lang in [s.partition("/")] if lang in nursery.LANGUAGES})
    kind = "image-text-to-text" if multimodal else "text-generation"
    head = ["library_name: transformers", f"pipeline_tag: {kind}", "tags: [llama4, mixture-of-experts, puna]"]
    head += [f"language: [{', '.join(languages)}]"] if languages else []
    parts = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {name or 'A Llama 4 model'}",
        _shape(config),
        "## Use\n\n" + _use(config, multimodal),
        "## Limits of other software\n\n" + "\n".join(f"* {each}" for each in _limits(config)),
        "## Training\n\n" + (_training(stages) if stages else "Not recorded: the source of this export holds no run of "
                             "puna's. What is known of the original weights, their licence included, is with them."),
    ]  # fmt: skip
    if sources:
        parts.append("## Data\n\n" + _data(sources))
    if stages:
        parts.append("## Evaluation\n\n" + _evaluation(checkpoint, stages[0]))
    return "\n\n".join(parts) + "\n"


def _line(text: Any) -> str:
    """One line of Markdown that stays text: no table cell, no link, no HTML comes of it."""
    return re.sub(r"([\\|<>\[\]`*_#])", r"\\\1", " ".join(str(text).split()))


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_line, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- the model ------------------------------------------------------------------------------------------------------


def _shape(config: ModelConfig) -> str:
    with torch.device("meta"):
        count = Llama4(config).parameter_count()
    eye = config.vision
    sees = f", and a vision tower of {eye.layers} layers on tiles of {eye.image_size} pixels" if eye else ""
    return (
        f"A Llama-4-architecture model of {count.total:,} parameters, {count.active:,} of them active per token: "
        f"{config.n_layers} layers of width {config.d_model}, {len(config.moe_layers)} of them with {config.n_experts} "
        f"routed experts (one a token) and a shared one{sees}. Vocabulary {config.vocab_size:,}, context "
        f"{config.max_context:,} tokens; layers see chunks of {config.chunk:,} tokens, "
        f"{sum(config.is_nope(i) for i in range(config.n_layers))} of them (NoPE) everything."
    )


def _use(config: ModelConfig, multimodal: bool) -> str:
    auto = "Llama4ForConditionalGeneration" if multimodal else "Llama4ForCausalLM"
    reader = "AutoProcessor" if multimodal else "AutoTokenizer"
    content = '[{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]'
    code = f"""from transformers import {auto}, {reader}

model = {auto}.from_pretrained(FOLDER)
processor = {reader}.from_pretrained(FOLDER)
messages = [{{"role": "user", "content": {content if multimodal else '"Hello"'}}}]
inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
"""
    code += 'inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)\n' if multimodal else ""
    code += "print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    block = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if config.chunk % size == 0)
    flags = "" if block == 128 else f" --block-size {block}"
    return (
        f"With transformers (5.0 or later):\n\n```python\n{code}\n```\n\nWith vLLM:\n\n```console\n$ vllm serve FOLDER"
        f"{flags}\n```\n\nWith puna:\n\n```console\n$ puna serve FOLDER\n```\n\n```python\nimport puna\n\n"
        "model, processor = puna.load(FOLDER)\n```\n\nA chat template renders text that looks like control tokens *as* "
        "control tokens, in any software; puna's own server encodes what people write apart from the structure."
    )


def _limits(config: ModelConfig) -> Iterator[str]:
    """Where other programs would compute something else (serving-and-evaluation.md C.5)."""
    odd = []
    if any(config.is_nope(i) != ((i + 1) % 4 == 0) for i in range(config.n_layers)):
        odd.append("NoPE layers that are not every fourth")
    if (config.floor_scale, config.attn_scale) != (8192, 0.1):
        odd.append(f"attention temperature {config.floor_scale}/{config.attn_scale} instead of 8192/0.1")
    if config.chunk != 8192:
        odd.append(f"chunks of {config.chunk} instead of 8192")
    if config.qk_norm == (config.n_experts == 128):
        odd.append("QK-norm against its rule (on unless there are 128 experts)")
    if odd:
        said = ", ".join(odd)
        yield f"llama.cpp, and in part SGLang and mlx-lm, have Llama 4's numbers built in; here differ: {said}."
    yield (
        f"vLLM: `attention_chunk_size` ({config.chunk}) must be a multiple of its block size (16 on GPUs, 128 on "
        "CPUs by default). The attention temperature is taken from generation_config.json: keep that file."
    )
    if config.head_dim not in CPU_HEADS:
        yield f"vLLM on CPUs has no kernel for heads of {config.head_dim}."
    if config.vision is not None:
        yield "vLLM's CPU build (0.32) fails on pictures that become a single tile."
    if config.temperature_tuning:
        yield "transformers computes left-padded batches wrongly (temperature tuning): give it one sequence at a time."


# ---- the run --------------------------------------------------------------------------------------------------------


def _life(checkpoint: Path) -> Iterator[dict]:
    """run.json of a checkpoint and of those it started from, the newest first; it ends where one can't be found."""
    for _ in range(20):  # a life is not longer, and a circle ends
        try:
            run = read_run(checkpoint)
        except PunaError:
            return
        yield run
        init = run["config"].get("init")
        if not isinstance(init, str) or "stage" not in run["config"]:
            return
        places = [Path(init), checkpoint.parent.parent / Path(init).name]
        found = [folder for place in places for folder in (place, *sorted(place.glob("step-*"), reverse=True))]
        checkpoint = next((f for f in found if STEP.search(f.name) and (f / RUN_FILE).is_file()), None)
        if checkpoint is None:
            return


def _weights(run: Mapping[str, Any]) -> set[str]:
    """Sources of data with a positive weight in any phase of a stage."""
    data = run["config"].get("data") or {}
    phases = [data, *(data.get("then") or [])]
    return {name for phase in phases for name, weight in (phase.get("weights") or {}).items() if weight > 0}


def _source(name: str) -> str:
    """A source's name without the folders of somebody's machine."""
    return f"file:{Path(name).name}" if name.startswith("file:") else name


def _training(stages: list[dict]) -> str:
    rows = []
    for run in reversed(stages):
        config = run["config"]
        train, data = config.get("train") or {}, config.get("data") or {}
        rows.append((
            config.get("stage", "?"), f"{run['step']:,}", train.get("rows", "?"), data.get("seq_len", "?"),
            f"{train['lr']:g}" if "lr" in train else "?", ", ".join(map(_source, sorted(_weights(run)))),
        ))  # fmt: skip
    text = _table(("stage", "steps", "rows a step", "tokens a row", "peak learning rate", "data"), rows)
    first, last = stages[-1]["config"].get("init"), stages[0]
    start = "new weights" if first is None else f"earlier weights ({_line(Path(str(first)).name)})"
    made = last.get("environment") or {}
    known = {"torch", "cpu"} <= made.keys()
    where = f" Trained with torch {_line(made['torch'])} on {_line(made['cpu'])}." if known else ""
    ended = "" if last["finished"] else " **The last stage was not finished when this was exported.**"
    return f"Raised by puna from {start}.{where}{ended}\n\n{text}"


def _data(sources: list[str]) -> str:
    rest = {s.partition("/")[2] or s for s in sources if s.split("/")[0] in ("text", "long", "code")}
    rest |= {"en"} if {"sft/needle", "sft/recall"} & set(sources) else set()
    used = []
    for name, origin in nursery.manifest()["sources"].items():
        if "Validation only" in origin.get("changes", "") or "Never trained on" in origin.get("changes", ""):
            continue
        seen = origin["kind"] in ("names", "pictures") and any(s in SEEN for s in sources)
        told = origin["kind"] == "facts" and "sft/facts" in sources
        if seen or told or rest & (origin.get("texts") or {}).keys():
            used.append((origin["title"], origin["author"], origin["licence"], name))
    own = [s for s in sources if s.startswith("file:")]
    text = ""
    if used:
        text = "Held in the package `puna` (`puna data ls`), each beside its licence:\n\n"
        text += _table(("what", "whose", "licence", "name"), used)
    if own:
        names = ", ".join(_line(Path(s.removeprefix("file:")).name) for s in own)
        text += f"\n\nThe trainer's own files, whose licence is not recorded: {names}."
    return f"{text}\n\nThese weights carry no licence of their own yet: whoever publishes them names one.".strip()


def _evaluation(checkpoint: Path, run: Mapping[str, Any]) -> str:
    joined = "\n".join(f"{name} {digest}" for name, digest in sorted(run["hashes"].items()))
    identity = hashlib.sha256(joined.encode()).hexdigest()
    try:
        report = read_json(checkpoint.resolve().parent.parent / "report.json")
    except PunaError:
        report = {}
    if (report.get("model") or {}).get("sha256") != identity or not report.get("results"):
        return "None recorded for these weights."

    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.4g}"

    rows = [(row["name"], shown(row["value"]) or "not measured", row["unit"], row["n"], shown(row["stderr"]),
             shown(row["chance"])) for row in report["results"]]  # fmt: skip
    text = _table(("row", "value", "unit", "n", "standard error", "chance"), rows)
    return f"By `puna raise` on held-out items, greedy and free; commit {_line(report.get('commit', '?'))}.\n\n{text}"
