"""`puna plan`: known answers, the rules of layouts, bytes against literal counts, the command."""

import dataclasses
import json
import random

import pytest

from puna.cli.main import main
from puna.errors import PunaError
from puna.model import ModelConfig, preset
from puna.parallel.layout import Layout
from puna.plan import communication, hardware, layout, serving, training
from puna.plan.flops import flops_per_token, parameter_count, shapes
from puna.plan.memory import PRECISIONS, Schedule, alike, shards
from puna.plan.serving import ServingWork, serve
from puna.plan.training import Work, stage_flops, suggest

TABLE = hardware.load()
SHAPE = dict(vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, expert_width=24,
             dense_width=48, n_experts=4, chunk=16, floor_scale=16, max_context=256)  # fmt: skip


def gpus(text: str) -> hardware.Cluster:
    return hardware.cluster(text, TABLE)


# ---- known answers


def test_scout_does_not_train_on_eight_h100():
    """16 bytes a parameter over 8 GPUs are 217 GB each; 32 GPUs are the fewest nodes that will do."""
    cluster, work = gpus("8xh100"), Work()
    [made] = suggest(preset("scout"), cluster, work)
    state = made.memory["parameters"] + made.memory["gradients"] + made.memory["optimizer"]
    assert not made.fits and made.over > 130e9
    assert state >= 16 * 108_641_793_536 / 8
    assert training.precisions_that_fit(preset("scout"), cluster, work) == []
    smallest = training.smallest(preset("scout"), cluster, work)
    assert smallest.gpus == 32 and smallest.fits
    assert not any(p.fits for p in suggest(preset("scout"), gpus("24xh100"), work))


def test_scout_in_int4_is_served_by_one_h100():
    made = serve(preset("scout"), gpus("1xh100"), ServingWork(precision="int4"))
    assert made.fits and 60e9 < made.weights < 70e9
    assert 150_000 < made.longest < 400_000, "what the keys and values of the rest allow"
    bf16 = serve(preset("scout"), gpus("1xh100"), ServingWork())
    assert not bf16.fits and bf16.weights == 2 * 108_641_793_536
    assert serving.smallest(preset("scout"), gpus("1xh100"), ServingWork()).gpus == 4


def test_maverick_is_served_by_eight_h100_in_fp8_but_not_in_bf16():
    cluster, config = gpus("8xh100"), preset("maverick")
    bf16, fp8 = (serve(config, cluster, ServingWork(precision=p)) for p in ("bf16", "fp8"))
    assert not bf16.fits and fp8.fits
    assert fp8.weights < 8 * 80e9 < bf16.weights
    assert "fp8" in [p.precision for p in serving.precisions_that_fit(config, cluster, ServingWork())]


@pytest.mark.parametrize(
    ("context", "gib"), [(131072, 7.125), (262144, 13.125), (1048576, 49.125), (10485760, 481.125)]
)
def test_keys_and_values_are_the_facts(context, gib):
    """llama4-facts.md §1.5."""
    made = serve(preset("scout"), gpus("8xh100"), ServingWork(context, 1, "int4"))
    assert made.sequence == gib * 2**30
    fp8 = serve(preset("scout"), gpus("8xh100"), ServingWork(context, 1, "int4", "fp8"))
    assert fp8.sequence == made.sequence / 2


def test_ten_million_tokens_need_eight_gpus():
    assert serve(preset("scout"), gpus("8xh100"), ServingWork(10485760, 1, "int4")).fits
    assert not serve(preset("scout"), gpus("4xh100"), ServingWork(10485760, 1, "int4")).fits


def test_behemoth_trains_on_its_published_cluster():
    """Meta: fp8, 32,000 GPUs, 390 TFLOP/s each (llama4-facts.md §1.4); the assumptions here are no better than that."""
    cluster = gpus("32000xh100")
    found = suggest(preset("behemoth"), cluster, Work(8192, 16000, "fp8"))
    assert found[0].fits and 0.9 * 32000 <= found[0].layout.world <= 32000 and found[0].layout.ep > 1
    assert 100e12 < found[0].mfu * 1978.9e12 < 500e12
    assert [p.tokens_per_second for p in found] == sorted((p.tokens_per_second for p in found), reverse=True)
    assert len({p.layout for p in found}) == len(found) == 5


