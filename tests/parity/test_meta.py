"""Meta's folders against a literal account of them: each rank's tensors cut by hand as llama4-facts.md §5.1 says."""

import dataclasses
import io
import json
import os

import pytest
import torch
from dying import convert
from parity_helpers import MAVERICK, SCOUT, SHAPES, TEXT_ONLY, strong_model, text, with_pictures
from safetensors.torch import load_file

import puna
from puna.convert import export_hf, layout
from puna.convert.folder import write_folder
from puna.convert.huggingface import HuggingFaceFormat
from puna.convert.layout import ModelStore
from puna.convert.load import identity, open_model
from puna.convert.meta import MetaFormat, most_shards, params_of
from puna.convert.puna import CheckpointFormat, save
from puna.errors import PunaError


def values(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a, b):
    a, b = values(a), values(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def literal(model, ranks):
    """One dictionary a rank: what Meta's `consolidated.NN.pth` of this model hold. Written from the table, not from
    puna's code: Linear matrices are [out, in], w13 is gate over up, experts are [E, in, out]."""
    p, c, files = values(model), model.config, [{} for _ in range(ranks)]
    hd = c.head_dim

    def put(name, parts):
        for file, part in zip(files, parts, strict=True):
            file[name] = part.contiguous().clone()

    def everywhere(name, tensor):
        put(name, [tensor] * ranks)

    def cut(name, tensor, dim):
        put(name, tensor.chunk(ranks, dim))

    cut("tok_embeddings.weight", p["tok_embeddings.weight"], 0)
    cut("output.weight", p["output.weight"], 0)
    everywhere("norm.weight", p["norm.weight"])
    everywhere("rope.freqs", torch.ones(3))
    for i in range(c.n_layers):
        ours, meta = f"layers.{i}.", f"layers.{i}."
        q, k, v = p[ours + "attention.wqkv.weight"].split([c.n_heads * hd, c.n_kv_heads * hd, c.n_kv_heads * hd])
        cuts = zip(q.chunk(ranks), k.chunk(ranks), v.chunk(ranks), strict=True)
        put(meta + "attention.wqkv.weight", [torch.cat(parts) for parts in cuts])
        everywhere(meta + "attention.wqkv.layer_norm_weight", p[ours + "attention_norm.weight"])
        cut(meta + "attention.wo.weight", p[ours + "attention.wo.weight"], 1)
        ffn = meta + "feed_forward."
        for file in files:
            file[meta + "attention.wo._extra_state"] = io.BytesIO(b"engine")
        if i not in c.moe_layers:
            everywhere(ffn + "mlp.layer_norm_weight", p[ours + "ffn_norm.weight"])
            gate, up = p[ours + "feed_forward.w13.weight"].chunk(2)
            put(ffn + "mlp.fc1_weight",
                [torch.cat(parts) for parts in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)])  # fmt: skip
            cut(ffn + "mlp.fc2_weight", p[ours + "feed_forward.w2.weight"], 1)
            continue
        everywhere(ffn + "norm.weight", p[ours + "ffn_norm.weight"])
        everywhere(ffn + "router_DE", p[ours + "moe.router.weight"].T)
        gate, up = p[ours + "moe.shared.w13.weight"].chunk(2)
        cut(ffn + "w_in_shared_FD.weight", gate, 0)
        cut(ffn + "w_swiglu_FD.weight", up, 0)
        cut(ffn + "w_out_shared_DF.weight", p[ours + "moe.shared.w2.weight"], 1)
        gate, up = p[ours + "moe.experts.w13"].chunk(2, 2)
        put(ffn + "experts.moe_w_in_eD_F", [x.reshape(-1, x.shape[2]) for x in gate.chunk(ranks, 2)])
        put(ffn + "experts.moe_w_swiglu_eD_F", [x.reshape(-1, x.shape[2]) for x in up.chunk(ranks, 2)])
        put(ffn + "experts.moe_w_out_eF_D",
            [x.reshape(-1, x.shape[2]) for x in p[ours + "moe.experts.w2"].chunk(ranks, 1)])  # fmt: skip
        everywhere(ffn + "running_gate_stats_3E", torch.ones(3, c.n_experts))
    if c.vision is None:
        return files
    encoder = "vision_embeddings.vision_encoder."
    cut(encoder + "conv1._linear.weight", p["vision.patch_embedding.weight"], 0)
    everywhere(encoder + "class_embedding", p["vision.class_embedding"])
    everywhere(encoder + "positional_embedding_vlm", p["vision.positional_embedding"])
    for kind in ("weight", "bias"):
        everywhere(f"{encoder}ln_pre.{kind}", p[f"vision.norm_pre.{kind}"])
        everywhere(f"{encoder}ln_post.{kind}", p[f"vision.norm_post.{kind}"])
    for i in range(c.vision.layers):
        ours, block = f"vision.layers.{i}.", f"{encoder}transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for x in "qkv":
                cut(f"{block}attn.w{x}.{kind}", p[f"{ours}attention.w{x}.{kind}"], 0)
            cut(f"{block}mlp.c_fc.{kind}", p[f"{ours}mlp.fc1.{kind}"], 0)
            everywhere(f"{block}ln_1.{kind}", p[f"{ours}norm1.{kind}"])
            everywhere(f"{block}ln_2.{kind}", p[f"{ours}norm2.{kind}"])
        cut(f"{block}attn.wo.weight", p[f"{ours}attention.wo.weight"], 1)
        cut(f"{block}mlp.c_proj.weight", p[f"{ours}mlp.fc2.weight"], 1)
        everywhere(f"{block}attn.wo.bias", p[f"{ours}attention.wo.bias"])
        everywhere(f"{block}mlp.c_proj.bias", p[f"{ours}mlp.fc2.bias"])
    cut("vision_embeddings.vision_adapter.mlp.c_fc.weight", p["vision.adapter.fc1.weight"], 0)
    cut("vision_embeddings.vision_adapter.mlp.c_proj.weight", p["vision.adapter.fc2.weight"], 1)
    cut("vision_projection.weight", p["vision.projector.weight"], 0)
    return files


