"""PEFT's folder of adapters, in and out: adapter_config.json and adapter_model.safetensors under transformers' names.

    target_modules      linears   base_model.model.<module>.lora_A.weight [r, in], lora_B.weight [out, r]
    target_parameters   experts   lora_A [E r, out], the expert running slowest; lora_B [in, r E], the expert running
                                  fastest; of two parameters of a module gate_up_proj's stand under `base_layer`

PEFT takes any three-dimensional parameter for [E, out, in]; transformers' Llama 4 has [E, in, out] (llama4-facts.md
§5.1), so there PEFT's A is our B and its B our A: the same product. Shapes tell, and a folder of the other kind is
read as well. transformers keeps q, k and v (gate and up) apart, puna in one matrix. Out: each gets the same A and its
rows of B. In: equal A's become one again; others stand side by side with B in blocks, and the rank is their sum.
Read off peft 0.21 (`ParamWrapper`) and tested against it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.convert.huggingface import pieces
from puna.convert.layout import Piece
from puna.convert.stored import Stored, read_safetensors
from puna.convert.tensors import read_json
from puna.convert.views import Adapters
from puna.errors import PunaError
from puna.model.config import ModelConfig

CONFIG_FILE, FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
UNREAD = ("use_dora", "fan_in_fan_out", "modules_to_save", "layer_replication", "lora_bias", "trainable_token_indices")


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


# --------------------------------------------------------------------------------------------------------------- export


def export(config: ModelConfig, adapters: Adapters, base: Path, target: Path) -> int:
    """Writes the adapters of a model as PEFT's; returns their number of parameters. Errors: PunaError for one that PEFT
    can't hold, or if the disk refuses."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    kinds: dict[str, list[str]] = {"target_modules": [], "target_parameters": []}
    for name, (A, B, scale) in adapters.items():  # noqa: N806
        if name.endswith("router.weight"):
            raise PunaError(f"PEFT can't wrap transformers' router, which has two outputs ({name}): use --to hf")
        for piece in pieces(config, config.vision is not None)[name]:
            module = piece.key[1].removesuffix(".weight")
            place = _place(module, f"{name.rpartition('.')[0]}.w2" in adapters) if A.dim() == 3 else module
            if A.dim() == 2:
                parts = A, B[piece.block[0]]
            else:
                parts = B.flatten(0, 1), A.permute(1, 2, 0).flatten(1)
            for letter, part in zip("AB", parts, strict=True):
                tensors[f"{PREFIX}{place}.lora_{letter}.weight"] = part.contiguous().clone()
            ranks[module] = A.shape[-1 if A.dim() == 3 else 0]
            alphas[module] = scale * ranks[module]
            kinds["target_modules" if A.dim() == 2 else "target_parameters"].append(module)
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    about = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": str(base), "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, **kinds,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
    }  # fmt: skip
    work = target.parent / f".{target.name}.part"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file(tensors, work / FILE, metadata={"format": "pt"})
        (work / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for file in work.iterdir():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())
        work.replace(target)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        raise PunaError(f"can't write {target}: {error}; check the disk's space and rights") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sum(tensor.numel() for tensor in tensors.values())


def _place(module: str, both: bool) -> str:
    """Where PEFT keeps the adapter of an expert parameter."""
    owner, _, parameter = module.rpartition(".")
    return f"{owner}.base_layer" if both and parameter == "gate_up_proj" else owner


# --------------------------------------------------------------------------------------------------------------- import


def base_of(folder: Path) -> Path:
    """The folder of the base. PunaError where it names none on this machine."""
    name = str(read_json(folder / CONFIG_FILE).get("base_model_name_or_path"))
    for path in (Path(name), folder / name):
        if path.is_dir():
            return path
    raise PunaError(
        f"{folder / CONFIG_FILE} names the base {name!r}, which is no folder here: write its path there "
        "(base_model_name_or_path)"
    )


