"""Bytes and calls that processes send in a training step are those that the planner computes, to the byte."""

import importlib.util
import sys
from pathlib import Path

import pytest

from puna.plan import communication

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # the pool's processes import it by name
spec = importlib.util.spec_from_file_location("scaling", FOLDER / "scaling.py")
scaling = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

SENT = {
    "fsdp2, mixed": {"FSDP", "FSDP experts", "FSDP rest"},
    "hsdp": {"FSDP", "FSDP experts", "FSDP rest", "HSDP"},
    "tp2, recomputed": {"FSDP rest", "experts", "tensor"},
    "cp2": {"FSDP", "FSDP experts", "FSDP rest", "context"},
    "pp2 fsdp2": {"FSDP", "FSDP experts", "FSDP rest", "pipeline"},
    "pp2 ep2, two runs each": {"FSDP", "FSDP rest", "experts", "pipeline"},
    "pictures, pp2 fsdp2": {"FSDP", "FSDP experts", "FSDP rest", "pipeline"},
}


@pytest.mark.parametrize("name", SENT)
def test_a_step_sends_what_the_plan_says(pool, name):
    case = scaling.CASES[name]
    results = pool.run(scaling.measure, case.world, case, 1)
    table = scaling.compare(case, results)
    assert set(table) == SENT[name]
    for purpose, row in table.items():
        assert row["ours"] == pytest.approx(row["peer"], rel=1e-12), purpose
        assert row["calls"][0] == row["calls"][1], purpose
    assert all(0 < result["sent"]["sums"] < 3000 for result in results), "sums of a few numbers"


def test_routes_differ_and_matter(pool):
    """With balanced routes instead of those that were measured the formula is off: what it was given counts."""
    case = scaling.CASES["ep2"]
    results = pool.run(scaling.measure, case.world, case, 1)
    balanced = communication.step(case.config, case.whole, case.schedule, scaling.PRECISIONS["float32"], scaling.T)
    assert {result["sent"]["experts"] for result in results} != {balanced["experts"].sent}
    assert [r["sent"]["experts"] for r in results] == [
        scaling.planned(case, results, rank)["experts"][0] for rank in range(2)]  # fmt: skip
