"""Hugging Face folders in and out: one table of names, read from left to right to export and from right to left to
load.

Where the two layouts differ (llama4-facts.md §5.1, serving-and-evaluation.md C.3):

* puna keeps q, k and v in one matrix and gate over up in another; Hugging Face stores them apart.  Stacking rows is all
  there is to it: both rotate *interleaved* pairs, so no row is permuted.
* fused experts are the same on both sides: [E, D, 2F], input-major, the gate's columns before the up-projection's.
* the text model's names begin with `language_model.` beside a vision tower (Llama4ForConditionalGeneration), with
  nothing alone (Llama4ForCausalLM).  A tied head is not stored.

An export is what transformers, vLLM and mlx-lm read.  Three traps are built in: vLLM takes temperature tuning from
generation_config.json alone (finding 2), transformers 5 refuses a `floor_scale` that is no integer, and the image
processor's size must equal the vision tower's.  It is written beside the target and renamed: a folder with the final
name is complete.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from puna.convert.card import model_card
from puna.convert.folder import write_folder
from puna.convert.hf_config import config_from_hf, config_to_hf, is_multimodal
from puna.convert.layout import SLICE_BYTES, FileStore, ModelStore, Piece, check
from puna.convert.stored import WEIGHTS, Stored, plan_safetensors
from puna.convert.tensors import fill, folder_table, parameter_shapes, processor_for, read_json
from puna.errors import PunaError
from puna.model import Llama4
from puna.model.config import ModelConfig
from puna.processor import CHAT_TEMPLATE, Processor, Tokenizer

# puna's name -> the stored tensors whose rows, one under the other, it is.  N is a layer number.
TEXT = {
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "layers.N.attention_norm.weight": ("model.layers.N.input_layernorm.weight",),
    "layers.N.attention.wqkv.weight": tuple(f"model.layers.N.self_attn.{x}_proj.weight" for x in "qkv"),
    "layers.N.attention.wo.weight": ("model.layers.N.self_attn.o_proj.weight",),
    "layers.N.ffn_norm.weight": ("model.layers.N.post_attention_layernorm.weight",),
    "layers.N.feed_forward.w13.weight": tuple(f"model.layers.N.feed_forward.{x}_proj.weight" for x in ("gate", "up")),
    "layers.N.feed_forward.w2.weight": ("model.layers.N.feed_forward.down_proj.weight",),
    "layers.N.moe.router.weight": ("model.layers.N.feed_forward.router.weight",),
    "layers.N.moe.experts.w13": ("model.layers.N.feed_forward.experts.gate_up_proj",),
    "layers.N.moe.experts.w2": ("model.layers.N.feed_forward.experts.down_proj",),
    "layers.N.moe.shared.w13.weight": tuple(
        f"model.layers.N.feed_forward.shared_expert.{x}_proj.weight" for x in ("gate", "up")
    ),
    "layers.N.moe.shared.w2.weight": ("model.layers.N.feed_forward.shared_expert.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}
VISION = {
    "vision.patch_embedding.weight": ("vision_model.patch_embedding.linear.weight",),
    "vision.class_embedding": ("vision_model.class_embedding",),
    "vision.positional_embedding": ("vision_model.positional_embedding_vlm",),
    "vision.adapter.fc1.weight": ("vision_model.vision_adapter.mlp.fc1.weight",),
    "vision.adapter.fc2.weight": ("vision_model.vision_adapter.mlp.fc2.weight",),
    "vision.projector.weight": ("multi_modal_projector.linear_1.weight",),
}
for _kind in ("weight", "bias"):
    VISION |= {
        f"vision.norm_pre.{_kind}": (f"vision_model.layernorm_pre.{_kind}",),
        f"vision.norm_post.{_kind}": (f"vision_model.layernorm_post.{_kind}",),
        f"vision.layers.N.norm1.{_kind}": (f"vision_model.model.layers.N.input_layernorm.{_kind}",),
        f"vision.layers.N.norm2.{_kind}": (f"vision_model.model.layers.N.post_attention_layernorm.{_kind}",),
        f"vision.layers.N.mlp.fc1.{_kind}": (f"vision_model.model.layers.N.mlp.fc1.{_kind}",),
        f"vision.layers.N.mlp.fc2.{_kind}": (f"vision_model.model.layers.N.mlp.fc2.{_kind}",),
    }
    for _x in "qkvo":
        VISION[f"vision.layers.N.attention.w{_x}.{_kind}"] = (
            f"vision_model.model.layers.N.self_attn.{_x}_proj.{_kind}",
        )

IGNORED = re.compile(r"rotary_emb(edding)?\.(inv_freq|freqs_ci)$")  # tables, recomputed; some old files hold them
SHARD_BYTES = 5 * 10**9


def pieces(config: ModelConfig, multimodal: bool) -> dict[str, list[Piece]]:
    """Which stored tensors hold each parameter, and where. All are in file 0: names are unique in a folder."""
    return {name: _pieces(name, shape, config, multimodal) for name, shape in parameter_shapes(config).items()}


def _pieces(name: str, shape: tuple[int, ...], config: ModelConfig, multimodal: bool) -> list[Piece]:
    row = re.sub(r"(?<=layers\.)\d+", "N", name)
    number = re.search(r"layers\.(\d+)", name)
    if row in VISION:
        parts, prefix = VISION[row], ""
    else:
        parts, prefix = TEXT[row], "language_model." if multimodal else ""
    stored = [prefix + (part.replace("N", number.group(1), 1) if number else part) for part in parts]
    if len(stored) == 3:
        rows = [h * config.head_dim for h in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    else:
        rows = [shape[0] // len(stored)] * len(stored)
    found, start = [], 0
    for key, count in zip(stored, rows, strict=True):
        part = (count, *shape[1:])
        found.append(Piece((0, key), part, part, 0, (slice(start, start + count), *map(slice, shape[1:]))))
        start += count
    return found


# ----------------------------------------------------------------------------------------------------------------- load


def load_hf(
    folder: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Llama4, Processor | None]:
    """Reads a Hugging Face Llama 4 folder; memory is the model plus one slice of a tensor.

    dtype: of the parameters; None takes config.json's, else the stored one.  device: None is torch's default device.
    Returns (model, processor), the processor None where the folder holds no tokenizer.json.
    Errors: PunaError naming the missing, extra or misshapen tensor, the corrupt file, or the unsupported configuration
    key.
    """
    store, processor = open_hf(Path(folder))
    return fill(store, dtype, device), processor


def open_hf(folder: Path) -> tuple[FileStore, Processor | None]:
    """The folder's parameters, checked for names, types and shapes but not yet read. Errors: as `load_hf`."""
    raw = read_json(folder / "config.json")
    config = config_from_hf(raw)
    multimodal = is_multimodal(raw)
    store = HuggingFaceStore(config, pieces(config, multimodal), folder_table(folder), _dtype(raw))
    head = ("language_model." if multimodal else "") + "lm_head.weight"
    allowed = {head} if config.tie_embeddings else set()
    check(store, str(folder), lambda name: name in allowed or bool(IGNORED.search(name)), WEIGHTS)
    if config.tie_embeddings and (0, head) in store.table:
        embedding = store.table[store.pieces["tok_embeddings.weight"][0].key]
        if not _same(store.table[0, head], embedding):
            raise PunaError(
                f"{head} differs from the embeddings, but config.json ties them: set tie_word_embeddings to false"
            )
    return store, load_hf_processor(folder, config)


