"""FP8 training under FSDP2 and expert parallelism: the step of one process."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from training_helpers import CONFIG, lively_model, random_batch  # noqa: E402

from puna.parallel.apply import build_model, parts_of  # noqa: E402
from puna.parallel.layout import Layout  # noqa: E402
from puna.parallel.mesh import Mesh  # noqa: E402
from puna.precision import fp8_training  # noqa: E402
from puna.train.step import train_step  # noqa: E402
from puna.train.terms import NextToken  # noqa: E402

SHAPE = dataclasses.replace(CONFIG, expert_width=32)


def stepped(model, batch, fp8, mesh=None):
    fp8_training.attach(model.train(), fp8)
    return train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), [batch], NextToken(), 1e9, 1000, mesh)


def of_many(rank, layout, fp8):
    """(loss, this process's weights with their parts)."""
    mesh = Mesh(Layout(**layout).resolve(2))
    weights = dict(lively_model(config=SHAPE).named_parameters())
    model = build_model(SHAPE, mesh, lambda name, part: part.cut(weights[name].detach()))
    result = stepped(model, random_batch().split(mesh.layout.rows)[mesh.rows_index], fp8, mesh)
    parts = parts_of(model)
    return result.loss, {name: (parts[name], p.detach().to_local().clone()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=["fsdp", "ep"])
def test_rowwise_is_the_step_of_one_process(pool, layout):
    """A row's scale is its own, so a token's loss does not depend on who shares its process. Weight gradients do, in
    their rounding: a column's scale is that of the process's tokens."""
    alone, plain = lively_model(config=SHAPE), lively_model(config=SHAPE)
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    expected, other = stepped(alone, random_batch(), "rowwise"), stepped(plain, random_batch(), "off")
    found = pool.run(of_many, 2, layout, "rowwise", timeout=240)
    assert all(loss == pytest.approx(expected.loss, rel=1e-5) for loss, _ in found)
    assert abs(expected.loss - other.loss) > 1e-4 * expected.loss, "FP8 is another step"
    weights = dict(alone.named_parameters())
    for _, own in found:
        for name, (part, value) in own.items():
            moved = (part.cut(weights[name].detach()) - part.cut(before[name])).norm()
            assert float((value - part.cut(weights[name].detach())).norm()) <= 0.1 * float(moved) + 1e-7, name
