"""config.json of Hugging Face's Llama 4 <-> `ModelConfig`.

transformers writes only what differs from its defaults, so a missing key means *its* default, and those are not Scout's
(its vision tower defaults to 448-pixel tiles of width 768).  The defaults below are therefore part of the format
(transformers 4.51 to 5.23).

Two names for many things: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (older); `moe_layers` or
`interleave_moe_layer_step`; `no_rope_layers`, where 1 means *with* RoPE; `intermediate_size` is one expert's width and
`intermediate_size_mlp` a dense layer's.  What puna can't compute is refused by name, never ignored.
Sources: llama4-facts.md §5.2, serving-and-evaluation.md C.1.
"""

from __future__ import annotations

import warnings
from typing import Any

from puna.errors import PunaError
from puna.model.config import ModelConfig, RopeScaling, VisionConfig

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_experts_per_tok": 1,
    "num_local_experts": 16, "moe_layers": None, "interleave_moe_layer_step": 1, "use_qk_norm": True,
    "rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": None, "no_rope_layers": None,
    "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "layer_types": None, "attn_temperature_tuning": True,
    "floor_scale": 8192, "attn_scale": 0.1, "attention_bias": False,
}  # fmt: skip
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768, "hidden_act": "gelu", "num_hidden_layers": 34, "num_attention_heads": 16, "num_channels": 3,
    "intermediate_size": 5632, "vision_output_dim": 7680, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 0.5, "projector_input_dim": 4096, "projector_output_dim": 4096,
    "multi_modal_projector_bias": False, "rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None,
    "vision_feature_select_strategy": "default",
}  # fmt: skip


def is_multimodal(raw: dict) -> bool:
    """True for Llama4ForConditionalGeneration, False for Llama4ForCausalLM; PunaError for anything else."""
    kind = raw.get("model_type")
    if kind == "llama4":
        return True
    if kind == "llama4_text":
        return False
    raise PunaError(f"config.json: model_type {kind!r} is not Llama 4; puna reads 'llama4' and 'llama4_text'")


def config_from_hf(raw: dict) -> ModelConfig:
    """The ModelConfig of a config.json.  Errors: PunaError naming the key that is missing, contradictory or
    unsupported."""
    if raw.get("quantization_config"):
        raise PunaError("config.json: quantization_config is not supported; take the bfloat16 release of the model")
    multimodal = is_multimodal(raw)
    given = raw.get("text_config") or {} if multimodal else raw
    text = TEXT_DEFAULTS | given
    for key, needed in (("hidden_act", "silu"), ("num_experts_per_tok", 1), ("attention_bias", False)):
        if text[key] != needed:
            raise PunaError(f"config.json: {key} = {text[key]!r} is not supported; Llama 4 has {needed!r}")
    n_layers = text["num_hidden_layers"]
    theta, scaling = _rope(text)
    try:
        return ModelConfig(
            vocab_size=text["vocab_size"],
            d_model=text["hidden_size"],
            n_layers=n_layers,
            n_heads=text["num_attention_heads"],
            n_kv_heads=text["num_key_value_heads"] or text["num_attention_heads"],
            head_dim=text["head_dim"] or text["hidden_size"] // text["num_attention_heads"],
            expert_width=text["intermediate_size"],
            dense_width=text["intermediate_size_mlp"],
            n_experts=text["num_local_experts"],
            moe_layers=_moe_layers(text, n_layers),
            moe_step=max(1, text["interleave_moe_layer_step"]),
            nope_layers=_nope_layers(text, n_layers),
            chunk=_chunk(text),
            qk_norm=bool(text["use_qk_norm"]),
            rope_theta=theta,
            rope_scaling=scaling,
            temperature_tuning=bool(text["attn_temperature_tuning"]),  # the integer 4 in the first release
            floor_scale=int(text["floor_scale"]),
            attn_scale=float(text["attn_scale"]),
            norm_eps=float(text["rms_norm_eps"]),
            tie_embeddings=bool(given.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
            max_context=text["max_position_embeddings"],
            patch_token=raw.get("image_token_index", raw.get("image_token_id", 200092)) if multimodal else None,
            vision=_vision(raw.get("vision_config") or {}) if multimodal else None,
        )
    except TypeError as error:
        raise PunaError(f"config.json holds a value of the wrong type ({error})") from None


def _rope(text: dict) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from `rope_parameters` or the two older keys."""
    rope = dict(text["rope_parameters"] or text["rope_scaling"] or {})
    theta = float(rope.get("rope_theta") or text["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PunaError("config.json: partial_rotary_factor is not supported; Llama 4 rotates whole heads")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise PunaError(f"config.json: rope_type {kind!r} is not supported; Llama 4 uses 'default' or 'llama3'")
    try:
        return theta, RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise PunaError(f"config.json: rope scaling lacks {error}; give all of its four numbers") from None


def _moe_layers(text: dict, n_layers: int) -> tuple[int, ...]:
    if text["moe_layers"] is not None:
        return tuple(i for i in text["moe_layers"] if i < n_layers)
    step = text["interleave_moe_layer_step"]
    if step < 1:
        raise PunaError(f"config.json: interleave_moe_layer_step = {step}; it must be >= 1 (or give moe_layers)")
    return tuple(range(step - 1, n_layers, step))


def _nope_layers(text: dict, n_layers: int) -> tuple[int, ...]:
    """Layers with 0 in `no_rope_layers`; transformers reads the *mask* from `layer_types`, so the two must agree."""
    interval = text["no_rope_layer_interval"]
    flags = text["no_rope_layers"] or [int((i + 1) % interval != 0) for i in range(n_layers)]
    if len(flags) < n_layers:
        raise PunaError(f"config.json: no_rope_layers has {len(flags)} entries for {n_layers} layers")
    for i, kind in enumerate((text["layer_types"] or [])[:n_layers]):
        if kind != ("chunked_attention" if flags[i] else "full_attention"):
            raise PunaError(f"config.json: layer_types[{i}] = {kind!r} contradicts no_rope_layers[{i}] = {flags[i]}")
    return tuple(i for i in range(n_layers) if not flags[i])


def _chunk(text: dict) -> int:
    if text["attention_chunk_size"] is None:
        raise PunaError(
            "config.json: attention_chunk_size is null; Llama 4's RoPE layers need one (8192 in Meta's models)"
        )
    return text["attention_chunk_size"]


def _vision(raw: dict) -> VisionConfig:
    vision = VISION_DEFAULTS | raw
    width, ratio = vision["hidden_size"], vision["pixel_shuffle_ratio"]
    adapter = vision["vision_output_dim"]
    needed = {
        "hidden_act": "gelu", "num_channels": 3, "multi_modal_projector_bias": False, "norm_eps": 1e-5,
        "vision_feature_select_strategy": "default", "projector_input_dim": adapter, "projector_output_dim": adapter,
        "intermediate_size": width * round(1 / ratio) ** 2,  # one number for the layers' MLP and the adapter's input
    }  # fmt: skip
    for key, value in needed.items():
        if vision[key] != value:
            raise PunaError(
                f"config.json: vision_config.{key} = {vision[key]!r} is not supported here; it must be {value!r}"
            )
    theta, scaling = _rope(vision)
    if scaling is not None:
        raise PunaError("config.json: vision_config.rope_parameters must be of type 'default'")
    return VisionConfig(
        image_size=_side(vision["image_size"]),
        patch_size=_side(vision["patch_size"]),
        width=width,
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=vision["intermediate_size"],
        adapter_width=adapter,
        norm_eps=vision["norm_eps"],
        rope_theta=theta,
        pixel_shuffle=ratio,
    )


def _side(value: int | list[int]) -> int:
    """336 or [336, 336] -> 336."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise PunaError(f"config.json: {value} is no square; Llama 4's tiles and patches are")
    return sides.pop()


# --------------------------------------------------------------------------------------------------------------- export


def config_to_hf(config: ModelConfig, dtype: str, ids: dict[str, Any]) -> dict:
    """config.json for transformers >= 4.51, vLLM and mlx-lm: every key spelled out, old and new names both.

    ids: bos_token_id, eos_token_id, pad_token_id, boi_token_index, eoi_token_index where a tokenizer is known, else
    empty.
    Errors: PunaError for what the format can't say.
    """
    tokens = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = _text_to_hf(config, dtype) | tokens
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"} | text
    if config.patch_token is None:
        raise PunaError("the model has a vision tower but no patch_token: set it from the processor before export")
    image = {key: ids[key] for key in ("boi_token_index", "eoi_token_index") if key in ids}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype": dtype,
        "torch_dtype": dtype,
        "image_token_index": config.patch_token,
        "tie_word_embeddings": config.tie_embeddings,
        "text_config": {"model_type": "llama4_text"} | text,
        "vision_config": _vision_to_hf(config.vision),
        **image,
        **tokens,
    }


