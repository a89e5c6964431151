"""LoRA as a user runs it: trained, resumed, merged, and in PEFT's layout with equal logits in its library."""

import dataclasses
import json
import shutil

import pytest
import torch
from parity_helpers import CHANGED, CHUNK, SCOUT, assert_same, distance, strong_model, with_pictures
from safetensors.torch import load_file, save_file
from test_finetune import SETTINGS, base, command  # noqa: F401 - a fixture
from test_transformers import from_transformers, hf_logits

import puna
from puna import recipes
from puna.convert import export_hf
from puna.errors import PunaError
from puna.model import lora
from puna.model.weights import plain
from puna.precision.quantized import SCHEMES, Quantized
from puna.stages.common import run_stage
from puna.train.metrics import read

LORA = ("--lora.rank", "4", "--lora.alpha", "16", "--lora.targets", "*.attention.*,*.experts.*,*.shared.*,vision.*",
        "--lora.ranks", '{"*.experts.w2": 2}', "--train.lr", "1e-2")  # fmt: skip


def forward(model, config):
    tokens, tiles = with_pictures(config, 3 * CHUNK + 5)
    with torch.no_grad():
        return model(tokens, tiles)


def train(monkeypatch, folder, name, *words, init="hf"):
    return command(monkeypatch, folder, "sft", "--init", init, "--data", "chats.jsonl", "--name", name, *SETTINGS,
                   *LORA, *words)  # fmt: skip


@pytest.fixture
def trained(base, monkeypatch):  # noqa: F811
    """(base model, folder) with the finished run `lora`."""
    model, folder = base
    if not (folder / "runs" / "lora").exists():
        assert train(monkeypatch, folder, "lora") == 0
    return model, folder


def test_only_adapters_are_trained_and_kept(trained):
    model, folder = trained
    (step,) = (folder / "runs" / "lora" / "sft").glob("step-*")
    tensors, moments = load_file(step / "adapter.safetensors"), load_file(step / "optimizer.safetensors")
    assert not (step / "model.safetensors").exists() and (step / "tokenizer.json").exists()
    assert all(name.endswith((".A", ".B")) for name in tensors)
    assert {name.split("/", 1)[1] for name in moments if "exp_avg/" in name} == tensors.keys()
    tuned, processor = puna.load(folder / "runs" / "lora")
    assert processor is not None and lora.adapters(tuned).keys() == tensors.keys()
    assert {tuple(t.shape) for n, t in tensors.items() if n.endswith("w2.A")} == {(4, SCOUT.expert_width, 2)}
    weights = plain(tuned)
    for name, parameter in model.named_parameters():
        own = weights[name].base if isinstance(weights[name], lora.LoRA) else weights[name]
        assert torch.equal(own, parameter), name
    assert distance(forward(tuned, model.config), forward(model, model.config)) > CHANGED


@pytest.mark.parametrize("kind", ["hf", "puna"])
def test_merged_is_what_was_trained(trained, monkeypatch, kind):
    """In slices from the files, in memory, and in transformers."""
    model, folder = trained
    target = f"merged-{kind}"
    assert command(monkeypatch, folder, "convert", "runs/lora", target, "--to", kind) == 0
    tuned, _ = puna.load(folder / "runs" / "lora")
    logits = forward(tuned, model.config)
    merged, processor = puna.load(folder / target)
    assert processor is not None and not lora.adapters(merged)
    assert_same(forward(merged, model.config), logits)
    lora.merge(tuned)
    assert tuned.state_dict().keys() == merged.state_dict().keys()
    for name, weight in tuned.state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name], atol=1e-6, rtol=0, msg=name)
    if kind == "hf":
        tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
        assert_same(hf_logits(from_transformers(folder / target), tokens, tiles), logits)