def test_scouts_published_gpu_hours_are_met_within_a_factor():
    """5.0 M H100-hours for 40T tokens (llama4-facts.md §1.1), restarts, long contexts and pictures in them."""
    best = suggest(preset("scout"), gpus("256xh100"), Work())[0]
    hours = best.days(40e12) * 24 * best.gpus
    assert 2.5e6 < hours < 6e6
    assert best.dollars(40e12) == pytest.approx(hours * 2.95)


# ---- layouts


def test_layouts_obey_the_model():
    config = preset("scout")
    found = list(layout.layouts(config, 64, 65536, 8))
    assert len(found) == len(set(found)) > 100
    for each in found:
        assert each.world == 64 and 8 % each.tp == 0 and 48 % (each.pp * each.pp_chunks) == 0 and 16 % each.ep == 0
        assert each.copy % each.ep == 0 and 65536 % (each.cp * 8192) == 0
        layout.check(config, each, 64, 65536)
    assert {each.cp for each in found} == {1, 2, 4, 8}
    assert layout.parse("dp_shard=8, tp=2") == Layout(dp_shard=8, tp=2)
    assert layout.describe(Layout(dp_shard=1, tp=2, ep=4)) == "tp=2, ep=4" and layout.describe(layout.ONE) == "one rank"


def test_unhandy_numbers_of_gpus_leave_spares():
    assert training.used(gpus("8xh100")) == [8] and training.used(gpus("100xh100")) == [100, 96]
    assert training.used(gpus("32000xh100")) == [32000, 31744, 30720]


# ---- FLOPs and bytes


@pytest.mark.parametrize("name", ["scout", "maverick", "nano_maverick"])
def test_stages_share_the_flops(name):
    config = preset(name)
    whole = flops_per_token(config, 16384)
    assert stage_flops(config, 1, 1, 0, 16384, 0, 1.0) == pytest.approx(whole, rel=1e-12)
    assert sum(stage_flops(config, 2, 2, s, 16384, 0, 1.0) for s in range(2)) == pytest.approx(whole, rel=1e-12)
    head = 6 * (config.vocab_size + 1) * config.d_model
    assert stage_flops(config, 1, 1, 0, 16384, 1, 1.0) == pytest.approx(whole + (whole - head) / 3, rel=1e-12)
    assert stage_flops(config, 1, 1, 0, 16384, 0, 1.5) > whole