def as_meta(config):
    """Shapes that Meta's format can say: regular layers, heads as wide as the model, scaling from 8192."""
    scaling = config.rope_scaling and dataclasses.replace(config.rope_scaling, original_context=8192)
    heads = dict(n_heads=4, n_kv_heads=2, head_dim=config.d_model // 4)
    return dataclasses.replace(config, rope_scaling=scaling, **heads)


CONFIGS = {name: as_meta(config) for name, config in SHAPES.items()}
CONFIGS |= {f"{name} text": as_meta(config) for name, config in TEXT_ONLY.items()}
PUBLISHED = {"dim", "n_layers", "vocab_size", "vision_args", "moe_args"}


def write_literal(model, folder, ranks, params=None):
    folder.mkdir()
    for rank, tensors in enumerate(literal(model, ranks)):
        torch.save(tensors, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params or params_of(model.config)))
    return folder


def change(folder, edit, rank=1):
    path = folder / f"consolidated.{rank:02d}.pth"
    with torch.serialization.safe_globals([io.BytesIO]):
        tensors = torch.load(path, weights_only=False)
    edit(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", CONFIGS)
def test_meta_folders_load_with_equal_weights_and_logits(tmp_path, shape, ranks):
    model = strong_model(CONFIGS[shape])
    loaded, processor = puna.load(write_literal(model, tmp_path / "meta", ranks))
    assert processor is None and loaded.config == model.config and same(loaded, model)
    if model.config.vision is None:
        tokens, tiles = text(model.config, 70), None
    else:
        tokens, tiles = with_pictures(model.config, 70)
    assert torch.equal(loaded(tokens, tiles), model(tokens, tiles))


def test_a_plain_concatenation_would_be_wrong(tmp_path):
    """The two cuts that bite do bite: rows one file under the other give another model."""
    model = strong_model(CONFIGS["maverick text"])
    files = literal(model, 2)
    for name, ours in (
        ("layers.0.attention.wqkv.weight", "layers.0.attention.wqkv.weight"),
        ("layers.0.feed_forward.mlp.fc1_weight", "layers.0.feed_forward.w13.weight"),
        ("layers.1.feed_forward.experts.moe_w_out_eF_D", "layers.1.moe.experts.w2"),
    ):
        stacked = torch.cat([file[name] for file in files])
        assert not torch.equal(stacked.view_as(values(model)[ours]), values(model)[ours])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", ["scout", "maverick"])
def test_what_is_written_is_what_meta_would_have(tmp_path, shape, ranks):
    model = strong_model(CONFIGS[shape]).bfloat16()
    folder = write_folder(ModelStore(model), MetaFormat(None, ranks), tmp_path / "meta")
    for rank, expected in enumerate(literal(model, ranks)):
        written = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
        dropped = {name for name in expected if name.endswith(("_extra_state", "rope.freqs", "stats_3E"))}
        assert written.keys() == expected.keys() - dropped and dropped
        for name, tensor in written.items():
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name]), name
    assert json.loads((folder / "params.json").read_text()).keys() >= PUBLISHED