class HuggingFaceStore(FileStore):
    """A folder whose config.json may say another number type than the files: the configuration's is the model's."""

    def __init__(self, config: ModelConfig, pieces: dict[str, list[Piece]], table: dict, dtype: torch.dtype | None):
        super().__init__(config, pieces, table)
        self.said = dtype

    def dtype(self, name: str) -> torch.dtype:
        return self.said or super().dtype(name)


def _same(a: Stored, b: Stored) -> bool:
    step = max(1, SLICE_BYTES // a.row_size)
    return a.shape == b.shape and all(
        torch.equal(a.read(i, min(i + step, a.shape[0])), b.read(i, min(i + step, a.shape[0])).to(a.dtype))
        for i in range(0, a.shape[0], step)
    )


def _dtype(raw: dict) -> torch.dtype | None:
    text = raw.get("text_config") or {}
    given = raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if given is None:
        return None
    dtype = getattr(torch, str(given).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise PunaError(f"config.json: dtype {given!r} is unknown; give dtype= when loading")
    return dtype


def load_hf_processor(folder: Path, config: ModelConfig) -> Processor | None:
    """The processor of a Hugging Face folder, or None without tokenizer.json.  Errors: PunaError where its ids or tile
    size contradict the model's, which would otherwise silently misplace pictures."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if config.vision is None:
        return processor_for(tokenizer, config, folder)
    raw: dict[str, Any] = {}
    if (folder / "processor_config.json").is_file():
        raw = read_json(folder / "processor_config.json").get("image_processor") or {}
    if not raw and (folder / "preprocessor_config.json").is_file():
        raw = read_json(folder / "preprocessor_config.json")
    vision = config.vision
    size = raw.get("size") or {}
    sides = (
        {size.get("height", vision.image_size), size.get("width", vision.image_size)}
        if isinstance(size, dict)
        else {size}
    )
    if sides != {vision.image_size}:
        raise PunaError(f"{folder}: the image processor's size {size} is not the vision tower's {vision.image_size}")
    return processor_for(
        tokenizer, config, folder, max_tiles=raw.get("max_patches", 16),
        resize_to_max_canvas=bool(raw.get("resize_to_max_canvas", False)),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- export


def export_hf(
    model: Llama4, processor: Processor | None, folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Writes a folder that transformers, vLLM and mlx-lm load: configuration, sharded safetensors, tokenizer,
    processor, template, model card.

    Parameters are stored in their own dtype.  processor None: weights and configuration only.  Returns the folder.
    Errors: PunaError if the folder exists and is not empty, if tokenizer and model disagree, or if the disk refuses.
    """
    return write_folder(ModelStore(model), HuggingFaceFormat(processor, shard_bytes), folder)


@dataclass(frozen=True)
class HuggingFaceFormat:
    """What `write_folder` needs to know of a folder of Hugging Face's."""

    hashed: ClassVar[bool] = False
    processor: Processor | None = field(repr=False)
    shard_bytes: int = SHARD_BYTES
    origin: Path | None = field(default=None, repr=False)  # the checkpoint of ours that is exported, for the card

    def plan(self, config: ModelConfig, dtypes: dict[str, torch.dtype], folder: Path) -> FileStore:
        """Lays the files out, in shards of at most `shard_bytes` (one tensor at least)."""
        self._configuration(config, dtypes)  # said before the weights are written, not after
        layout = pieces(config, config.vision is not None)
        stored = {p.key[1]: (dtypes[name], p.shape) for name, parts in layout.items() for p in parts}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in stored.items()}
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > self.shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        table, weight_map = {}, {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            table |= plan_safetensors(folder / file, {name: stored[name] for name in shard})
            weight_map |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
        return FileStore(config, layout, {(0, name): place for name, place in table.items()})

    def finish(self, config: ModelConfig, dtypes: dict[str, torch.dtype], hashes: dict[str, str], folder: Path) -> None:
        """Everything but weights."""
        if self.processor is not None:
            self.processor.tokenizer.save(folder / "tokenizer.json")
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        for name, value in self._configuration(config, dtypes).items():
            _write_json(folder / name, value)
        (folder / "README.md").write_text(model_card(config, self.origin), encoding="utf-8")

    def _configuration(self, config: ModelConfig, dtypes: dict[str, torch.dtype]) -> dict[str, dict]:
        dtype = str(dtypes["tok_embeddings.weight"]).removeprefix("torch.")
        ids = _token_ids(self.processor, config) if self.processor is not None else {}
        files = {"config.json": config_to_hf(config, dtype, ids)}
        files["generation_config.json"] = _generation_config(config, ids)
        return files | (_processor_files(self.processor, config, ids) if self.processor is not None else {})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_ids(processor: Processor, config: ModelConfig) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise PunaError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: not a pair"
        )
    if config.vision is not None and tokenizer.patch != config.patch_token:
        raise PunaError(
            f"the model's patch_token {config.patch_token} is not the tokenizer's <|patch|> ({tokenizer.patch})"
        )
    if config.vision is not None and (processor.image is None or processor.image.tile != config.vision.image_size):
        raise PunaError(
            f"the processor's tiles are not the vision tower's {config.vision.image_size} pixels: not a pair"
        )
    return {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad,
        "boi_token_index": tokenizer.image_start,
        "eoi_token_index": tokenizer.image_end,
    }


def _generation_config(config: ModelConfig, ids: dict[str, Any]) -> dict:
    tokens = {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in ids}
    tuning = config.temperature_tuning  # said even where it is off: vLLM would switch it on past 32,768 tokens
    return tokens | {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "attn_temperature_tuning": tuning}


def _processor_files(processor: Processor, config: ModelConfig, ids: dict[str, Any]) -> dict[str, dict]:
    text_of = {i: text for text, i in processor.tokenizer.special.items()}
    files: dict[str, dict] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": text_of[ids["bos_token_id"]],
            "eos_token": text_of[processor.tokenizer.eot],
            "pad_token": text_of[ids["pad_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_context,
            "model_input_names": ["input_ids", "attention_mask"],
        }
    }
    if config.vision is None:
        return files
    image, vision = processor.image, config.vision
    settings = {
        "image_processor_type": "Llama4ImageProcessor",
        "size": {"height": image.tile, "width": image.tile},
        "max_patches": image.max_tiles,
        "resize_to_max_canvas": image.resize_to_max_canvas,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 2,
    }
    shape = {
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle,
        "processor_class": "Llama4Processor",
    }
    files["tokenizer_config.json"]["processor_class"] = "Llama4Processor"
    files["processor_config.json"] = shape | {"image_processor": settings}  # transformers 5
    files["preprocessor_config.json"] = settings | {  # older readers; the type's name of transformers 4
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
    }
    return files
