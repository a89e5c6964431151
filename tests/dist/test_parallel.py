"""Every parallelism, and every pair that makes sense, against one process: loss, gradients, weights, routes."""

import pytest
import torch
from dist_helpers import alone, parallel_step

LAYOUTS = {
    "one": (1, {}),  # as torchrun starts it on one GPU
    "fsdp2": (2, {}),
    "fsdp4": (4, {}),
    "copies": (2, dict(dp_replicate=2)),
    "hsdp": (4, dict(dp_replicate=2)),
    "ep2": (2, dict(ep=2)),
    "ep4": (4, dict(ep=4)),
    "ep2 fsdp4": (4, dict(ep=2)),
    "ep2 copies": (4, dict(dp_replicate=2, ep=2)),
    "tp2": (2, dict(tp=2)),
    "tp4": (4, dict(tp=4)),
    "tp2 fsdp2": (4, dict(tp=2)),
    "tp2 ep2": (2, dict(tp=2, ep=2)),
    "tp2 fsdp2 ep4": (4, dict(tp=2, ep=4)),
    "cp2": (2, dict(cp=2)),
    "cp4": (4, dict(cp=4)),
    "cp2 fsdp2": (4, dict(cp=2)),
    "cp2 ep2": (2, dict(cp=2, ep=2)),
    "cp2 tp2": (4, dict(cp=2, tp=2)),
    "cp2 tp2 ep4": (4, dict(cp=2, tp=2, ep=4)),
}

PIPELINES = [  # with micro-batches: weights are gathered, gradients reduced once for all of them
    (2, {}, 4),
    (2, dict(pp_chunks=2), 4),
    (4, dict(pp=4), 4),
    (4, {}, 2),
    (4, dict(dp_replicate=2), 2),
    (4, dict(pp_chunks=2, ep=2), 2),
    (4, dict(tp=2), 4),
    (4, dict(cp=2), 4),
]


def compare(pool, kind, world, layout, dtype=torch.float64, accumulate=1, clip=1e9, recompute=0, **options):
    expected, gradients, weights = alone(kind, dtype, accumulate, clip, **options)
    results = pool.run(parallel_step, world, kind, layout, dtype, accumulate, clip, recompute, options)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    filled = {name: torch.zeros(g.shape, dtype=torch.int64) for name, g in gradients.items()}
    for result, held in results:
        assert result.loss == pytest.approx(expected.loss, rel=tolerance)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)
        assert (result.valid, result.tokens) == (expected.valid, expected.tokens)
        assert all(torch.equal(a, b) for a, b in zip(result.counts, expected.counts, strict=True))
        assert result.metrics.keys() == expected.metrics.keys()
        for name, value in expected.metrics.items():
            if isinstance(value, float):
                assert result.metrics[name] == pytest.approx(value, rel=tolerance, abs=1e-9)
        for name, (part, gradient, weight) in held.items():
            whole = gradients[name]
            assert (part.cut(whole) - gradient).norm() <= tolerance * whole.norm(), name
            assert (part.cut(weights[name]) - weight).norm() <= tolerance * weights[name].norm(), name
            for where, _ in part.blocks():
                filled[name][where] += 1
    copies = layout.get("dp_replicate", 1)
    for name, count in filled.items():
        assert bool((count == copies).all()), f"{name} is not held exactly once a copy"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_a_step_equals_one_process(pool, kind, name):
    world, layout = LAYOUTS[name]
    compare(pool, kind, world, layout)


@pytest.mark.parametrize("world, layout, accumulate", PIPELINES, ids=str)
@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_a_pipeline_equals_one_process(pool, kind, world, layout, accumulate):
    compare(pool, kind, world, dict(pp=2) | layout, accumulate=accumulate, recompute=int(kind == "maverick"))


@pytest.mark.parametrize("layout", [{}, dict(cp=2), dict(tp=2, ep=2)], ids=str)
def test_float32_within_the_documented_tolerance(pool, layout):
    compare(pool, "scout", 2, layout, torch.float32)


@pytest.mark.parametrize("layout", [{}, dict(cp=2, ep=2), dict(tp=2)], ids=str)
def test_accumulation_clipping_and_recomputing(pool, layout):
    compare(pool, "maverick", 2, layout, accumulate=2, clip=0.01, recompute=1)


@pytest.mark.parametrize("layout", [dict(cp=2), dict(tp=2)], ids=str)
@pytest.mark.parametrize("options", [dict(packed=False), dict(pictures=False)], ids=str)
def test_one_document_and_no_pictures(pool, layout, options):
    compare(pool, "scout", 2, layout, **options)


@pytest.mark.parametrize("layout, accumulate", [({}, 1), (dict(ep=2), 1), (dict(tp=2), 1), (dict(pp=2), 4)], ids=str)
def test_fp8_products_of_many_processes(pool, layout, accumulate):
    """Every token and weight is rounded as on one process, so the loss is the same (but for tp: its rows are shorter);
    a weight's gradient is summed from rounded parts that are other ones."""
    expected, gradients, _ = alone("sixteens", torch.float32, accumulate, fp8="rowwise")
    plain, exact, _ = alone("sixteens", torch.float32, accumulate)
    results = pool.run(parallel_step, 2, "sixteens", layout, torch.float32, accumulate, 1e9, 0, {}, "rowwise")
    assert abs(expected.loss - plain.loss) > 1e-4
    for result, held in results:
        assert result.loss == pytest.approx(expected.loss, rel=2e-3 if "tp" in layout else 1e-5)
        for name, (part, gradient, _) in held.items():
            rounding = 2 * (gradients[name] - exact[name]).norm() if "tp" in layout else 0.1 * gradients[name].norm()
            assert (part.cut(gradients[name]) - gradient).norm() <= rounding, name
