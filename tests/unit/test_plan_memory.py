"""The planner's memory against the meta device, what autograd saves, and the peak of resident memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna.model import Llama4, ModelConfig, VisionConfig, preset
from puna.model.vision import VisionTower
from puna.parallel.layout import Layout, Part, is_expert, is_tensor_parallel, shard_bounds, tensor_parallel
from puna.parallel.pipeline import schedule
from puna.plan.hardware import Assumptions, Cluster, Gpu
from puna.plan.layout import ONE
from puna.plan.memory import (
    PRECISIONS,
    Schedule,
    alike,
    in_flight,
    kept,
    kept_by_tile,
    shards,
    stage_layers,
    training_memory,
    weight_bytes,
)
from puna.plan.serving import ServingWork, serve
from puna.precision.fp8 import quantize_rows
from puna.precision.quantized import Quantization, attach

SHAPE = dict(vocab_size=2048, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, expert_width=256,
             dense_width=512, n_experts=4, chunk=256, floor_scale=256, max_context=8192)  # fmt: skip
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def saved(run, own=()) -> int:
    """Bytes of the storages that autograd keeps while `run` goes forward; `own`: tensors that are there anyway."""
    own, found = {t.untyped_storage().data_ptr() for t in own}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("change", [{}, {"moe_layers": ()}, {"qk_norm": False, "moe_step": 2}, {"nope_layers": ()},
                                    {"d_model": 128, "expert_width": 640}])  # fmt: skip
def test_activations_are_what_autograd_saves(change, dtype):
    config = ModelConfig(**SHAPE | {"chunk": 1024, "expert_width": 192} | change)
    model = Llama4(config).train()
    model.compute_dtype = dtype
    b, tokens = BYTES[dtype], 640  # longer than what the CPU attends to in blocks
    named = model.named_parameters()
    kinds = ("norm", "router", "experts")  # norms and routers stay float32, experts are cast one by one
    cast = sum(p.numel() for n, p in named if "layers" in n and not any(kind in n for kind in kinds))
    measured = saved(lambda: model.hidden(torch.randint(0, 64, (1, tokens))), model.parameters())
    measured -= (b == 2) * b * cast  # copies of the weights: "gathered"
    planned = tokens * (sum(kept(config, i, b) for i in range(4)) + (4 + 4) * config.d_model)  # and the last norm
    assert 0.95 * measured < planned < 1.01 * measured


def test_a_recomputed_layer_keeps_its_input():
    config = ModelConfig(**SHAPE | {"chunk": 1024})
    model, tokens = Llama4(config).train(), 640  # longer than what the CPU attends to in blocks
    model.recompute = 2
    measured = saved(lambda: model.hidden(torch.randint(0, 64, (1, tokens))), model.parameters())
    every_second = Schedule(recompute=2)
    parts = training_memory(config, Layout(dp_shard=2), every_second, PRECISIONS["float32"], tokens)
    once_more = tokens * kept(config, 0, 4)
    planned = parts["activations"] - once_more + tokens * 8 * config.d_model
    assert planned == pytest.approx(measured, rel=0.05)
    whole = training_memory(config, Layout(dp_shard=2), Schedule(), PRECISIONS["float32"], tokens)
    assert parts["activations"] < 0.8 * whole["activations"]


@pytest.mark.parametrize("dtype", BYTES)
def test_tiles_are_what_autograd_saves(dtype):
    eye = VisionConfig(image_size=192, patch_size=8, width=128, layers=3, heads=4, mlp_width=384, adapter_width=192)
    tower, b = VisionTower(eye, 256), BYTES[dtype]  # more places than the CPU attends to by hand
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.02)
    tower = tower.to(dtype)
    measured = saved(lambda: tower(torch.randn(2, 3, 192, 192, dtype=dtype)), tower.parameters())
    assert kept_by_tile(eye, b) == pytest.approx(measured / 2, rel=0.08)


@pytest.mark.parametrize("name", ["scout", "maverick", "behemoth", "nano_maverick"])
def test_ranks_hold_what_the_trainer_gives_them(name):
    """The parts that parallel/apply.py cuts and FSDP shards, parameter by parameter, on rank 0 of the first stage."""
    config = preset(name)
    layout = Layout(dp_replicate=3, dp_shard=4, cp=2, tp=2, ep=4)
    with torch.device("meta"):
        sizes = {n: tuple(p.shape) for n, p in Llama4(config).named_parameters()}
    held = 0
    for parameter, shape in sizes.items():
        part, over, dim = Part.whole(shape), layout.copy, 0
        if is_expert(parameter):
            part, over = part.share(0, 0, layout.ep), layout.copy // layout.ep
            dim = 0 if part.local[0] % over == 0 or part.local[1] % over else 1
        else:
            part = tensor_parallel(parameter, part, config, 0, layout.tp)
            over = layout.dp_shard * layout.cp if is_tensor_parallel(parameter) else over
        held += math.prod(part.window(dim, *shard_bounds(part.local[dim], 0, over)).local)
    mine = shards(config, layout, alike(config, 1, 1, 0, 0))
    assert sum(mine.values()) == held
    whole = shards(config, ONE, alike(config, 1, 1, 0, 0))
    assert sum(whole.values()) == sum(map(math.prod, sizes.values()))
    halves = [shards(config, Layout(dp_shard=1, pp=2), alike(config, 2, 1, s, 0), s == 0, s == 1) for s in range(2)]
    assert sum(sum(half.values()) for half in halves) == sum(whole.values())


def test_pipelines_hold_as_many_micro_batches_as_their_schedule():
    for chunks, micros in ((1, 16), (1, 2), (2, 16), (3, 8)):
        layout = Layout(dp_shard=1, pp=4, pp_chunks=chunks)
        for stage in range(4):
            waiting = most = 0
            for work in schedule(stage, 4, chunks, micros):
                waiting += 1 if work.forward else -1
                most = max(most, waiting)
            assert in_flight(layout, micros, stage) == most / chunks
    assert stage_layers(48, 4, 2, 1) == (*range(6, 12), *range(30, 36))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["scout", "nano_maverick"])
def test_quantised_weights_have_the_size_of_their_files(name, scheme):
    config = preset(name)
    with torch.device("meta"):
        model = Llama4(config).bfloat16()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        attach(model, Quantization(scheme))
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert sum(weight_bytes(config, scheme, n, s) for n, s in shapes.items()) == stored


def test_fp8_is_that_of_metas_format():
    config = preset("nano_scout")
    q, scale = quantize_rows(torch.empty(16, 512, 256))  # [E, out, in]
    size = weight_bytes(config, "fp8", "layers.1.moe.experts.w13", (16, 256, 512))
    assert size == q.numel() * q.element_size() + scale.numel() * scale.element_size()
    assert weight_bytes(config, "fp8", "layers.0.moe.experts.w13", (16, 256, 512)) == 2 * q.numel()
    assert weight_bytes(config, "fp8", "layers.1.moe.shared.w13.weight", (512, 256)) == 2 * 512 * 256


@pytest.fixture(scope="module")
def peak():
    """peak(**asked): resident memory that `plan_peak.py` adds, of a process whose allocator gives everything back at
    once."""
    program = Path(__file__).with_name("plan_peak.py")
    quiet = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=quiet) as process:  # fmt: skip

        def ask(**asked) -> int:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    ("change", "dtype", "rows", "seq_len", "micros"),
    [
        ({"d_model": 512, "expert_width": 512, "n_experts": 6}, "float32", 1, 128, 1),  # the optimizer
        ({}, "float32", 2, 512, 1),  # activations of MoE layers, chunks
        ({"moe_layers": [], "dense_width": 1024}, "float32", 2, 512, 1),  # of dense ones
        ({"moe_step": 2, "n_experts": 32}, "float32", 2, 512, 2),  # gradients from the start
        ({"vocab_size": 32768}, "float32", 1, 512, 1),  # the head
        ({"chunk": 1024, "n_experts": 16}, "bfloat16", 1, 640, 1),  # copies of the weights
    ],
)
def test_training_takes_the_planned_memory(peak, change, dtype, rows, seq_len, micros):
    """Peak resident memory, less what the process had before the model was built; within 15 %."""
    measured = peak(what="train", config=SHAPE | change, dtype=dtype, rows=rows, seq_len=seq_len, micros=micros)
    precision = PRECISIONS["mixed" if dtype == "bfloat16" else "float32"]
    how = Schedule(rows=rows, micros=micros)
    parts = training_memory(ModelConfig.from_dict(SHAPE | change), ONE, how, precision, seq_len)
    print(f"{measured / 1e6:.1f} MB measured, {sum(parts.values()) / 1e6:.1f} planned")
    assert sum(parts.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize(("change", "rows", "seq_len"), [({"n_experts": 32}, 1, 256), ({"n_kv_heads": 4}, 16, 4096)])
def test_serving_takes_the_planned_memory(peak, change, rows, seq_len):
    config = SHAPE | change
    measured = peak(what="serve", config=config, dtype="float32", rows=rows, seq_len=seq_len, micros=1)
    gpu = Gpu("cpu", 16, 0, 20, 1, 0, 1, 0.3, 0, 1, 0, 0, 0)
    work = ServingWork(seq_len, rows, "float32", "float32")
    made = serve(ModelConfig.from_dict(config), Cluster(1, gpu, Assumptions()), work)
    print(f"{measured / 1e6:.1f} MB measured, {made.used / 1e6:.1f} planned {made.memory}")
    assert made.used == pytest.approx(measured, rel=0.15)
    assert math.isclose(made.used, sum(made.memory.values()))