def test_round_trips_are_bit_exact(tmp_path):
    """Every direction: puna, Hugging Face, Meta with 2 and with 1 files, and back, in two number types."""
    for dtype in (torch.float32, torch.bfloat16):
        model = strong_model(CONFIGS["maverick"]).to(dtype)
        place = tmp_path / str(dtype)
        first = export_hf(model, None, place / "hf", shard_bytes=300_000)
        forms = {"meta2": MetaFormat(None, 2), "own": CheckpointFormat(None), "meta1": MetaFormat(None, 1)}
        last = first
        for name, form in forms.items():
            last = write_folder(open_model(last)[0], form, place / name)
            assert same(puna.load(last)[0], model), name
        again = export_hf(puna.load(last)[0], None, place / "again", shard_bytes=300_000)
        assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
        assert load_file(place / "own" / "model.safetensors").keys() == values(model).keys()


def test_another_number_type_on_the_way(tmp_path):
    model = strong_model(CONFIGS["scout"])
    for form in (MetaFormat(None, 2), CheckpointFormat(None), HuggingFaceFormat(None)):
        folder = write_folder(ModelStore(model), form, tmp_path / type(form).__name__, dtype=torch.bfloat16)
        loaded, _ = puna.load(folder)
        assert same(loaded, strong_model(CONFIGS["scout"]).bfloat16()) and not same(loaded, model)


