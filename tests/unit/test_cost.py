"""What quantisation costs: the same model twice, with fewer bits the second time."""

import copy
import math

import numpy as np
import pytest
import torch
from test_eval import tiny

from puna.errors import PunaError
from puna.eval import cost
from puna.eval.cost import Scores, costs, score
from puna.precision.quantized import SCHEMES


def test_the_error_of_a_change_is_that_of_paired_windows():
    """Against the delta method written out, and far below the error of either value."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 60, 200)
    nats = tokens * generator.normal(3, 0.5, 200)
    other = nats + tokens * generator.normal(0.01, 0.002, 200)
    (line,) = costs(Scores({"en": (nats, tokens)}, {}), Scores({"en": (other, tokens)}, {}))
    total, change = tokens.sum(), (other - nats).sum() / tokens.sum()
    assert line.before == pytest.approx(math.exp(nats.sum() / total))
    assert line.after == pytest.approx(math.exp(nats.sum() / total + change)) and line.n == total
    literal = sum((b - a - change * t) ** 2 for a, b, t in zip(nats, other, tokens, strict=True))
    assert line.stderr == pytest.approx(line.before * math.sqrt(200 / 199 * literal) / total)
    assert line.stderr < 0.02 * line.before * nats.std() / total * math.sqrt(200)


def test_shares_stand_beside_each_other():
    before, after = Scores({}, {"naming/en": (0.5, 0.05, 100)}), Scores({}, {"naming/en": (0.4, 0.12, 100)})
    (line,) = costs(before, after)
    assert (line.before, line.after, line.n) == (0.5, 0.4, 100) and line.stderr == pytest.approx(0.13)
    assert "-0.1000" in str(line) and "0.1300" in str(line)


def test_fewer_bits_cost_more(tiny_processor, monkeypatch):
    monkeypatch.setattr(cost, "BYTES", 1500)
    torch.set_num_threads(1)
    model, told = tiny(tiny_processor), []
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that bits matter
            parameter.mul_(3)
    before = score(model, tiny_processor, 2, told.append)
    assert told[:2] == ["en", "code"] and {"naming/en", "grounding/iou50", "addition/2digit"} <= set(before.rows)
    changes = []
    for scheme in ("int8", "int4"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".moe.experts." in name:
                    parameter.copy_(SCHEMES[scheme].dequantize(*SCHEMES[scheme].quantize(parameter), torch.float32))
        lines = {line.name: line for line in costs(before, score(other, tiny_processor, 2, told.append))}
        changes.append(abs(lines["perplexity/en"].after - lines["perplexity/en"].before))
    assert 0 < changes[0] < changes[1]


def test_a_model_without_a_tokenizer_is_told_so(tiny_processor):
    with pytest.raises(PunaError, match="--report reads and asks"):
        score(tiny(tiny_processor), None)