def test_fsdp_sends_what_its_ranks_lack():
    """A ring of n sends each rank's shard to the n - 1 others: weights twice a micro-batch, gradients once; matrices
    travel as bfloat16, what multiplies in fp32 as fp32. nano's router of 16 rows is what 32 ranks have to pad."""
    config = preset("nano_scout")
    for n, ep in ((2, 1), (8, 4), (32, 8)):
        kinds = {"matrices": 0, "experts": 0, "rest": 0, "root": 0}
        for name, shape in shapes(config).items():
            rest = 1
            for size in shape[1:]:
                rest *= size
            if ".experts." in name:
                kinds["experts"] += shape[0] // ep * shape[1] // (n // ep) * shape[2]
            else:
                matrix = name.startswith("layers") and ("attention.w" in name or "shared" in name)
                root = name.startswith(("tok_", "norm.", "output."))
                kinds["matrices" if matrix else "root" if root else "rest"] += -(-shape[0] // n) * rest
        mine = Layout(dp_shard=n, ep=ep)
        assert shards(config, mine, alike(config, 1, 1, 0, 0)) == kinds
        text = communication.step(config, mine, Schedule(micros=3), PRECISIONS["mixed"], 512)
        sent = communication.step(config, mine, Schedule(micros=3, tiles=1.0), PRECISIONS["mixed"], 512)
        assert text["FSDP rest"].sent < 0.9 * sent["FSDP rest"].sent, "no pictures, no tower"
        assert sent["FSDP"].sent == (n - 1) * kinds["matrices"] * 3 * (2 + 2 + 4)
        assert sent["FSDP rest"].sent == (n - 1) * 3 * (kinds["rest"] * 12 + kinds["root"] * 8)
        if n > ep:
            assert sent["FSDP experts"].sent == (n // ep - 1) * kinds["experts"] * 3 * (2 + 2 + 4)
    piped = communication.step(config, Layout(dp_shard=8, pp=2), Schedule(micros=3), PRECISIONS["mixed"], 512)
    half = shards(config, Layout(dp_shard=8, pp=2), alike(config, 2, 1, 0, 0), True, False)
    assert piped["FSDP"].sent == 7 * half["matrices"] * (2 + 4), "once for all micro-batches"


def test_hsdp_reduces_the_shard_over_its_replicas():
    config = preset("nano_scout")
    how = Schedule(micros=5, tiles=1.0)
    sent = communication.step(config, Layout(dp_replicate=4, dp_shard=2), how, PRECISIONS["mixed"], 512)
    held = sum(shards(config, Layout(dp_shard=2), alike(config, 1, 1, 0, 0)).values())
    assert sent["HSDP"].sent == 2 * 3 / 4 * held * 4 * 5


def test_experts_rows_are_those_of_other_ranks_tokens():
    """Token by token: a row leaves where its expert lives elsewhere; it comes back, and gradients go both ways."""
    draw, ep, n_experts, tokens = random.Random(0), 4, 8, 50
    routes = [[draw.randrange(n_experts) for _ in range(tokens)] for _ in range(ep)]
    counts = [[route.count(e) for e in range(n_experts)] for route in routes]
    bytes_sent = [0] * ep
    for rank, route in enumerate(routes):
        for expert in route:
            home = expert // (n_experts // ep)
            if home != rank:
                for sender in (rank, home, rank, home):  # the token, its result; the result's gradient, the token's
                    bytes_sent[sender] += 2 * 32
    config = ModelConfig(**SHAPE | {"n_experts": n_experts})
    rows = communication.leaving(counts, ep)
    assert [communication.expert_rows(config, *r, b=2) for r in rows] == bytes_sent
    even = communication.leaving([[5] * n_experts] * ep, ep)
    balanced = communication.step(config, Layout(dp_shard=ep, ep=ep), Schedule(), PRECISIONS["mixed"], 5 * n_experts)
    counted = communication.expert_counts(config, Layout(dp_shard=ep, ep=ep))
    assert counted == 8 * n_experts * 3 / 4
    assert balanced["experts"].sent == 4 * (communication.expert_rows(config, *even[0], b=2) + counted)
    more = communication.step(config, Layout(dp_shard=ep, ep=ep), Schedule(recompute=1), PRECISIONS["mixed"], 40)
    assert more["experts"].sent == 4 * (communication.expert_rows(config, *even[0], b=2, forwards=2) + 2 * counted)


def test_context_parallel_moves_keys_of_global_layers_alone():
    """Which keys of other ranks a query may see, token by token: none in a local layer, where chunks are whole."""
    config, cp, seq_len = ModelConfig(**SHAPE), 2, 64
    chunks = seq_len // config.chunk
    owner = [min(k // config.chunk, chunks - 1 - k // config.chunk) % cp for k in range(seq_len)]  # head and tail
    foreign = {"local": set(), "global": set()}
    for q in range(seq_len):
        for k in range(q + 1):
            if owner[q] != owner[k]:
                foreign["global"].add((owner[q], k))
                if q // config.chunk == k // config.chunk:
                    foreign["local"].add((owner[q], k))
    assert not foreign["local"] and foreign["global"]
    mine = Layout(dp_shard=1, cp=cp)
    sent = communication.step(config, mine, Schedule(), PRECISIONS["mixed"], seq_len)["context"].sent
    keys = seq_len // cp  # each rank sends all of its own to the other one
    assert sent == 2 * (2 * config.n_kv_heads * config.head_dim * 2 * keys)  # one global layer, forward and back


def test_tensor_and_pipeline_traffic():
    config = ModelConfig(**SHAPE)
    how = Schedule(rows=3, micros=2)
    sent = communication.step(config, Layout(dp_shard=1, tp=2), how, PRECISIONS["mixed"], 16)
    assert sent["tensor"].sent == 2 * 8 * 4 * 1 / 2 * 2 * 32 * 48
    sent = communication.step(config, Layout(dp_shard=1, pp=4), how, PRECISIONS["mixed"], 16, stage=1)
    assert sent["pipeline"].sent == 2 * 2 * 2 * 32 * 48
    assert set(sent) == {"pipeline"}
    both = communication.step(config, Layout(dp_shard=1, tp=2, ep=2), Schedule(), PRECISIONS["mixed"], 16)
    lone = communication.step(config, Layout(dp_shard=2, ep=2), Schedule(), PRECISIONS["mixed"], 16)
    assert both["experts"].sent < 0.6 * lone["experts"].sent, "tensor-parallel ranks route their own part of the row"


def test_time_follows_links_bubbles_and_prices():
    config = preset("scout")
    slow = dataclasses.replace(TABLE.gpus["h100"], network=1.0)
    work, fast = Work(8192, 512), gpus("64xh100")
    both = [suggest(config, c, work, Layout(dp_shard=64))[0] for c in (fast, dataclasses.replace(fast, gpu=slow))]
    assert both[1].step > 2 * both[0].step and both[1].seconds["compute"] == both[0].seconds["compute"]
    piped = suggest(config, fast, work, Layout(dp_shard=8, pp=8, ep=8))[0]
    s, v = piped.schedule, piped.layout.pp_chunks
    each = (piped.seconds["compute"] + piped.seconds["exchanges"]) / s.micros
    assert piped.seconds["bubble"] == pytest.approx(7 / v * each)
    assert both[0].mfu < 0.45 and piped.mfu < 0.45
    inside, across = fast.seconds(1e9, 1, 8), fast.seconds(1e9, 1, 64)
    assert inside == pytest.approx(1e9 / 450e9 / 0.8 + 15e-6) and across == pytest.approx(1e9 / 400e9 / 0.8 + 15e-6)
    assert fast.seconds(1e9, 1, 16, exchange=True) == pytest.approx(1e9 * 8 / 15 / 50e9 / 0.8 + 15e-6)
    assert fast.seconds(1e9, 1, 1) == 0


def test_decoding_reads_the_experts_that_are_met():
    """One sequence of Scout in bf16: all active weights but the embedding, and the keys it sees."""
    config, one = preset("scout"), gpus("4xh100")
    made = serve(config, one, ServingWork(2, 1))
    count = parameter_count(config)
    read = 2 * count.active_without_embedding / 4 / (3350e9 * 0.7)
    links = one.seconds(2 * 48 * 2 * 3 / 4 * 5120 * 2, 96, 4)
    assert made.rates[0].seconds == pytest.approx(read + links, rel=1e-3)
    many = serve(config, one, ServingWork(2, 128)).rates
    assert [r.batch for r in many] == [1, 8, 32, 128]
    assert many[-1].tokens_per_second > 10 * many[0].tokens_per_second
    assert many[-1].dollars_output < many[0].dollars_output / 10


# ---- the command


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        ("scout --gpus 8xh100", 0, "it does not fit: 159"),
        ("scout --gpus 8xh100 --must-fit", 3, "in mixed: 32 of these GPUs"),
        ("scout --gpus 8xh100 --for serving --must-fit", 0, "decoding"),
        ("scout --gpus 1xh100 --for serving", 0, "int4 weights, 66.48 GB"),
        ("maverick --gpus 8xh100 --for serving --precision bf16 --must-fit", 3, "fp8 ("),
        ("maverick --gpus 8xh100 --for serving --precision fp8 --must-fit", 0, "432.98 GB"),
        ("nano_scout --gpus laptop --must-fit", 0, "one rank"),
        ("scout --gpus 64xh100 --layout dp_shard=64,ep=8 --batch 512", 0, "dp_shard=64, ep=8"),
        ("behemoth --gpus 32000xh100 --for training --precision fp8 --must-fit", 0, "are spares"),
    ],
)
def test_the_command_answers(capsys, words, exit_code, said):
    assert main(["plan", *words.split()]) == exit_code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scout --gpus 8xh10", "did you mean 'h100'?"),
        ("scout --gpus eight", "there is no GPU 'eight'"),
        ("scout --gpus 0xh100", "must be like 8xh100"),
        ("nano_scout --gpus 2xlaptop", "laptop has no network"),
        ("scot --gpus 8xh100", "did you mean 'scout'?"),
        ("scout --gpus 8xh100 --precision int4", "did you mean"),
        ("scout --gpus 8xa100 --precision fp8", "has no fp8 units"),
        ("scout --gpus 8xh100 --layout dp_shrd=8", "did you mean 'dp_shard'?"),
        ("scout --gpus 8xh100 --layout dp_shard=x", "whole number"),
        ("scout --gpus 8xh100 --layout dp_shard=4", "is 4, but there are 8 processes"),
        ("scout --gpus 8xh100 --layout tp=3", "but there are 8 processes"),
        ("scout --gpus 16xh100 --layout tp=16", "must divide model.n_heads 40"),
        ("scout --gpus 8xh100 --for serving --layout tp=8", "--layout is for --for training alone"),
        ("scout --gpus 8xh100 --cache fp8", "--cache is for --for serving alone"),
        ("scout --gpus 7xh100 --for serving", "does not divide"),
        ("scout --gpus 8xh100 --context 99999999999", "is more than"),
        ("scout --gpus 8xh100 --hardware nowhere.toml", "can't be read"),
    ],
)
def test_mistakes_are_named(capsys, words, said):
    assert main(["plan", *words.split()]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_hardware_is_the_users_to_edit(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    text = hardware.SHIPPED.read_text(encoding="utf-8")
    file.write_text(text.replace("[gpus.h100]", "[gpus.mine]").replace("price = 2.95", "price = 29.5"))
    words = ["plan", "scout", "--for", "serving", "--precision", "int4", "--gpus"]
    assert main([*words, "1xmine", "--hardware", str(file), "--json", str(tmp_path / "a.json")]) == 0
    assert main([*words, "1xh100", "--json", str(tmp_path / "b.json")]) == 0
    dear, cheap = (json.loads((tmp_path / f"{x}.json").read_text())["plans"][0]["rates"][0] for x in "ab")
    assert dear["dollars_output"] == pytest.approx(10 * cheap["dollars_output"])
    assert main([*words, "1xh100", "--hardware", str(file)]) == 1
    file.write_text(text.replace("bandwidth = 3350", "bandwith = 3350", 1))
    assert main([*words, "1xh100", "--hardware", str(file)]) == 1
    assert "gpus.h100.bandwidth" in capsys.readouterr().err
    file.write_text(text.replace("bandwidth = 3350", "bandwidth = 0", 1))
    with pytest.raises(PunaError, match="bandwidth must be positive"):
        hardware.load(file)


def test_json_has_the_whole_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", "maverick", "--gpus", "512xh100", "--json", str(file)]) == 0
    values = json.loads(file.read_text())
    best = values["plans"][0]
    assert values["fits"] and best["used"] == pytest.approx(sum(best["memory"].values()))
    assert best["step"] == pytest.approx(sum(best["seconds"].values()))
    assert values["parameters"]["total"] == 401_583_781_376
    assert best["traffic"]["experts"]["sent"] > 0 and values["flops"]["per_token"] > 6 * 16e9


def test_a_recipe_brings_its_own_rows(capsys):
    assert main(["plan", "nano_scout", "--gpus", "laptop"]) == 0
    recipe = capsys.readouterr().out
    assert main(["plan", "nano_scout", "--gpus", "laptop", "--pretrain.data.seq_len", "256"]) == 0
    changed = capsys.readouterr().out
    assert "rows of 512" in recipe and "rows of 256" in changed