def test_slices_of_a_few_rows(tmp_path, monkeypatch):
    """Tensors larger than a slice go through two threads in many parts, and arrive whole, their hashes too."""
    model = strong_model(CONFIGS["maverick"])
    source = write_folder(ModelStore(model), MetaFormat(None, 2), tmp_path / "meta")
    plain = write_folder(open_model(source)[0], CheckpointFormat(None), tmp_path / "plain")
    monkeypatch.setattr(layout, "SLICE_BYTES", 600)
    sliced = write_folder(open_model(source)[0], CheckpointFormat(None), tmp_path / "sliced")
    assert {p.name: p.read_bytes() for p in plain.iterdir()} == {p.name: p.read_bytes() for p in sliced.iterdir()}
    again = write_folder(open_model(sliced)[0], MetaFormat(None, 2), tmp_path / "again")
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}
    small = write_folder(open_model(sliced)[0], MetaFormat(None, 2, fp8=True), tmp_path / "small")
    monkeypatch.undo()
    whole = write_folder(open_model(sliced)[0], MetaFormat(None, 2, fp8=True), tmp_path / "whole")
    assert {p.name: p.read_bytes() for p in small.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_params_without_our_key_and_published_widths(tmp_path):
    """A params.json as Meta writes it: no `puna`, a vocabulary of -1, the widths' formula with 4.0, 1.2 and 2048."""
    model = strong_model(CONFIGS["scout"])
    params = params_of(model.config) | {"vocab_size": -1}
    del params["puna"]
    loaded, _ = puna.load(write_literal(model, tmp_path / "meta", 2, params))
    assert same(loaded, model) and loaded.config.patch_token == 200092
    for name, dense in (("scout", False), ("maverick", True)):
        published = params_of(puna.model.preset(name))
        assert (published["ffn_exp"], published["ffn_dim_multiplier"], published["multiple_of"]) == (4.0, 1.2, 2048)
        assert (published["moe_args"]["interleave_moe_layer_step"] == 2) == dense


def test_a_dense_single_file_without_chunks(tmp_path):
    """Llama Guard's shape: one file, no experts, every layer with RoPE over all positions."""
    config = dataclasses.replace(CONFIGS["scout"], n_experts=0, moe_layers=(), nope_layers=(), chunk=4096)
    model = strong_model(config)
    params = params_of(config) | {"attention_chunk_size": None}
    assert "moe_args" not in params and params["nope_layer_interval"] is None
    loaded, _ = puna.load(write_literal(model, tmp_path / "guard", 1, params))
    assert same(loaded, model) and loaded.config == config


DAMAGES = {
    "lacks tensor layers.1.attention.wo.weight": lambda t: t.pop("layers.1.attention.wo.weight"),
    "holds tensor layers.9.bogus": lambda t: t.update({"layers.9.bogus": torch.ones(2)}),
    "tensor output.weight has shape": lambda t: t.update({"output.weight": t["output.weight"][1:]}),
    "tensor norm.weight is stored as I8": lambda t: t.update({"norm.weight": t["norm.weight"].to(torch.int8)}),
    "are of different types": lambda t: t.update({"output.weight": t["output.weight"].half()}),
    "tensor norm.weight is not the same in all files": lambda t: t["norm.weight"].mul_(2),
    "only Meta's routed experts": lambda t: t.update({"output.weight": t["output.weight"].to(torch.float8_e4m3fn)}),
    "output.weight is not stored in one piece": lambda t: t.update({"output.weight": t["output.weight"].T}),
}


@pytest.mark.parametrize("match", DAMAGES)
def test_a_wrong_tensor_is_named(tmp_path, match):
    folder = write_literal(strong_model(CONFIGS["scout"]), tmp_path / "meta", 2)
    puna.load(folder)
    change(folder, DAMAGES[match])
    with pytest.raises(PunaError, match=match) as caught:
        puna.load(folder)
    assert "\n" not in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    model = strong_model(CONFIGS["scout"])

    def fails(match):
        with pytest.raises(PunaError, match=match) as caught:
            puna.load(folder)
        assert "\n" not in str(caught.value)

    folder = write_literal(model, tmp_path / "a", 2)
    second = folder / "consolidated.01.pth"
    good = second.read_bytes()
    second.write_bytes(good[: len(good) // 2])
    fails("consolidated.01.pth is corrupt or truncated")
    second.unlink()
    fails("has shape|output.weight")  # half of every matrix
    (folder / "consolidated.00.pth").rename(second)
    fails("needs consolidated.00.pth")
    second.rename(folder / "consolidated.00.pth")
    second.write_bytes(good)
    (folder / "int4_scales_0.pt").write_bytes(b"")
    fails("int4")
    (folder / "int4_scales_0.pt").unlink()
    torch.save(model, second)  # a pickle that would run code
    fails("consolidated.01.pth holds more than tensors")
    second.write_bytes(good)
    params = json.loads((folder / "params.json").read_text())
    for edit, match in (
        ({"n_layers": 6}, "lacks tensor .*layers.5"), ({"dim": "wide"}, "wrong type"),
        ({"lora_args": {"rank": 4}}, "lora"), ({"moe_args": params["moe_args"] | {"top_k": 2}}, "top_k"),
    ):  # fmt: skip
        (folder / "params.json").write_text(json.dumps(params | edit))
        fails(match)
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k != "n_heads"}))
    fails("lacks 'n_heads'")


@pytest.mark.parametrize(
    ("shape", "shards", "match"),
    [
        (CONFIGS["scout"], 3, "can't be divided among 3 files"),
        (SCOUT, 1, "n_heads x head_dim"),
        (dataclasses.replace(CONFIGS["scout"], nope_layers=(0, 3)), 1, "nope_layers"),
        (dataclasses.replace(CONFIGS["maverick"], moe_layers=(0, 3)), 1, "moe_layers"),
        (dataclasses.replace(CONFIGS["scout"], tie_embeddings=True), 1, "tie_embeddings"),
        (MAVERICK, 4, "can't be divided among 4 files"),
    ],
)
def test_what_metas_format_cannot_say(tmp_path, shape, shards, match):
    with pytest.raises(PunaError, match=match):
        write_folder(ModelStore(strong_model(shape)), MetaFormat(None, shards), tmp_path / "meta")
    assert list(tmp_path.iterdir()) == []


def test_as_many_files_as_the_model_divides_into(tmp_path):
    model = strong_model(MAVERICK)
    folder = write_folder(ModelStore(model), MetaFormat(None), tmp_path / "meta")
    assert len(list(folder.glob("consolidated.*.pth"))) == most_shards(MAVERICK) == 2
    assert same(puna.load(folder)[0], model)