def read(folder: Path, config: ModelConfig) -> tuple[Adapters, Mapping]:
    """(adapters by our names, where they lie). Errors: PunaError for another method than LoRA, or a tensor that belongs
    to no matrix of the model."""
    about = read_json(folder / CONFIG_FILE)
    if about.get("peft_type") != "LORA" or about.get("bias", "none") != "none":
        raise PunaError(f"{folder} holds {about.get('peft_type')} with bias {about.get('bias')!r}: LoRA alone is read")
    if used := [key for key in UNREAD if about.get(key)]:
        raise PunaError(f"{folder}: {used[0]} = {about[used[0]]!r} is not supported: merge it with peft")
    table = read_safetensors(folder / FILE)
    pairs: dict[str, dict[str, Stored]] = {}
    for key, stored in table.items():
        if not (match := KEY.fullmatch(key)):
            raise PunaError(f"{folder / FILE}: tensor {key} is no part of a LoRA adapter")
        pairs.setdefault(match[1], {})[match[2]] = stored
    if lone := [place for place, pair in pairs.items() if len(pair) != 2]:
        raise PunaError(f"{folder / FILE} holds only one of lora_A and lora_B of {lone[0]}: copy it again")
    adapters = {}
    for name, parts in pieces(config, config.vision is not None).items():
        found = [_take(pairs, part, about) for part in parts]
        if any(found) and ".experts." in name:
            adapters[name] = _experts(name, found[0], parts[0].shape)
        elif any(found):
            adapters[name] = _linear(parts, found)
    if pairs:
        raise PunaError(f"{folder / FILE}: there is no module {next(iter(pairs))} in the base: it is another model's")
    return adapters, {(-1, name): stored for name, stored in table.items()}


def _take(pairs: dict, piece: Piece, about: dict) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scale) for a stored tensor, taken out of `pairs`."""
    module = place = piece.key[1].removesuffix(".weight")
    if module == piece.key[1] and ".experts." in module:
        owner, _, parameter = module.rpartition(".")
        asked = [name for name in about.get("target_parameters") or () if re.fullmatch(rf"(.*\.)?{name}", module)]
        place = _place(module, f"{owner}.base_layer" in pairs) if asked else ""
    pair = pairs.pop(place, None)
    if pair is None:
        return None
    A, B = pair["A"].read(), pair["B"].read()  # noqa: N806
    experts = piece.shape[0] if len(piece.shape) == 3 else 1
    rank = A.shape[0] // experts
    patterns = about.get("alpha_pattern") or {}
    own = [alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
    alpha = own[0] if own else about.get("lora_alpha", 8)
    return A, B, alpha / (rank**0.5 if about.get("use_rslora") else rank)


def _experts(name: str, found: tuple[Tensor, Tensor, float], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, float]:
    (E, D, F), (A, B, scale) = shape, found  # noqa: N806
    r = A.shape[0] // E
    if (tuple(A.shape), tuple(B.shape)) == ((E * r, F), (D, r * E)):
        return B.view(D, r, E).permute(2, 0, 1).contiguous(), A.view(E, r, F), scale
    if (tuple(A.shape), tuple(B.shape)) == ((E * r, D), (F, r * E)):  # PEFT was told that it is [E, in, out]
        return A.view(E, r, D).transpose(1, 2).contiguous(), B.view(F, r, E).permute(2, 1, 0).contiguous(), scale
    raise PunaError(f"the adapter of {name} is {list(A.shape)} and {list(B.shape)}, the weight {list(shape)}")


def _linear(parts: list[Piece], found: list) -> tuple[Tensor, Tensor, float]:
    """One adapter of a matrix whose rows are several of transformers'."""
    first = next(part for part in found if part)
    if all(part and part[2] == first[2] and torch.equal(part[0], first[0]) for part in found):
        return first[0], torch.cat([part[1] for part in found]), first[2]
    rows, at = parts[-1].block[0].stop, 0
    A = torch.cat([part[0] for part in found if part])  # noqa: N806
    B = A.new_zeros(rows, len(A))  # noqa: N806
    for piece, part in zip(parts, found, strict=True):
        if part:
            B[piece.block[0], at : at + len(part[0])] = part[2] * part[1]
            at += len(part[0])
    return A, B, 1.0
