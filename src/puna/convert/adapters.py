"""Adapters on the disk, and the base they stand beside.

A stage that LoRA trained holds A and B of every target in `adapter.safetensors` (run.json has their hashes) and, in
run.json under config.base, where the base is, what it is held as, and the SHA-256 of every tensor of it. The base is
compared tensor by tensor as it is read: an adapter beside other weights would answer, only wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from puna.convert.layout import Key
from puna.convert.puna import ADAPTER_FILE, RUN_FILE, CorruptCheckpoint, read_run, tensor_hash
from puna.convert.stored import Stored, read_safetensors
from puna.convert.views import Adapters
from puna.errors import PunaError
from puna.fields import build
from puna.model.lora import LoRAConfig


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint holds adapters only."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapter(folder: Path) -> tuple[dict, Adapters, dict[Key, Stored]]:
    """(config.base, the adapters, where they lie) of a checkpoint. Errors: CorruptCheckpoint naming the tensor."""
    run = read_run(folder)
    table = read_safetensors(folder / ADAPTER_FILE)
    base = run["config"].get("base")
    if not isinstance(base, Mapping) or not {"path", "quantize", "hashes"} <= base.keys():
        raise CorruptCheckpoint(f"{folder / RUN_FILE} lacks config.base, the model its adapters belong to: restore it")
    config = build(LoRAConfig, run["config"].get("lora") or {}, "lora.")
    tensors = {}
    for name in sorted(run["hashes"].keys() | table.keys()):
        if name not in table or tensor_hash(tensor := table[name].read()) != run["hashes"].get(name):
            raise CorruptCheckpoint(
                f"{folder}: tensor {name} does not match its hash: the file is damaged; take another checkpoint"
            )
        tensors[name] = tensor
    adapters = {}
    for name in [name.removesuffix(".A") for name in tensors if name.endswith(".A")]:
        if f"{name}.B" not in tensors:
            raise CorruptCheckpoint(f"{folder}: tensor {name}.B is missing: take another checkpoint")
        A, B = tensors[f"{name}.A"], tensors[f"{name}.B"]  # noqa: N806
        adapters[name] = (A, B, config.alpha / A.shape[-1 if A.dim() == 3 else 0])
    return dict(base), adapters, {(-1, name): stored for name, stored in table.items()}


def base_record(path: str | os.PathLike, quantize: str | None, hashes: dict[str, str]) -> dict:
    """What run.json says about a base."""
    return {"path": str(Path(path).expanduser().resolve()), "quantize": quantize, "hashes": hashes}


def base_path(base: dict, folder: Path) -> Path:
    """Where the base is. PunaError if it is gone."""
    path = Path(base["path"])
    if not path.exists():
        raise PunaError(f"the base of {folder} is no longer at {path}: put it back, or a link to where it is now")
    return path


def storage(base: str) -> tuple[torch.dtype | None, str | None]:
    """(dtype, scheme of quantisation) of a LoRAConfig's `base`."""
    return {"stored": (None, None), "float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None)}.get(
        base, (None, base)
    )