def _text_to_hf(config: ModelConfig, dtype: str) -> dict:
    n = config.n_layers
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (s := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3", "rope_theta": config.rope_theta,
            "factor": s.factor, "low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_context,
        }  # fmt: skip
    return {
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.expert_width,
        "intermediate_size_mlp": config.dense_width,
        "num_hidden_layers": n,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": _moe_step(config),
        "moe_layers": list(config.moe_layers),
        "no_rope_layers": [int(not config.is_nope(i)) for i in range(n)],
        "no_rope_layer_interval": 4,
        "layer_types": ["full_attention" if config.is_nope(i) else "chunked_attention" for i in range(n)],
        "attention_chunk_size": config.chunk,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature_tuning,
        "floor_scale": int(config.floor_scale),  # transformers 5 refuses a float
        "attn_scale": config.attn_scale,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if config.rope_scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _moe_step(config: ModelConfig) -> int:
    """The step that says the same as `moe_layers`: transformers reads the list, vLLM the step (0: no MoE layer)."""
    layers = tuple(config.moe_layers)
    if not layers:
        return 0
    for step in range(1, config.n_layers + 1):
        if layers == tuple(range(step - 1, config.n_layers, step)):
            return step
    warnings.warn(
        f"MoE layers {layers} are no regular step: transformers loads this export, vLLM reads it wrongly", stacklevel=4
    )
    return 1


def _vision_to_hf(vision: VisionConfig) -> dict:
    if vision.mlp_width != vision.width * vision.shuffle**2:
        raise PunaError(
            f"vision.mlp_width {vision.mlp_width} can't be exported: the format needs width x {vision.shuffle**2}"
        )
    if vision.norm_eps != 1e-5:
        raise PunaError(f"vision.norm_eps {vision.norm_eps} can't be exported: transformers always uses 1e-5")
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.width,
        "hidden_act": "gelu",
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "intermediate_size": vision.mlp_width,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "norm_eps": vision.norm_eps,
        "pixel_shuffle_ratio": vision.pixel_shuffle,
        "projector_input_dim": vision.adapter_width,
        "projector_output_dim": vision.adapter_width,
        "vision_output_dim": vision.adapter_width,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -1,
        "multi_modal_projector_bias": False,
        "projector_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "rope_theta": vision.rope_theta,
    }
