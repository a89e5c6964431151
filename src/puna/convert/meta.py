"""Meta's own folders: `params.json` and R files `consolidated.NN.pth`, one a rank of tensor parallelism.

Every rank's file holds its part of each matrix under the same names.  Four things bite (llama4-facts.md §5.1):

* wqkv is cut *within* q, k and v: a rank has its rows of q, then of k, then of v; fc1 likewise, gate over up;
* experts are one 2-D matrix, [E * D, F / R] for gate and up (cut by columns), [E * F / R, D] for down, whose F is cut
  *inside every expert*: one file under the other mixes experts up;
* the router is stored [D, E], input first; norms, the router and position embeddings are in every file, equal;
* statistics of expert choice, Transformer-Engine's leftovers and RoPE tables lie beside the weights and are dropped by
  name, any other tensor is an error.

FP8 releases (§5.3) hold the routed experts of all but the first and last layer as e4m3, one scale a row of each rank's
[out, in] matrix, in `fp8_scales_R.pt`: value = number * scale.  Meta's offline int4 files can't be read back by Meta's
own loader and are refused.

`tokenizer.model` lies beside them (`puna.processor.ranks`).

params.json speaks of widths by formula (§1.2: ffn_exp, ffn_dim_multiplier, multiple_of); writing solves it backwards.
What it can't say (context length, the patch token's id) goes into a key `puna` there, which Meta's code ignores.  The
sums of the files' zip records are empty (`stored.py`): torch reads them, `unzip -t` complains.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from puna.convert.layout import FileStore, Key, Piece, check, whole
from puna.convert.stored import WEIGHTS, Stored, plan_pth, read_pth
from puna.convert.tensors import parameter_shapes, processor_for, read_json
from puna.errors import PunaError
from puna.model.config import ModelConfig, RopeScaling, VisionConfig
from puna.precision.fp8 import dequantize_rows, quantize_rows
from puna.processor import Processor, Tokenizer

PARAMS = "params.json"
RANKS = "tokenizer.model"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
DROPPED = re.compile(r"(running_gate_stats_3E|global_gate_stats_3E|expert_activation_DE|_extra_state|rope\.freqs)$")
FP8 = torch.float8_e4m3fn

# puna's name -> (Meta's name, how its parts lie in the parameter); the ways are explained at `_pieces`.
LAYER = "layers.N.feed_forward."
TEXT = {
    "tok_embeddings.weight": [("tok_embeddings.weight", "rows")],
    "layers.N.attention_norm.weight": [("layers.N.attention.wqkv.layer_norm_weight", "same")],
    "layers.N.attention.wqkv.weight": [("layers.N.attention.wqkv.weight", "qkv")],
    "layers.N.attention.wo.weight": [("layers.N.attention.wo.weight", "columns")],
    "layers.N.feed_forward.w13.weight": [(LAYER + "mlp.fc1_weight", "halves")],
    "layers.N.feed_forward.w2.weight": [(LAYER + "mlp.fc2_weight", "columns")],
    "layers.N.moe.router.weight": [(LAYER + "router_DE", "transposed")],
    "layers.N.moe.experts.w13": [
        (LAYER + "experts.moe_w_in_eD_F", "expert columns"), (LAYER + "experts.moe_w_swiglu_eD_F", "expert columns"),
    ],
    "layers.N.moe.experts.w2": [(LAYER + "experts.moe_w_out_eF_D", "expert rows")],
    "layers.N.moe.shared.w13.weight": [
        (LAYER + "w_in_shared_FD.weight", "rows"), (LAYER + "w_swiglu_FD.weight", "rows"),
    ],
    "layers.N.moe.shared.w2.weight": [(LAYER + "w_out_shared_DF.weight", "columns")],
    "norm.weight": [("norm.weight", "same")],
    "output.weight": [("output.weight", "rows")],
}  # fmt: skip
_ENCODER = "vision_embeddings.vision_encoder."
_BLOCK = _ENCODER + "transformer.resblocks.N."
VISION = {
    "vision.patch_embedding.weight": [(_ENCODER + "conv1._linear.weight", "rows")],
    "vision.class_embedding": [(_ENCODER + "class_embedding", "same")],
    "vision.positional_embedding": [(_ENCODER + "positional_embedding_vlm", "same")],
    "vision.adapter.fc1.weight": [("vision_embeddings.vision_adapter.mlp.c_fc.weight", "rows")],
    "vision.adapter.fc2.weight": [("vision_embeddings.vision_adapter.mlp.c_proj.weight", "columns")],
    "vision.projector.weight": [("vision_projection.weight", "rows")],
    "vision.layers.N.attention.wo.weight": [(_BLOCK + "attn.wo.weight", "columns")],
    "vision.layers.N.attention.wo.bias": [(_BLOCK + "attn.wo.bias", "same")],
    "vision.layers.N.mlp.fc2.weight": [(_BLOCK + "mlp.c_proj.weight", "columns")],
    "vision.layers.N.mlp.fc2.bias": [(_BLOCK + "mlp.c_proj.bias", "same")],
}
for _kind in ("weight", "bias"):
    VISION |= {
        f"vision.norm_pre.{_kind}": [(f"{_ENCODER}ln_pre.{_kind}", "same")],
        f"vision.norm_post.{_kind}": [(f"{_ENCODER}ln_post.{_kind}", "same")],
        f"vision.layers.N.norm1.{_kind}": [(f"{_BLOCK}ln_1.{_kind}", "same")],
        f"vision.layers.N.norm2.{_kind}": [(f"{_BLOCK}ln_2.{_kind}", "same")],
        f"vision.layers.N.mlp.fc1.{_kind}": [(f"{_BLOCK}mlp.c_fc.{_kind}", "rows")],
    }
    for _x in "qkv":
        VISION[f"vision.layers.N.attention.w{_x}.{_kind}"] = [(f"{_BLOCK}attn.w{_x}.{_kind}", "rows")]


def pieces(config: ModelConfig, ranks: int) -> dict[str, list[Piece]]:
    """Which stored tensors hold each parameter. Errors: PunaError where a size can't be divided among the ranks."""
    return {name: _pieces(name, shape, config, ranks) for name, shape in parameter_shapes(config).items()}


