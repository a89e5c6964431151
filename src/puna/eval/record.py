"""What report.json holds besides the rows: where, with what and how long a run was made, and what its stages read.

The measured truth is each stage's metrics.jsonl; nothing here is kept in memory while a run goes on, so a report can be
made again from the folder alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from puna.errors import PunaError
from puna.eval.rows import Row, Sample
from puna.fields import to_dict
from puna.model import ModelConfig
from puna.plan.flops import flops_per_tile, flops_per_token, parameter_count
from puna.train import checkpoint, metrics

ORDER = ("vision", "pretrain", "midtrain", "sft", "rl", "dpo", "codistill")


def result_json(
    rows: Sequence[Row], config: Any, seconds: float | Mapping[str, float], folder: Path | None = None,
    samples: Sequence[Sample] = (),
) -> dict:  # fmt: skip
    """The project's one shape of a result, as JSON types; with a run's `folder` also its model and stages.

    config: a dataclass or JSON values. seconds: in all, or by part of the run (kept as "parts").
    """
    parts = {name: round(value, 2) for name, value in seconds.items()} if isinstance(seconds, Mapping) else {}
    values = {
        "commit": commit(), "versions": versions(), "device": device(), "config": to_dict(config),
        "seconds": round(sum(parts.values()) if parts else float(seconds), 2), "parts": parts,
        "results": [row.to_dict() for row in rows], "samples": [sample.to_dict() for sample in samples],
    }  # fmt: skip
    if folder is not None:
        values |= {"model": describe_model(folder, values["config"]), "stages": stages(folder, values["config"])}
    return plain(values)


def plain(value: Any) -> Any:
    """JSON allows no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str:
    """The commit of the tree puna runs from, "-dirty" if it was changed; "unknown" where there is none."""
    here = Path(__file__)
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, check=True,
                       capture_output=True, timeout=10)  # fmt: skip
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, cwd=here.parent, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Python's and the packages' that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("puna", "torch", "numpy", "tokenizers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device() -> dict[str, Any]:
    """The machine."""
    found = {"cpu": checkpoint.cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def stage_folders(folder: Path) -> list[Path]:
    """Folders of a run's stages that have begun, in the order of a life."""
    found = [path.parent for path in folder.glob("*/metrics.jsonl")]
    return sorted(found, key=lambda p: (ORDER.index(p.name) if p.name in ORDER else len(ORDER), p.name))


def model_config(folder: Path, config: Mapping[str, Any]) -> ModelConfig | None:
    """The newest checkpoint's model, else the configured one, else None."""
    for stage in reversed(stage_folders(folder)):
        run = checkpoint.newest(stage)
        if run is not None:
            return ModelConfig.from_dict(run["config"]["model"])
    return ModelConfig.from_dict(config["model"]) if isinstance(config.get("model"), Mapping) else None


def describe_model(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Name, parameters and the identity of the last stage's newest checkpoint: SHA-256 over its tensors' hashes."""
    shape = model_config(folder, config)
    found: dict[str, Any] = {"name": config.get("name", folder.name)}
    if shape is not None:
        count = parameter_count(shape)
        found |= {
            "total": count.total, "active": count.active, "vision": count.vision, "embedding": count.embedding,
            "layers": shape.n_layers, "width": shape.d_model, "experts": shape.n_experts,
            "moe_layers": len(shape.moe_layers), "chunk": shape.chunk, "vocabulary": shape.vocab_size,
        }  # fmt: skip
    for stage in reversed(stage_folders(folder)):
        run = checkpoint.newest(stage)
        if run is not None:
            joined = "\n".join(f"{name} {digest}" for name, digest in sorted(run["hashes"].items()))
            found |= {
                "checkpoint": f"{stage.name}/{checkpoint.steps(stage)[0].name}", "finished": run["finished"],
                "sha256": hashlib.sha256(joined.encode()).hexdigest(),
            }  # fmt: skip
            break
    return found


def capability(source: str) -> str:
    """What a source of data teaches, in a word: languages, code, long documents, pictures, or a task's name."""
    kind, _, rest = source.partition("/")
    if source.startswith(("file:", "corpus:")):
        return "own files"
    if kind == "long":
        return "long documents"
    return {"text": "languages", "captions": "pictures", "scenes": "grounding", "sft": rest}.get(kind, kind)


def stages(folder: Path, config: Mapping[str, Any]) -> dict[str, dict]:
    """Per stage: steps, tokens (in all, learnt from, by source, by capability), tiles, seconds, FLOPs, losses.

    A step's tokens are shared among its sources by their tokens where metrics.jsonl has them, else by their rows.
    """
    shape, found = model_config(folder, config), {}
    for stage in stage_folders(folder):
        lines = [line for line in metrics.read(stage / "metrics.jsonl") if "tokens" in line]
        sources: dict[str, float] = {}
        for line in lines:
            shares = line.get("source_tokens") or line.get("sources") or {}
            whole = sum(shares.values())
            for name, share in shares.items():
                sources[name] = sources.get(name, 0) + line["tokens"] * share / max(whole, 1)
        capabilities: dict[str, float] = {}
        for name, tokens in sources.items():
            capabilities[capability(name)] = capabilities.get(capability(name), 0) + tokens
        length = seq_len(stage, config)
        entry = {
            "steps": len(lines), "tokens": sum(line["tokens"] for line in lines),
            "valid": sum(line.get("valid", 0) for line in lines), "skipped": sum(bool(x.get("skipped")) for x in lines),
            "seconds": round(sum(line.get("seconds", 0.0) for line in lines), 2), "seq_len": length,
            "loss": next((line["loss"] for line in reversed(lines) if line.get("loss") is not None), None),
            "sources": _rounded(sources), "capabilities": _rounded(capabilities),
        }  # fmt: skip
        if any("tiles" in line for line in lines):
            entry["tiles"] = sum(line.get("tiles", 0) for line in lines)
        if shape is not None and length:
            alone = stage.name == "vision"  # the tower alone, its tokens compared with all (fixed) embeddings
            token = 4 * shape.vocab_size * shape.d_model if alone else flops_per_token(shape, length)
            entry["flops"] = token * entry["tokens"] + flops_per_tile(shape) * entry.get("tiles", 0)
        found[stage.name] = entry
    return found


def _rounded(values: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))}


def seq_len(stage: Path, config: Mapping[str, Any]) -> int | None:
    """Tokens of a stage's rows, as its newest checkpoint says, else the run's configuration."""
    run = checkpoint.newest(stage)
    own = run["config"] if run else config.get(stage.name, {})
    return (own.get("data") or {}).get("seq_len") if isinstance(own, Mapping) else None


def read_report(folder: Path) -> dict:
    """report.json of a run. PunaError when it is missing or damaged."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{folder} has no report.json: run `puna raise` to its end first") from None
    except (OSError, ValueError) as error:
        raise PunaError(f"{path} can't be read ({error}): remove it and run `puna raise` again") from None