def test_resumed_is_bitwise_the_same(trained, monkeypatch):
    """Killed after four of six steps: adapters, moments and all."""
    from puna.train import loop

    _, folder = trained

    class Killed(Exception):
        pass

    original = loop.checkpoint.Saver.save

    def save_and_die(saver, step, *rest):
        original(saver, step, *rest)
        if step == 4:
            raise Killed

    monkeypatch.setattr(loop.checkpoint.Saver, "save", save_and_die)
    words = ("--train.checkpoint_every", "2")
    with pytest.raises(Killed):
        train(monkeypatch, folder, "again", *words)
    monkeypatch.setattr(loop.checkpoint.Saver, "save", original)
    assert train(monkeypatch, folder, "again", *words) == 0
    one, two = (load_file(next((folder / "runs" / n / "sft").glob("step-*6")) / file)
                for n in ("lora", "again") for file in ("adapter.safetensors",))  # fmt: skip
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_base_is_an_error_that_names_the_tensor(base, monkeypatch, tmp_path, capsys):  # noqa: F811
    _, folder = base
    shutil.copytree(folder / "hf", tmp_path / "hf")
    shutil.copy(folder / "red.png", tmp_path), shutil.copy(folder / "chats.jsonl", tmp_path)
    assert train(monkeypatch, tmp_path, "lora", "--train.steps", "2") == 0
    file = next((tmp_path / "hf").glob("model-*.safetensors"))
    tensors = load_file(file)
    name = "language_model.model.layers.3.self_attn.o_proj.weight"
    tensors[name].view(torch.int32)[5, 5] ^= 1  # one bit
    save_file(tensors, file)
    with pytest.raises(PunaError, match="not the base that the adapter was trained on: tensor layers.3.attention.wo"):
        puna.load(tmp_path / "runs" / "lora")
    assert command(monkeypatch, tmp_path, "convert", "runs/lora", "out", "--to", "hf") == 1
    assert "layers.3.attention.wo.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    with pytest.raises(PunaError, match="no longer at .*hf: put it back"):
        puna.load(tmp_path / "runs" / "lora")


def test_damaged_adapters_are_found(trained, tmp_path):
    _, folder = trained
    (step,) = (folder / "runs" / "lora" / "sft").glob("step-*")
    copy = shutil.copytree(step, tmp_path / step.name)
    tensors = load_file(copy / "adapter.safetensors")
    tensors["layers.1.moe.experts.w2.B"].view(torch.int32).flatten()[3] ^= 1
    save_file(tensors, copy / "adapter.safetensors")
    with pytest.raises(PunaError, match="layers.1.moe.experts.w2.B does not match its hash"):
        puna.load(copy)


def test_a_stage_on_top_starts_from_the_sum(trained, monkeypatch):
    """Full training, and adapters beside what had adapters."""
    _, folder = trained
    words = ("sft", "--init", "runs/lora", "--data", "chats.jsonl", *SETTINGS)
    assert command(monkeypatch, folder, *words, "--name", "full", "--train.steps", "1", "--train.lr", "1e-12") == 0
    tuned, config = puna.load(folder / "runs" / "lora")[0], SCOUT
    full, _ = puna.load(folder / "runs" / "full")
    assert_same(forward(full, tuned.config), forward(tuned, tuned.config))
    assert not lora.adapters(full) and config
    assert command(monkeypatch, folder, *words, *LORA, "--name", "twice", "--train.steps", "2") == 0
    twice, _ = puna.load(folder / "runs" / "twice")
    assert distance(forward(twice, tuned.config), forward(tuned, tuned.config)) > CHANGED / 10