def test_fp8_folders(tmp_path):
    model = strong_model(CONFIGS["scout text"]).bfloat16()
    folder = write_folder(ModelStore(model), MetaFormat(None, 2, fp8=True), tmp_path / "fp8")
    weights, wanted = torch.load(folder / "consolidated.01.pth", weights_only=True), literal(model, 2)[1]
    scales = torch.load(folder / "fp8_scales_1.pt", weights_only=True)
    c, small = model.config, {n for n, t in weights.items() if t.dtype == torch.float8_e4m3fn}
    assert small == {n for n in weights if ".experts." in n and n.split(".")[1] in ("1", "2", "3")}  # of 5 layers
    assert all(torch.equal(weights[n], wanted[n]) for n in weights.keys() - small)
    assert len(scales) == len(small)
    for stored, short, rows in (("moe_w_in_eD_F", "w1", c.d_model), ("moe_w_out_eF_D", "w2", c.expert_width // 2)):
        name = f"layers.2.feed_forward.experts.{stored}"
        q, w = weights[name].float().view(c.n_experts, rows, -1), wanted[name].float().view(c.n_experts, rows, -1)
        scale = scales[f"layers.2.feed_forward.experts.{short}"]
        assert scale.dtype == torch.float32 and scale.shape == (c.n_experts, q.shape[2])
        for e in range(c.n_experts):  # literally: a row of [out, in] at a time
            for out in range(q.shape[2]):
                assert scale[e, out] == w[e, :, out].abs().max() / 448
                expected = (w[e, :, out] / scale[e, out]).to(torch.float8_e4m3fn).float()
                assert torch.equal(q[e, :, out], expected)
    loaded, _ = puna.load(folder)
    a, b = values(loaded), values(model)
    for name in a:
        off = ((a[name] - b[name]).float().norm() / b[name].float().norm()).item()
        quantised = ".experts." in name and name.split(".")[1] in ("1", "2", "3")
        assert 0.005 < off < 0.04 if quantised else off == 0, (name, off)
        assert a[name].dtype == torch.bfloat16
    again = write_folder(open_model(folder)[0], MetaFormat(None, 2, fp8=True), tmp_path / "again")
    twice = torch.load(again / "consolidated.01.pth", weights_only=True)
    for name in small:  # bfloat16 between the two rounds a number the other way now and then
        assert (twice[name].float() == weights[name].float()).float().mean() > 0.97
    scale = scales.pop("layers.2.feed_forward.experts.w3")
    torch.save(scales, folder / "fp8_scales_1.pt")
    with pytest.raises(PunaError, match=r"fp8_scales_1.pt has no scale for layers.2.feed_forward.experts.w3"):
        puna.load(folder)
    torch.save(scales | {"layers.2.feed_forward.experts.w3": scale[:, 1:].clone()}, folder / "fp8_scales_1.pt")
    with pytest.raises(PunaError, match=r"has a scale of \[4, 23\]"):
        puna.load(folder)
    (folder / "fp8_scales_1.pt").unlink()
    with pytest.raises(PunaError, match="fp8_scales_1.pt is missing"):
        puna.load(folder)


@pytest.mark.parametrize("form", ["meta", "hf", "puna"])
def test_a_killed_conversion_goes_on(tmp_path, form):
    """Killed twice, then finished: nothing is moved twice, and the files are those of an undisturbed conversion."""
    model = strong_model(CONFIGS["scout"])
    source = save(model, None, tmp_path / "source")
    total = len(values(model))
    for die in (17, 20):
        assert convert(source, tmp_path / "target", form, die) is None
        assert not (tmp_path / "target").exists() and (tmp_path / ".target.part").is_dir()
    (tmp_path / ".target.part" / ".journal.json.new").write_text("{")  # killed while it was written
    assert convert(source, tmp_path / "target", form, 1000) == total - 37
    assert convert(source, tmp_path / "undisturbed", form, 1000) == total
    a, b = tmp_path / "target", tmp_path / "undisturbed"
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}
    assert not (tmp_path / ".target.part").exists() and same(puna.load(a)[0], model)


def test_another_source_starts_over(tmp_path):
    """What an interrupted conversion left is of no use to one from other files: it must not be mixed in."""
    first, second = (strong_model(CONFIGS["scout"], seed=seed) for seed in (1, 2))
    source = save(first, None, tmp_path / "source")
    assert convert(source, tmp_path / "target", "meta", 17) is None
    other = save(second, None, tmp_path / "other")
    store, _ = open_model(other)
    write_folder(store, MetaFormat(None, 2), tmp_path / "target", None, identity(store))
    assert same(puna.load(tmp_path / "target")[0], second)
    assert os.listdir(tmp_path / "target") and not (tmp_path / ".target.part").exists()
