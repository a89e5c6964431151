"""A folder of safetensors as one table, and a model filled from a store in place, nothing held twice.

A 109B model in bfloat16 is 203 GiB; a loader that first builds a dictionary of all tensors, then the model, needs twice
that.  Here the model is laid out without data (the *meta* device), its parameters are allocated once where they will
stay, and every stored tensor is read into its place in slices.  safetensors can't run code (no pickle).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from puna.convert.layout import Key, ModelStore, Store, move
from puna.convert.stored import Stored, read_safetensors
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig
from puna.precision.quantized import Quantization, attach
from puna.processor import ImageProcessor, Processor, Tokenizer


def folder_table(folder: Path) -> dict[Key, Stored]:
    """The tensors of `model.safetensors`, or of shards with `model.safetensors.index.json`, all in file 0.

    Errors: PunaError naming the file or tensor for anything absent, truncated or not safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_index(index)
    elif (folder / "model.safetensors").is_file():
        return {(0, name): stored for name, stored in read_safetensors(folder / "model.safetensors").items()}
    else:
        raise PunaError(
            f"{folder} holds no model.safetensors and no model.safetensors.index.json: is the download complete?"
        )
    shards = {file: read_safetensors(folder / file) for file in sorted(set(weight_map.values()))}
    table = {}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise PunaError(f"{folder / file} lacks tensor {name}, which the index says is there: copy it again")
        table[0, name] = shards[file][name]
    for file, held in shards.items():
        if extra := [name for name in held if weight_map.get(name) != file]:
            raise PunaError(f"{folder / file} holds tensor {extra[0]}, which the index has not there: copy both again")
    return table


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise PunaError(f"{index} has no weight_map: fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise PunaError(f"{index}: tensor {name} points outside the folder ({file!r}): do not use this checkpoint")
    return weight_map


def read_json(path: Path) -> dict:
    """A JSON object from a file; PunaError when absent, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError(f"{path} can't be read as JSON ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise PunaError(f"{path} holds no JSON object: restore the file")
    return value


def parameter_shapes(config: ModelConfig, quantization: Quantization | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model is made of, in the model's own order."""
    return {name: tuple(p.shape) for name, p in _empty(config, quantization).state_dict().items()}


def fill(store: Store, dtype: torch.dtype | None, device: torch.device | str | None,
         quantization: Quantization | None = None) -> Llama4:  # fmt: skip
    """The model of a store: allocated once, then filled.  dtype None: the stored one (of the embeddings)."""
    model = _empty(store.config, quantization, dtype or store.dtype("tok_embeddings.weight"))
    model.to_empty(device=torch.device(device) if device is not None else torch.get_default_device())
    target = ModelStore(model)
    for name, shape in store.shapes().items():
        move(store, target, name, shape)
    return model


def _empty(config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype | None = None) -> Llama4:
    """A model without data."""
    with torch.device("meta"):
        model = Llama4(config).to(dtype)
    if quantization is not None:
        attach(model, quantization)
    return model


def processor_for(tokenizer: Tokenizer, config: ModelConfig, folder: Path, **image: Any) -> Processor:
    """The processor of a model whose folder describes no tiles of its own; `image`: what it does say of them.

    Errors: PunaError where the tokenizer's ids contradict the model's, which would silently misplace pictures.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise PunaError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )
    if config.vision is None:
        return Processor(tokenizer, None)
    if tokenizer.patch != config.patch_token:
        raise PunaError(
            f"{folder}: image_token_index {config.patch_token} is not the tokenizer's <|patch|> {tokenizer.patch}"
        )
    tiles = {"tile": config.vision.image_size, "patch": config.vision.patch_size}
    return Processor(tokenizer, ImageProcessor(**tiles, pixel_shuffle=config.vision.pixel_shuffle, **image))