def most_shards(config: ModelConfig) -> int:
    """The most files, 8 at most as in Meta's folders, that every tensor of the model can be divided among."""
    for shards in (8, 4, 2):
        try:
            pieces(config, shards)
        except PunaError:
            continue
        return shards
    return 1


def _pieces(name: str, shape: tuple[int, ...], config: ModelConfig, ranks: int) -> list[Piece]:
    row = re.sub(r"(?<=layers\.)\d+", "N", name)
    number = re.search(r"layers\.(\d+)", name)
    if row == "layers.N.ffn_norm.weight":  # named for what follows it
        after = "norm.weight" if config.is_moe(int(number.group(1))) else "mlp.layer_norm_weight"
        parts = [(LAYER + after, "same")]
    else:
        parts = VISION.get(row) or TEXT[row]
    found: list[Piece] = []
    for i, (stored, way) in enumerate(parts):
        key = stored.replace(".N.", f".{number.group(1)}.", 1) if number else stored
        for rank in range(ranks):
            found += _of_rank((rank, key), way, shape, config, rank, ranks, i, len(parts))
    return found


def _of_rank(
    key: Key, way: str, shape: tuple[int, ...], config: ModelConfig, rank: int, ranks: int, part: int, parts: int
) -> list[Piece]:
    """The pieces of one rank's tensor in a parameter of `shape`; `part` of `parts` when several names share it.

    rows, columns   cut along dimension 0, 1        halves, qkv     rows, cut within each of the two or three
    expert columns  [E * D, F / R]                  expert rows     [E * F / R, D]
    same            whole in every file             transposed      the same, the other way round
    """

    def share(size: int) -> int:
        if size % ranks:
            raise PunaError(f"{key[1]}: {size} can't be divided among {ranks} files; choose another --shards")
        return size // ranks

    def span(size: int, begin: int = 0) -> slice:
        """This rank's share of `size` rows or columns that begin at `begin`."""
        return slice(begin + rank * share(size), begin + (rank + 1) * share(size))

    rest = tuple(slice(0, n) for n in shape)
    if way == "same":
        return [whole(key, shape, copy=rank > 0)]
    if way == "transposed":
        stored = shape[::-1]
        return [Piece(key, stored, stored, 0, rest, transposed=True, copy=rank > 0)]
    if way == "rows":
        size = shape[0] // parts
        stored = (share(size), *shape[1:])
        return [Piece(key, stored, stored, 0, (span(size, part * size), *rest[1:]))]
    if way == "columns":
        stored = (shape[0], share(shape[1]))
        return [Piece(key, stored, stored, 0, (rest[0], span(shape[1])))]
    if way in ("halves", "qkv"):
        sizes = [shape[0] // 2] * 2
        if way == "qkv":
            sizes = [h * config.head_dim for h in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
            share(config.n_kv_heads)  # whole heads
        stored = (sum(map(share, sizes)), *shape[1:])
        found, row, begin = [], 0, 0
        for size in sizes:
            found.append(Piece(key, stored, stored, row, (span(size, begin), *rest[1:])))
            row, begin = row + share(size), begin + size
        return found
    experts, inner, outer = shape
    if way == "expert columns":
        size = outer // parts
        view, block = (experts, inner, share(size)), (rest[0], rest[1], span(size, part * size))
    else:
        view, block = (experts, share(inner), outer), (rest[0], span(inner), rest[2])
    return [Piece(key, (experts * view[1], view[2]), view, 0, block)]


# ---------------------------------------------------------------------------------------------------------- params.json


def config_from_params(raw: dict, vocab_size: int) -> ModelConfig:
    """The ModelConfig of a params.json. vocab_size: of the embedding's files, for those that don't say (-1).

    Errors: PunaError naming the key that is missing, of a wrong type or unsupported.
    """
    try:
        return _config(raw, vocab_size)
    except KeyError as error:
        raise PunaError(f"{PARAMS} lacks {error}: restore the file") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise PunaError(f"{PARAMS} holds a value of the wrong type ({error})") from None


def _config(raw: dict, vocab_size: int) -> ModelConfig:
    for key in ("quantization_args", "lora_args"):
        if raw.get(key):
            raise PunaError(f"{PARAMS}: {key} is not supported; take the bfloat16 release of the model")
    dim, layers, heads = raw["dim"], raw["n_layers"], raw["n_heads"]
    head_dim = raw.get("head_dim") or dim // heads
    if head_dim * heads != dim:
        raise PunaError(f"{PARAMS}: head_dim {head_dim} x n_heads {heads} is not dim {dim}")
    moe = raw.get("moe_args") or {}
    if moe.get("top_k", 1) != 1:
        raise PunaError(f"{PARAMS}: moe_args.top_k = {moe['top_k']} is not supported; Llama 4 has 1")
    step = moe.get("interleave_moe_layer_step", 1)
    experts = max(0, moe.get("num_experts", -1))
    interval = raw.get("nope_layer_interval")
    scaling = None
    if raw.get("use_scaled_rope"):
        high = raw.get("rope_high_freq_factor") or 1
        scaling = RopeScaling(factor=float(raw.get("rope_scaling_factor") or 16), high_freq_factor=float(high))
    ours = raw.get("puna") or {}
    context = ours.get("max_context", 262144)
    given = raw.get("vocab_size", -1)
    moe_layers = tuple(i for i in range(layers) if experts and (i + 1) % step == 0)
    return ModelConfig(
        vocab_size=vocab_size if given == -1 else given,
        d_model=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=raw.get("n_kv_heads") or heads,
        head_dim=head_dim,
        expert_width=_width(raw, True) if moe_layers else ours.get("expert_width", 0),
        dense_width=_width(raw, False) if len(moe_layers) < layers else ours.get("dense_width", _width(raw, False)),
        n_experts=experts,
        moe_layers=moe_layers,
        moe_step=step,
        nope_layers=tuple(i for i in range(layers) if interval and (i + 1) % interval == 0),
        chunk=raw.get("attention_chunk_size") or context,  # Llama Guard: no chunks
        qk_norm=bool(raw.get("use_qk_norm", False)),
        rope_theta=float(raw.get("rope_theta", 500000)),
        rope_scaling=scaling,
        temperature_tuning=bool(raw.get("attn_temperature_tuning", False)),
        floor_scale=int(raw.get("floor_scale", 8192)),
        attn_scale=float(raw.get("attn_scale", 0.1)),
        norm_eps=float(raw.get("norm_eps", 1e-5)),
        max_context=context,
        patch_token=ours.get("patch_token", 200092) if raw.get("vision_args") else ours.get("patch_token"),
        vision=_vision(raw["vision_args"]) if raw.get("vision_args") else None,
    )


def _width(raw: dict, expert: bool) -> int:
    """The FFN width that Meta's code makes of params.json (llama4-facts.md §1.2)."""
    moe, multiplier, multiple = raw.get("moe_args") or {}, raw.get("ffn_dim_multiplier"), raw.get("multiple_of", 256)
    hidden = int(raw["ffn_exp"] * raw["dim"]) if expert else 4 * raw["dim"]
    hidden = int(2 * hidden / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    if expert and moe.get("auto_scale_F", True):
        hidden = int(hidden / (moe.get("capacity_factor", 1.0) + 1))
    return hidden + -hidden % multiple


def _vision(raw: dict) -> VisionConfig:
    sides = {name: {raw[name]["height"], raw[name]["width"]} for name in ("image_size", "patch_size")}
    for name, values in sides.items():
        if len(values) > 1:
            raise PunaError(f"{PARAMS}: vision_args.{name} {sorted(values)} is no square; Llama 4's tiles are")
    return VisionConfig(
        image_size=sides["image_size"].pop(), patch_size=sides["patch_size"].pop(), width=raw["dim"],
        layers=raw["n_layers"], heads=raw["n_heads"], mlp_width=int(raw["mlp_ratio"] * raw["dim"]),
        adapter_width=raw["output_dim"], pixel_shuffle=raw["pixel_shuffle_ratio"],
    )  # fmt: skip


def params_of(config: ModelConfig) -> dict[str, Any]:
    """params.json of a model. Errors: PunaError for what Meta's code can't be told."""
    layers = range(config.n_layers)
    nope, moe = set(config.nope_layers), set(config.moe_layers)
    interval = min(nope) + 1 if nope else None
    step = min(moe) + 1 if moe else 1
    s, v = config.rope_scaling, config.vision
    for wrong, what in (
        (nope != {i for i in layers if interval and (i + 1) % interval == 0}, "nope_layers at irregular distances"),
        (moe and moe != {i for i in layers if (i + 1) % step == 0}, "moe_layers at irregular distances"),
        (config.head_dim * config.n_heads != config.d_model, "n_heads x head_dim other than d_model"),
        (config.tie_embeddings, "tie_embeddings"),
        (s and (s.low_freq_factor, s.original_context) != (1.0, 8192), "another rope_scaling than from 8192"),
        (v and (v.norm_eps, v.rope_theta) != (1e-5, 10000.0), "another vision.norm_eps or vision.rope_theta"),
    ):
        if wrong:
            raise PunaError(f"Meta's format can't say {what}: use --to hf")
    params: dict[str, Any] = {
        "dim": config.d_model, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "use_scaled_rope": s is not None,
        "attention_chunk_size": config.chunk, "nope_layer_interval": interval, "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature_tuning, "floor_scale": config.floor_scale,
        "attn_scale": config.attn_scale, **_widths(config),
        "puna": {name: getattr(config, name) for name in ("max_context", "patch_token", "expert_width", "dense_width")},
    }  # fmt: skip
    if s is not None:
        params |= {"rope_scaling_factor": s.factor, "rope_high_freq_factor": s.high_freq_factor}
    if moe:
        params["moe_args"] = {"num_experts": config.n_experts, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                              "interleave_moe_layer_step": step}  # fmt: skip
    if v is not None:
        params["vision_args"] = {
            "image_size": {"height": v.image_size, "width": v.image_size},
            "patch_size": {"height": v.patch_size, "width": v.patch_size},
            "dim": v.width, "n_layers": v.layers, "n_heads": v.heads, "mlp_ratio": v.mlp_width / v.width,
            "output_dim": v.adapter_width, "pixel_shuffle_ratio": v.pixel_shuffle,
        }  # fmt: skip
    return params


def _widths(config: ModelConfig) -> dict[str, Any]:
    """ffn_exp, ffn_dim_multiplier and multiple_of from which Meta's code makes these widths."""
    dim, dense = config.d_model, len(config.moe_layers) < config.n_layers
    wanted = [w for w, used in ((config.dense_width, dense), (config.expert_width, bool(config.moe_layers))) if used]
    published = {"ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048}
    multiple = math.gcd(*wanted)
    # The middle of the last multiple, so that no rounding on the way matters.
    multiplier = (config.dense_width if dense else 2 * config.expert_width) / int(8 * dim / 3) - multiple / (6 * dim)
    exponent = 3 * (2 * config.expert_width - multiple) / (2 * multiplier * dim)
    solved = {"ffn_exp": exponent, "ffn_dim_multiplier": multiplier, "multiple_of": multiple}
    for params in (published, solved):
        raw = params | {"dim": dim}
        if (not dense or _width(raw, False) == config.dense_width) and (
            not config.moe_layers or _width(raw, True) == config.expert_width
        ):
            return params
    raise PunaError(f"Meta's format can't say widths of {wanted}: use --to hf")


# ----------------------------------------------------------------------------------------------------------------- read


def is_meta(folder: Path) -> bool:
    return (folder / PARAMS).is_file() or any(folder.glob("consolidated.*.pth"))


def open_meta(folder: Path) -> tuple[MetaStore, Processor | None]:
    """The folder's parameters, checked for names, types and shapes but not yet read (fp8 experts are read as bfloat16).

    Errors: PunaError naming the tensor or file that is missing, extra, misshapen, damaged or quantised to int4.
    """
    raw = read_json(folder / PARAMS)
    files = {int(m.group(1)): path for path in folder.iterdir() if (m := SHARD.fullmatch(path.name))}
    if sorted(files) != list(range(len(files))) or not files:
        raise PunaError(
            f"{folder} needs consolidated.00.pth and all that follow, it has {sorted(files)}: copy them all"
        )
    if any(folder.glob("int4_scales_*.pt")):
        raise PunaError(
            f"{folder} holds Meta's int4 files, which lack scales that Meta's own loader asks for "
            "(first and last layer, shared experts): take the bfloat16 release and quantise it"
        )
    table = {(rank, name): stored for rank, path in files.items() for name, stored in read_pth(path).items()}
    embedding = table.get((0, "tok_embeddings.weight"))
    config = config_from_params(raw, embedding.shape[0] * len(files) if embedding and embedding.shape else -1)
    layout = pieces(config, len(files))
    scales = _scales(folder, layout, table)
    store = MetaStore(config, layout, table, scales)
    check(store, str(folder), lambda name: bool(DROPPED.search(name)), (*WEIGHTS, FP8))
    return store, _processor(folder, config)


def _processor(folder: Path, config: ModelConfig) -> Processor | None:
    """From puna's own two files, if a conversion left them there: they load faster and hold what Meta's can't."""
    if (folder / "tokenizer.json").is_file() and (folder / "processor.json").is_file():
        return Processor.load(folder)
    path = folder / RANKS
    return processor_for(Tokenizer.from_ranks(path), config, folder) if path.is_file() else None


def _scale_name(key: str) -> str:
    """'layers.1.feed_forward.experts.moe_w_in_eD_F' -> 'layers.1.feed_forward.experts.w1'."""
    prefix, last = key.rsplit(".", 1)
    return f"{prefix}.{ {'moe_w_in_eD_F': 'w1', 'moe_w_out_eF_D': 'w2', 'moe_w_swiglu_eD_F': 'w3'}[last] }"


def _scales(folder: Path, layout: dict[str, list[Piece]], table: dict[Key, Stored]) -> dict[Key, Stored]:
    """The scales of every fp8 tensor, by the tensor's key; checked."""
    read: dict[int, dict[str, Stored]] = {}
    found = {}
    for name, parts in layout.items():
        for piece in parts:
            if piece.key not in table or table[piece.key].dtype != FP8:
                continue
            if ".experts." not in name:
                raise PunaError(f"tensor {piece.key[1]} is stored as F8_E4M3: only Meta's routed experts can be")
            rank, key = piece.key
            if rank not in read:
                read[rank] = read_pth(folder / f"fp8_scales_{rank}.pt")
            scale = read[rank].get(_scale_name(key))
            shape = (piece.view[0], piece.view[2])
            if scale is None or scale.shape != shape or scale.dtype != torch.float32:
                have = "no scale" if scale is None else f"a scale of {list(scale.shape)} {scale.dtype}"
                raise PunaError(
                    f"fp8_scales_{rank}.pt has {have} for {_scale_name(key)}, it needs {list(shape)} torch.float32"
                )
            found[piece.key] = scale
    return found


class MetaStore(FileStore):
    """Files of Meta's, read and written; experts that are stored as fp8 are bfloat16 outside."""

    def __init__(self, config: ModelConfig, layout: dict, table: dict[Key, Stored], scales: dict[Key, Stored]):
        super().__init__(config, layout, table)
        self.scales = scales

    def dtype(self, name: str) -> torch.dtype:
        stored = super().dtype(name)
        return torch.bfloat16 if stored == FP8 else stored

    def read_piece(self, name: str, piece: Piece, first: int, last: int) -> Tensor:
        rows = super().read_piece(name, piece, first, last)
        if piece.key not in self.scales:
            return rows
        scale_eN = self.scales[piece.key].read(first, last)
        return dequantize_rows(rows.mT, scale_eN, self.dtype(name)).mT

    def write_piece(self, name: str, piece: Piece, first: int, rows: Tensor) -> None:
        if piece.key in self.scales:
            rows, scale_eN = quantize_rows(rows.mT)
            rows = rows.mT
            self.scales[piece.key].write(first, scale_eN)
        super().write_piece(name, piece, first, rows)


# ---------------------------------------------------------------------------------------------------------------- write


@dataclass(frozen=True)
class MetaFormat:
    """What `write_folder` needs to know of a folder of Meta's. shards: files; None: 8 as Meta's, or as many of 4, 2, 1
    as the model divides into (one rank has whole heads). fp8: routed experts but the first and last layer's."""

    hashed: ClassVar[bool] = False
    processor: Processor | None = field(repr=False)
    shards: int | None = None
    fp8: bool = False

    def plan(self, config: ModelConfig, dtypes: dict[str, torch.dtype], folder: Path) -> MetaStore:
        params_of(config)  # said before the weights are written, not after
        shards = most_shards(config) if self.shards is None else self.shards
        layout = pieces(config, shards)
        stored: list[dict] = [{} for _ in range(shards)]
        scaled: list[dict] = [{} for _ in range(shards)]
        for name, parts in layout.items():
            for piece in parts:
                rank, key = piece.key
                small = self.fp8 and ".experts." in name and 0 < int(name.split(".")[1]) < config.n_layers - 1
                stored[rank][key] = (FP8 if small else dtypes[name], piece.shape)
                if small:
                    scaled[rank][_scale_name(key)] = (torch.float32, (piece.view[0], piece.view[2]))
        table, scales = {}, {}
        for rank in range(shards):
            held = plan_pth(folder / f"consolidated.{rank:02d}.pth", stored[rank])
            table |= {(rank, key): place for key, place in held.items()}
            if scaled[rank]:
                held = plan_pth(folder / f"fp8_scales_{rank}.pt", scaled[rank])
                small = [key for key, (kind, _) in stored[rank].items() if kind == FP8]
                scales |= {(rank, key): held[_scale_name(key)] for key in small}
        return MetaStore(config, layout, table, scales)

    def finish(self, config: ModelConfig, dtypes: dict[str, torch.dtype], hashes: dict[str, str], folder: Path) -> None:
        if self.processor is not None:
            self.processor.save(folder)
            if ranks := self.processor.tokenizer.to_ranks():  # Meta's code knows the full layout alone
                (folder / RANKS).write_text(ranks, encoding="ascii")
        (folder / PARAMS).write_text(json.dumps(params_of(config), indent=2) + "\n", encoding="utf-8")
