"""Against the other implementation: transformers' Llama 4, loaded from what we export, and loading what it saves.

Its known defects stay out of the way: no left-padded batches (temperature from the cache's length), eager attention, no
image processor (needs torchvision).  serving-and-evaluation.md, finding 5 and C.6.
"""

import copy
import dataclasses
import json
import random

import pytest
import torch
from parity_helpers import (
    CHANGED,
    CHUNK,
    MAVERICK,
    PATCH,
    SCOUT,
    SHAPES,
    TEXT_ONLY,
    assert_same,
    distance,
    strong_model,
    text,
    with_pictures,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import puna
from puna.convert import export_hf, load_hf
from puna.errors import PunaError
from puna.model import VisionConfig
from puna.model.moe import record_routes

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
Text, Multimodal = transformers.Llama4ForCausalLM, transformers.Llama4ForConditionalGeneration


def from_transformers(folder):
    """The folder as transformers reads it; nothing may be missing, extra or newly initialised."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    cls = Multimodal if kind == "llama4" else Text
    model, info = cls.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def hf_logits(model, tokens, tiles=None):
    """Logits of transformers' model without a cache."""
    pictures = {} if tiles is None else {"pixel_values": tiles}
    return model(input_ids=tokens, use_cache=False, **pictures).logits


def edit(folder, **changes):
    """Changes keys of text_config in a folder's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config).update(changes)
    path.write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_export_is_what_transformers_loads(tmp_path, name, tie):
    model = strong_model(dataclasses.replace(SHAPES[name], tie_embeddings=tie))
    folder = export_hf(model, None, tmp_path / "hf")
    other = from_transformers(folder)
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    with torch.no_grad(), record_routes(model) as routes:
        logits = model(tokens, tiles)
    assert_same(logits, hf_logits(other, tokens, tiles))
    again, processor = load_hf(folder)
    assert processor is None and torch.equal(again(tokens, tiles), logits)
    assert dataclasses.replace(again.config, moe_step=model.config.moe_step) == model.config
    with torch.no_grad():
        features = other.multi_modal_projector(other.vision_model(tiles).last_hidden_state)
        assert_same(model.image_features(tiles), features, "features")
        chosen = []
        hooks = [m.register_forward_hook(lambda m, i, o: chosen.append(o[1].argmax(-1))) for m in other.modules()
                 if type(m).__name__ == "Llama4Router"]  # fmt: skip
        hf_logits(other, tokens, tiles)
    assert len(hooks) == len(routes) == len(model.config.moe_layers)
    assert all(torch.equal(a.flatten(), b) for a, b in zip(routes, chosen, strict=True))


@pytest.mark.parametrize("T", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
@pytest.mark.parametrize("name", SHAPES)
def test_text_models_at_chunk_borders(tmp_path_factory, name, T, cache={}):  # noqa: B006
    if name not in cache:
        model = strong_model(TEXT_ONLY[name])
        cache[name] = model, from_transformers(export_hf(model, None, tmp_path_factory.mktemp(name) / "hf"))
    model, other = cache[name]
    tokens = text(model.config, T)
    assert_same(model(tokens), hf_logits(other, tokens))


SWITCHED_OFF = {
    "chunk": {"attention_chunk_size": 4096},
    "nope": {"no_rope_layers": [1] * 5, "layer_types": ["chunked_attention"] * 5},
    "nope index": {"no_rope_layers": [0, 1, 1, 1, 0], "layer_types": None},
    "QK-norm": {"use_qk_norm": False},
    "temperature": {"attn_temperature_tuning": False},
    "temperature floor": {"floor_scale": 8192},
    "RoPE scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_scaling": None},
    "RoPE theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None},
}  # fmt: skip


def test_switching_a_key_off_changes_both_alike(tmp_path):
    """Each key of config.json matters, and means the same here and there."""
    model = strong_model(TEXT_ONLY["scout"])
    folder = export_hf(model, None, tmp_path / "hf")
    original = (folder / "config.json").read_text()
    tokens = text(model.config, 3 * CHUNK)
    logits = model(tokens)
    for name, changes in SWITCHED_OFF.items():
        (folder / "config.json").write_text(original)
        edit(folder, **changes)
        theirs = hf_logits(from_transformers(folder), tokens)
        assert distance(theirs, logits) > CHANGED, name
        assert_same(load_hf(folder)[0](tokens), theirs)


def test_files_of_an_export(tmp_path, tiny_processor):
    """serving-and-evaluation.md C.1-C.4, the traps in particular."""
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(MAVERICK, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    model = strong_model(config)
    folder = export_hf(model, tiny_processor, tmp_path / "hf", shard_bytes=100_000)
    expected = [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert sorted(p.name for p in folder.iterdir()) == sorted(expected + shards) and len(shards) > 3
    assert list(tmp_path.iterdir()) == [folder]  # no temporary folder stays
    read = {name: json.loads((folder / name).read_text()) for name in expected if name.endswith(".json")}

    top, given = read["config.json"], read["config.json"]["text_config"]
    assert top["architectures"] == ["Llama4ForConditionalGeneration"] and top["image_token_index"] == tokenizer.patch
    assert (top["boi_token_index"], top["eoi_token_index"]) == (tokenizer.image_start, tokenizer.image_end)
    assert top["dtype"] == top["torch_dtype"] == "float32"
    assert type(given["floor_scale"]) is int
    assert (given["moe_layers"], given["interleave_moe_layer_step"]) == ([1, 3, 5], 2)
    assert given["no_rope_layers"] == [1, 1, 1, 0, 1, 1]
    assert given["layer_types"] == ["chunked_attention"] * 3 + ["full_attention"] + ["chunked_attention"] * 2
    assert (given["intermediate_size"], given["intermediate_size_mlp"]) == (config.expert_width, config.dense_width)
    assert given["rope_parameters"]["rope_theta"] == given["rope_theta"] == 500000.0

    generation = read["generation_config.json"]
    assert generation["attn_temperature_tuning"] is True  # vLLM reads it here and nowhere else
    assert (generation["temperature"], generation["top_p"], generation["do_sample"]) == (0.6, 0.9, True)
    assert set(generation["eos_token_id"]) == {tokenizer.eot, tokenizer.eom, tokenizer.end_of_text}

    untuned = export_hf(strong_model(dataclasses.replace(config, temperature_tuning=False)), None, tmp_path / "untuned")
    off = json.loads((untuned / "generation_config.json").read_text())["attn_temperature_tuning"]
    assert off is False, "vLLM would switch it on past 32,768 tokens"

    index = read["model.safetensors.index.json"]
    stored = {name: file for file in shards for name in load_file(folder / file)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == 4 * model.parameter_count().total
    with safe_open(folder / stored["language_model.model.layers.1.feed_forward.experts.gate_up_proj"], "pt") as file:
        fused = file.get_tensor("language_model.model.layers.1.feed_forward.experts.gate_up_proj")
    assert fused.shape == (config.n_experts, config.d_model, 2 * config.expert_width)  # input-major, gate || up
    assert torch.equal(fused, model.layers[1].moe.experts.w13)

    image = read["processor_config.json"]["image_processor"]
    assert image["size"] == read["preprocessor_config.json"]["size"] == {"height": 16, "width": 16}
    assert image["max_patches"] == 4 and read["processor_config.json"]["patch_size"] == 4
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == generation["eos_token_id"]

    again, processor = puna.load(folder)
    assert processor.image == tiny_processor.image and processor.tokenizer.special == tokenizer.special
    tokens = torch.randint(0, 500, (1, 20))
    assert torch.equal(again(tokens), model(tokens))


def test_exported_tokenizer_and_template(tmp_path, tiny_processor):
    """transformers' tokenizer gives the ids we give, control tokens are single tokens, and its template is our chat
    format."""
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(TEXT_ONLY["scout"], vocab_size=tokenizer.vocab_size)
    folder = export_hf(strong_model(config), tiny_processor, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    sample = "Hello, größe! 12345\n\n  def f(x): ..."
    assert theirs.encode(sample, add_special_tokens=False) == tokenizer.encode(sample)
    assert theirs.convert_tokens_to_ids("<|patch|>") == tokenizer.patch
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eot,
        tokenizer.pad,
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tiny_processor.encode_chat(messages, generation_prompt=True).tokens.tolist()
    assert ids != theirs.apply_chat_template(messages, return_dict=False)
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b: größe", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, {"b": None}], "c": "it's <1>"}}}
    messages += [{"role": "assistant", "tool_calls": [call, call]}, {"role": "tool", "content": "2"}]
    for form in ("pythonic", "json", "function"):
        ids = theirs.apply_chat_template(
            messages, tools=tools, tool_form=form, add_generation_prompt=True, return_dict=False
        )
        assert ids == tiny_processor.encode_chat(messages, True, tools, form).tokens.tolist()


def test_export_refuses(tmp_path, tiny_processor):
    model = strong_model(SCOUT)
    with pytest.raises(PunaError, match="not a pair"):
        export_hf(model, tiny_processor, tmp_path / "a")  # tokenizer of another model
    occupied = tmp_path / "b"
    occupied.mkdir()
    (occupied / "file").write_text("mine")
    with pytest.raises(PunaError, match="exists"):
        export_hf(model, None, occupied)
    wide = strong_model(dataclasses.replace(SCOUT, vision=dataclasses.replace(SCOUT.vision, mlp_width=64)))
    with pytest.raises(PunaError, match="mlp_width"):
        export_hf(wide, None, tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"] and (occupied / "file").read_text() == "mine"
    with pytest.warns(UserWarning, match="regular"):
        odd = export_hf(strong_model(dataclasses.replace(TEXT_ONLY["scout"], moe_layers=(0, 3))), None, tmp_path / "d")
    assert load_hf(odd)[0].config.moe_layers == (0, 3)


# ----------------------------------------------------------------------------------------------------------------- load


def random_folder(seed: int, folder):
    """A small random Llama 4, built, initialised and saved by transformers alone; returns its model."""
    draw = random.Random(seed)
    layers, experts, step = draw.randint(3, 12), draw.randint(2, 8), draw.randint(1, 3)
    heads, head_dim, multimodal = draw.choice([2, 4]), draw.choice([16, 32]), seed % 2 == 0
    given = dict(
        vocab_size=96, hidden_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=draw.choice([1, 2]), head_dim=head_dim, intermediate_size=draw.choice([32, 48]),
        intermediate_size_mlp=draw.choice([64, 80]), num_local_experts=experts, interleave_moe_layer_step=step,
        attention_chunk_size=draw.choice([32, 64, 96, 128]), use_qk_norm=draw.random() < 0.5,
        attn_temperature_tuning=draw.random() < 0.8, floor_scale=draw.choice([16, 50, 8192]),
        attn_scale=draw.choice([0.1, 0.2]), max_position_embeddings=2048, tie_word_embeddings=draw.random() < 0.25,
        rope_parameters={"rope_type": "default", "rope_theta": draw.choice([10000.0, 500000.0])}, pad_token_id=0,
        rms_norm_eps=draw.choice([1e-5, 1e-3]),
    )  # fmt: skip
    if draw.random() < 0.5:
        given["rope_parameters"] |= {
            "rope_type": "llama3", "factor": draw.choice([8.0, 16.0]), "low_freq_factor": 1.0,
            "high_freq_factor": draw.choice([1.0, 4.0]), "original_max_position_embeddings": draw.choice([32, 64]),
        }  # fmt: skip
    if draw.random() < 0.3:
        given["no_rope_layers"] = [draw.randint(0, 1) for _ in range(layers - 1)] + [1]  # all zero would mean "default"
    if draw.random() < 0.3:
        given["moe_layers"] = sorted(draw.sample(range(layers), draw.randint(1, layers)))
    text_config = transformers.Llama4TextConfig(**given)
    torch.manual_seed(seed)
    if multimodal:
        vision = transformers.Llama4VisionConfig(
            hidden_size=32, num_hidden_layers=draw.randint(1, 3), num_attention_heads=draw.choice([2, 4]),
            intermediate_size=128, image_size=16, patch_size=4, projector_input_dim=40, projector_output_dim=40,
            vision_output_dim=40, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config = transformers.Llama4Config(
            text_config=text_config, vision_config=vision, image_token_index=PATCH,
            tie_word_embeddings=given["tie_word_embeddings"],
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = Multimodal(config)
    else:
        text_config._attn_implementation = "eager"
        model = Text(text_config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan_in = p.shape[1] if p.ndim > 1 else 4
            spread = 0.3 if "embed" in name else fan_in**-0.5
            p.copy_(torch.randn_like(p) * spread + (1 if "norm" in name and name.endswith("weight") else 0))
    model.eval().save_pretrained(folder, max_shard_size=draw.choice(["200KB", "5GB"]))
    return model


@pytest.mark.parametrize("seed", range(24))
def test_random_folders_load_with_equal_logits(tmp_path, seed):
    other = random_folder(seed, tmp_path / "hf")
    model, processor = puna.load(tmp_path / "hf")
    assert processor is None and not model.training and next(model.parameters()).dtype == torch.float32
    T = model.config.chunk + 37 if model.config.chunk > 64 else 2 * model.config.chunk + 5
    if model.config.vision is None:
        tokens, tiles = text(model.config, T), None
    else:
        tokens, tiles = with_pictures(model.config, T)
    assert_same(model(tokens, tiles), hf_logits(other, tokens, tiles))


def test_the_random_folders_cover_the_range(tmp_path):
    """A claim about the draw above: every kind of folder named in its docstring is in it."""
    configs = []
    for seed in range(24):
        random_folder(seed, tmp_path / str(seed))
        configs.append(puna.load(tmp_path / str(seed))[0].config)
    assert {c.qk_norm for c in configs} == {c.tie_embeddings for c in configs} == {True, False}
    assert {c.rope_scaling is None for c in configs} == {c.vision is None for c in configs} == {True, False}
    assert {c.moe_step for c in configs} == {1, 2, 3} and {c.chunk for c in configs} == {32, 64, 96, 128}
    assert min(c.n_layers for c in configs) <= 4 and max(c.n_layers for c in configs) >= 11
    assert len({c.n_experts for c in configs}) >= 5
    assert any(c.nope_layers != tuple(range(3, c.n_layers, 4)) for c in configs)
    assert any(c.moe_layers != tuple(range(c.moe_step - 1, c.n_layers, c.moe_step)) for c in configs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, an export of it to copy from)."""
    model = strong_model(SCOUT)
    return model, export_hf(model, None, tmp_path_factory.mktemp("exported") / "hf", shard_bytes=200_000)


@pytest.fixture
def folder(exported, tmp_path):
    import shutil

    return shutil.copytree(exported[1], tmp_path / "copy")


def test_old_names_of_the_same_things(exported, folder):
    """rope_theta and rope_scaling without rope_parameters, `type` for `rope_type`, no layer_types, steps for lists, the
    integer 4 for true: what folders of 2025 hold."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    given = raw["text_config"]
    for key in ("rope_parameters", "layer_types", "moe_layers", "no_rope_layers"):
        del given[key]
    given["rope_scaling"]["type"] = given["rope_scaling"].pop("rope_type")
    given["attn_temperature_tuning"] = 4
    path.write_text(json.dumps(raw))
    model, _ = load_hf(folder)
    assert model.config == exported[0].config
    assert dataclasses.replace(model.config, rope_scaling=None) != exported[0].config


def test_dtype_and_device(folder):
    assert next(load_hf(folder, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16
    edit(folder, dtype="bfloat16", torch_dtype="bfloat16")
    raw = json.loads((folder / "config.json").read_text())
    raw["dtype"] = raw["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(raw))
    assert next(load_hf(folder, device="cpu")[0].parameters()).dtype == torch.bfloat16


def test_tensors_are_copied_in_slices(exported, monkeypatch):
    """Tensors larger than a slice arrive whole (here every tensor is cut into rows)."""
    from puna.convert import layout

    monkeypatch.setattr(layout, "SLICE_BYTES", 600)
    loaded = dict(load_hf(exported[1])[0].named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in exported[0].named_parameters())


NAME = "language_model.model.layers.2.self_attn.k_proj.weight"


def rewrite(folder, change):
    """Applies `change` to the tensors of the shard that holds NAME."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][NAME]
    tensors = load_file(file)
    change(tensors, index["weight_map"])
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_missing_extra_misshapen_and_corrupt(folder):
    def fails(match):
        with pytest.raises(PunaError, match=match) as caught:
            puna.load(folder)
        assert "\n" not in str(caught.value)

    good = {p.name: p.read_bytes() for p in folder.iterdir()}

    def restore():
        for name, data in good.items():
            (folder / name).write_bytes(data)

    puna.load(folder)

    def drop(tensors, where):
        del tensors[NAME], where[NAME]

    def add(tensors, where):
        tensors["language_model.model.layers.9.bogus"] = torch.zeros(2)
        where["language_model.model.layers.9.bogus"] = where[NAME]

    def bend(tensors, where):
        tensors[NAME] = tensors[NAME][1:].clone()

    def quantise(tensors, where):
        tensors[NAME] = tensors[NAME].to(torch.int8)

    def forget(tensors, where):
        del tensors[NAME]

    for change, match in (
        (drop, "lacks tensor .*layers.2.self_attn.k_proj"), (add, "layers.9.bogus"), (bend, "k_proj.weight has shape"),
        (quantise, "k_proj.weight is stored as I8"), (forget, "k_proj"),
    ):  # fmt: skip
        rewrite(folder, change)
        fails(match)
        restore()
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(good[shard.name][: len(good[shard.name]) // 2])
    fails("truncated")
    shard.unlink()
    fails("missing")
    restore()
    (folder / "config.json").write_text("{")
    fails("config.json")
    restore()
    index = json.loads(good["model.safetensors.index.json"])
    index["weight_map"][NAME] = "../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("outside")
    restore()
    edit(folder, n_experts=9, num_local_experts=9)
    fails("shape")


UNSUPPORTED = {
    "hidden_act": "gelu", "num_experts_per_tok": 2, "attention_bias": True, "attention_chunk_size": None,
    "layer_types": ["full_attention"] * 5, "no_rope_layers": [1, 1], "num_attention_heads": 3, "vocab_size": "many",
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_configuration_is_named(folder, key):
    load_hf(folder)
    edit(folder, **{key: UNSUPPORTED[key]})
    other = {"rope_parameters": "rope_type", "num_attention_heads": "n_heads", "vocab_size": "wrong type"}
    with pytest.raises(PunaError, match=other.get(key, key)):
        load_hf(folder)


def test_other_refusals(folder):
    raw = json.loads((folder / "config.json").read_text())
    for changes, match in (
        ({"model_type": "mllama"}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"vision_config": raw["vision_config"] | {"projector_output_dim": 7}}, "projector_output_dim"),
        ({"vision_config": raw["vision_config"] | {"norm_eps": 1e-6}}, "norm_eps"),
        ({"vision_config": raw["vision_config"] | {"image_size": [16, 32]}}, "square"),
    ):
        (folder / "config.json").write_text(json.dumps(copy.deepcopy(raw) | changes))
        with pytest.raises(PunaError, match=match):
            load_hf(folder)


def test_a_tied_folder_with_a_head_of_its_own(tmp_path):
    model = strong_model(dataclasses.replace(TEXT_ONLY["scout"]))
    folder = export_hf(model, None, tmp_path / "hf")
    edit(folder, tie_word_embeddings=True)
    with pytest.raises(PunaError, match="lm_head.weight differs"):
        load_hf(folder)
    with torch.no_grad():
        model.output.weight.copy_(model.tok_embeddings.weight)
    folder = export_hf(model, None, tmp_path / "same")
    edit(folder, tie_word_embeddings=True)
    tied, _ = load_hf(folder)
    assert "output.weight" not in dict(tied.named_parameters())
    tokens = text(model.config, 9)
    assert torch.equal(tied(tokens), model(tokens))


def test_tile_size_and_patch_id_must_agree(tmp_path, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    folder = export_hf(strong_model(config), tiny_processor, tmp_path / "hf")
    assert puna.load(folder)[1].image.tile == 16
    good = (folder / "processor_config.json").read_text()
    (folder / "processor_config.json").write_text(good.replace('"height": 16', '"height": 32'))
    with pytest.raises(PunaError, match="size"):
        puna.load(folder)
    (folder / "processor_config.json").unlink()  # preprocessor_config.json alone: what transformers 4 wrote
    assert puna.load(folder)[1].image == tiny_processor.image
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"image_token_index": tokenizer.patch - 1}))
    with pytest.raises(PunaError, match="image_token_index"):
        puna.load(folder)


def test_defaults_are_those_of_transformers():
    """A missing key means transformers' default."""
    from puna.convert.hf_config import TEXT_DEFAULTS, VISION_DEFAULTS, config_from_hf

    for defaults, cls in (
        (TEXT_DEFAULTS, transformers.Llama4TextConfig),
        (VISION_DEFAULTS, transformers.Llama4VisionConfig),
    ):
        fields = {f.name: f.default for f in dataclasses.fields(cls)}
        for key, value in defaults.items():
            assert key not in fields or fields[key] == value, key
    with pytest.raises(PunaError, match="vision_config"):  # its vision defaults describe no released model
        config_from_hf({"model_type": "llama4"})
    assert config_from_hf({"model_type": "llama4_text"}).n_layers == 48
    assert VisionConfig() != VisionConfig(image_size=448)