def test_a_new_model_has_nothing_to_adapt(tmp_path, tiny_processor):
    run = dataclasses.replace(recipes.get("nano_scout").stage("pretrain"), lora=lora.LoRAConfig(2))
    with pytest.raises(PunaError, match="lora.rank: an adapter needs a trained model"):
        run_stage(run, tmp_path, tiny_processor)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- integers


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["puna", "hf", "meta"])
def test_quantised_on_load_from_every_folder(base, scheme, kind, monkeypatch):  # noqa: F811
    """The model whose experts were rounded by hand, and not the model itself; also in slices."""
    model, folder = base
    monkeypatch.setattr("puna.convert.layout.SLICE_BYTES", 30_000)  # an expert, some rows
    loaded, _ = puna.load(folder / kind, quantize=scheme)
    quantized = {name for name, weight in plain(loaded).items() if isinstance(weight, Quantized)}
    assert quantized == {n for n, _ in model.named_parameters() if ".moe.experts." in n or ".moe.shared." in n}
    rounded, _ = puna.load(folder / kind)
    with torch.no_grad():
        for name in quantized:
            parameter = dict(rounded.named_parameters())[name]
            parameter.copy_(SCHEMES[scheme].dequantize(*SCHEMES[scheme].quantize(parameter), torch.float32))
    logits = forward(loaded, model.config)
    assert_same(logits, forward(rounded, model.config))
    assert distance(logits, forward(puna.load(folder / kind)[0], model.config)) > CHANGED


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["puna", "hf", "meta"])
def test_lora_over_integers(base, monkeypatch, scheme, kind):  # noqa: F811
    """Trained, loaded over the same integers, and merged into their values."""
    model, folder = base
    name = f"{scheme}-{kind}"
    assert train(monkeypatch, folder, name, "--lora.base", scheme, init=kind) == 0
    lines = [line["loss"] for line in read(folder / "runs" / name / "sft" / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0]
    tuned, _ = puna.load(folder / "runs" / name)
    weight = plain(tuned)["layers.0.moe.experts.w13"]
    assert isinstance(weight, lora.LoRA) and isinstance(weight.base, Quantized)
    assert not isinstance(plain(tuned)["layers.0.attention.wo.weight"].base, Quantized)
    logits = forward(tuned, model.config)
    assert distance(logits, forward(puna.load(folder / kind, quantize=scheme)[0], model.config)) > CHANGED
    assert command(monkeypatch, folder, "convert", f"runs/{name}", f"{name}-hf", "--to", "hf") == 0
    assert_same(forward(puna.load(folder / f"{name}-hf")[0], model.config), logits)
    lora.merge(tuned)
    assert_same(forward(tuned, model.config), logits)


def test_lora_over_a_quantised_checkpoint(base, monkeypatch):  # noqa: F811
    """Its integers are the base; training all of it starts from their values."""
    model, folder = base
    assert command(monkeypatch, folder, "quantize", "hf", "q4", "--to", "int4") == 0
    assert train(monkeypatch, folder, "over-q4", init="q4") == 0
    one, two = (puna.load(folder / "runs" / name)[0] for name in ("over-q4", "int4-hf"))
    assert_same(forward(one, model.config), forward(two, model.config))
    words = ("sft", "--init", "q4", "--data", "chats.jsonl", "--name", "full-q4", *SETTINGS, "--train.steps", "1")
    assert command(monkeypatch, folder, *words, "--train.lr", "1e-12") == 0
    full = puna.load(folder / "runs" / "full-q4")[0]
    assert len(list(full.parameters())) == len(list(model.parameters()))
    assert_same(forward(full, model.config), forward(puna.load(folder / "q4")[0], model.config))


# ------------------------------------------------------------------------------------------------------------- bfloat16


def stored_as(folder):
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("wish", ["stored", "bfloat16"])
def test_lora_over_bfloat16(base, monkeypatch, wish):  # noqa: F811
    """As stored, or rounded while it is read: the base stays bfloat16 and what it was, adapters and moments are
    float32. The model is W + (alpha / r) B A written out; merged it is that sum, rounded once, in transformers too. To
    a base that was only held as bfloat16, what is exported is added as it is stored."""
    model, folder = base
    if not (folder / "hf16").exists():
        assert command(monkeypatch, folder, "convert", "hf", "hf16", "--to", "hf", "--dtype", "bfloat16") == 0
    init = "hf16" if wish == "stored" else "hf"
    before = stored_as(folder / init)
    assert {t.dtype for t in before.values()} == {torch.bfloat16 if wish == "stored" else torch.float32}
    assert train(monkeypatch, folder, f"over-{wish}", "--lora.base", wish, init=init) == 0
    after = stored_as(folder / init)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    stage = folder / "runs" / f"over-{wish}" / "sft"
    lines = [line["loss"] for line in read(stage / "metrics.jsonl") if "loss" in line]
    assert lines[-1] < lines[0]
    (step,) = stage.glob("step-*")
    kept = load_file(step / "adapter.safetensors"), load_file(step / "optimizer.safetensors")
    assert {t.dtype for t in kept[0].values()} == {torch.float32}
    assert {t.dtype for name, t in kept[1].items() if "exp_avg" in name} == {torch.float32}

    tuned, _ = puna.load(folder / "runs" / f"over-{wish}", dtype=torch.bfloat16)
    if wish == "stored":
        assert {p.dtype for n, p in puna.load(folder / "runs" / "over-stored")[0].named_parameters()
                if not n.endswith((".A", ".B"))} == {torch.bfloat16}  # fmt: skip
    rounded = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
    literal, merged, exported = {}, {}, {}
    for name, weight in plain(tuned).items():
        adapter = weight if isinstance(weight, lora.LoRA) else None
        own = weight if adapter is None else weight.base
        assert own.dtype == torch.bfloat16 and torch.equal(own, rounded[name]), name
        stored = (rounded if wish == "stored" else dict(model.named_parameters()))[name].detach().float()
        change = torch.zeros(())
        if adapter is not None:
            A, B = adapter.A.detach(), adapter.B.detach()  # noqa: N806
            assert A.dtype == B.dtype == torch.float32
            change = B @ A if A.dim() == 2 else torch.stack([a @ b for a, b in zip(A, B, strict=True)])
            change = adapter.scale * change
        literal[name] = own.detach().float() + change
        merged[name], exported[name] = (sum_.to(torch.bfloat16) for sum_ in (literal[name], stored + change))
    reference = strong_model(model.config)
    reference.load_state_dict(literal)
    in_bf16, tuned.compute_dtype = forward(tuned, model.config), torch.float32
    logits = forward(tuned, model.config)
    assert_same(logits, forward(reference, model.config))
    reference.compute_dtype = torch.bfloat16  # whose activations are rounded alike, though its sums are not
    theirs = forward(reference, model.config)
    ours, noise, change = (((each - logits).norm(dim=-1) / logits.norm(dim=-1)).median()  # some tokens change experts
                           for each in (in_bf16, theirs, forward(model, model.config)))  # fmt: skip
    assert ours < 2 * noise < change

    words = ("convert", f"runs/over-{wish}")
    target = f"over-{wish}-hf"
    assert command(monkeypatch, folder, *words, target, "--to", "hf", "--dtype", "bfloat16") == 0
    assert {t.dtype for t in stored_as(folder / target).values()} == {torch.bfloat16}
    written = puna.load(folder / target)[0]
    for name, parameter in written.named_parameters():
        assert torch.equal(parameter, exported[name]), name
    lora.merge(tuned)
    assert all(torch.equal(p, merged[name]) for name, p in tuned.named_parameters())
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    assert_same(hf_logits(from_transformers(folder / target), tokens, tiles), forward(written.float(), model.config))


# ----------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_we_write_and_we_read_it_back(trained, monkeypatch):
    peft = pytest.importorskip("peft")
    model, folder = trained
    assert command(monkeypatch, folder, "convert", "runs/lora", "peft", "--to", "peft") == 0
    about = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(folder / "hf") and about["r"] == 4
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    tuned, _ = puna.load(folder / "runs" / "lora")
    logits = forward(tuned, model.config)
    theirs = peft.PeftModel.from_pretrained(from_transformers(folder / "hf"), folder / "peft").eval()
    stored = load_file(folder / "peft" / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(theirs)
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert_same(hf_logits(theirs, tokens, tiles), logits)
    again, processor = puna.load(folder / "peft")
    assert processor is not None and torch.equal(forward(again, model.config), logits)
    ours, back = lora.adapters(tuned), lora.adapters(again)
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",), ()])
def test_what_peft_trains_is_read(tmp_path, parameters):
    """Its own initial A's, different for q, k and v; some modules only; ranks and alphas of their own."""
    peft = pytest.importorskip("peft")
    model = strong_model(SCOUT)
    hf = export_hf(model, None, tmp_path / "hf")
    experts = [f"language_model.model.layers.{i}.feed_forward.experts.{p}" for i in (0, 2) for p in parameters]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*language_model.*(q_proj|v_proj|o_proj|shared_expert\.up_proj)",
        target_parameters=experts or None, rank_pattern={"o_proj": 2}, alpha_pattern={"v_proj": 7},
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(from_transformers(hf), config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": "../hf"}))
    tuned, _ = puna.load(tmp_path / "peft")
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    assert_same(forward(tuned, model.config), hf_logits(theirs, tokens, tiles))
    assert distance(forward(tuned, model.config), forward(model, model.config)) > CHANGED


def test_what_peft_cannot_hold_is_refused(base, monkeypatch, capsys, tmp_path):  # noqa: F811
    _, folder = base
    words = ("sft", "--init", "hf", "--data", "chats.jsonl", "--name", "router", *SETTINGS, "--train.steps", "1",
             "--lora.rank", "2", "--lora.targets", "*router*")  # fmt: skip
    assert command(monkeypatch, folder, *words) == 0
    assert command(monkeypatch, folder, "convert", "runs/router", "out", "--to", "peft") == 1
    assert "PEFT can't wrap transformers' router" in capsys.readouterr().err and not (folder / "out").exists()
    assert command(monkeypatch, folder, "convert", "hf", "out", "--to", "peft") == 1
    assert "hf has no adapters" in capsys.readouterr().err
    for change, match in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "holds IA3"),
                          ({"base_model_name_or_path": "meta/llama"}, "names the base 'meta/llama'")):  # fmt: skip
        (tmp_path / "p").mkdir(exist_ok=True)
        about = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "hf")} | change
        (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(about))
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, tmp_path / "p" / "adapter_model.safetensors")
        with pytest.raises(PunaError, match=match):
            puna.load(tmp_path / "p")
