"""Runs beside each other: one axis, true work, every row, every setting that differs; hostile names stay text."""

import json
import re

import pytest
from test_report import HOSTILE, MODEL, line

from puna.cli.main import main
from puna.errors import PunaError
from puna.eval import plots, report
from puna.eval.compare import _differences, _run, compare, configuration
from puna.plan.flops import flops_per_tile, flops_per_token


def make(folder, rate, tokens, value=None, steps=4):
    """A run of a pre-training of `steps` steps of `tokens` tokens, evaluated where there is a value."""
    data = {"seq_len": 64, "weights": {"file:a.b.jsonl": rate}}
    config = {"name": folder.name, "model": MODEL.to_dict(), "pretrain": {"data": data, "train": {"lr": rate}}}
    step = folder / "pretrain" / f"step-{steps:08d}"
    step.mkdir(parents=True)
    spread = {"router/layers": {"max_load": [1.0, 3.0], "entropy": [1.0, 0.2], "dead": [0.0, 0.5]}}
    lines = [line(s, tokens, {"code": 1}, tiles=2, loss=5.0 - s * rate, **spread,
                  **{"router/entropy": 0.6, "grad/experts": 0.3, "grad/head": 0.4}) for s in range(steps)]  # fmt: skip
    lines.append({"step": steps, "eval": "bpb", "bpb/en": 3.0 + rate, "bpb/th": 2.0})
    (folder / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    record = {"model": MODEL.to_dict(), **config["pretrain"]}
    saved = {"format": 1, "config": record, "step": steps, "finished": True, "hashes": {"a": "1"}}
    (step / "run.json").write_text(json.dumps(saved))
    (folder / "config.json").write_text(json.dumps({"asked": {}, "run": config}))
    if value is not None:
        row = {"name": "naming/en", "value": value, "unit": "share", "n": 9, "stderr": 0.1, "chance": 0.0, "goal": None,
               "met": None, "better": "higher", "note": ""}  # fmt: skip
        (folder / "report.json").write_text(json.dumps({"results": [row], "config": config}))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make(tmp_path / "slow", 0.5, 100, 0.25), make(tmp_path / "fast", 1.0, 50)]


def test_the_page_shows_rows_curves_and_differences(runs, tmp_path):
    page = compare(runs, tmp_path / "compare.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    table = re.search(r'id="runs".*?</table>', page, re.S).group()
    assert "slow" in table and ">400" in table and ">200" in table and ">4" in table
    assert "25.0 %" in page and "± 10.0 %" in page and "–" in page  # the other has no report yet
    for axis in ("optimizer steps", "tokens", "FLOPs"):
        assert f"Loss, nats per learned token, over {axis}" in page
        assert f"Bits per byte of held-out text, en, over {axis}" in page
    shown = dict(_differences([_run(folder) for folder in runs]))
    assert shown["pretrain.train.lr"] == ["0.5", "1.0"]
    assert shown["pretrain.data.weights.file:a.b.jsonl"] == ["0.5", "1.0"], "a name with dots is one setting"
    assert set(shown) == {"pretrain.train.lr", "pretrain.data.weights.file:a.b.jsonl"} and "name" not in shown
    assert all(f"<code>{path}</code>" in page for path in shown)


def test_work_is_counted_in_tokens_and_flops(runs):
    run = _run(runs[0])
    done = [each["tokens"] for each, _ in run["points"]]
    assert done == [100, 200, 300, 400]
    each = flops_per_token(MODEL, 64) * 100 + flops_per_tile(MODEL) * 2
    assert [point["flops"] for point, _ in run["points"]] == pytest.approx([each, 2 * each, 3 * each, 4 * each])
    assert run["bits"][0][0] == run["points"][-1][0], "an evaluation stands where the step before it ended"


def test_equal_runs_differ_nowhere_and_are_told_apart_by_their_paths(tmp_path):
    pair = [make(tmp_path / place / "same", 0.5, 100) for place in ("a", "b")]
    page = compare(pair, tmp_path / "c.html").read_text()
    assert "Nowhere." in page and str(pair[0]) in page and str(pair[1]) in page


def test_hostile_names_and_settings_stay_text(tmp_path):
    pair = [make(tmp_path / name, 0.5, 100) for name in ("a", "b<img src=x onerror=alert(1)>")]
    path = pair[1] / "config.json"
    path.write_text(path.read_text().replace("file:a.b.jsonl", json.dumps(HOSTILE)[1:-1]))
    page = compare(pair, tmp_path / "c.html").read_text()
    assert "<img src" not in page and "<script>alert" not in page and "&lt;script&gt;" in page


def test_the_command_takes_one_run_or_several(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "slow", "fast"]) == 0 and "report   compare.html" in capsys.readouterr().out
    assert main(["report", "slow", "fast", "--out", "two.html"]) == 0
    assert (tmp_path / "two.html").read_text() == (tmp_path / "compare.html").read_text()
    assert main(["report", "fast", "--out", "one.html"]) == 0  # not evaluated yet
    page = (tmp_path / "one.html").read_text()
    assert "No goals were set" in page and "Entropy of the load, by layer" in page and "Gradient norm by part" in page
    (tmp_path / "empty").mkdir()
    assert main(["report", "slow", "empty"]) == 1 and "empty is no run" in capsys.readouterr().err
    with pytest.raises(PunaError, match="no stage"):
        _run(tmp_path / "empty")


def test_a_run_of_single_stages_has_the_settings_of_its_stages(runs):
    (runs[0] / "config.json").unlink()
    assert configuration(runs[0])["pretrain"]["train"] == {"lr": 0.5}


def test_layers_over_time_are_a_map(runs):
    """A rectangle for each step and layer; the load's ends are 1 (even) and the highest that was seen."""
    charts = dict((str(title), str(chart)) for title, chart in report.charts(runs[0]))
    load = charts["Busiest expert&#39;s load over the mean, by layer"]
    strengths = re.findall(r'class="heat".*?fill-opacity="([\d.]+)"', load)
    assert strengths == ["0.04"] * 4 + ["1.00"] * 4 and ">3</text>" in load and ">1</text>" in load
    entropy = re.findall(r'fill-opacity="([\d.]+)"', charts["Entropy of the load, by layer"])
    assert entropy == ["1.00"] * 4 + ["0.04"] * 4
    parts = charts["Gradient norm by part"]
    assert ">experts</text>" in parts and ">head</text>" in parts
    assert plots.heat("x", [("0", [])], 0, 1) == ""


def test_each_way_of_balancing_has_its_map_where_it_was_used(runs):
    """The bias in the first stage, the auxiliary loss in the second: both on the axis of all charts."""
    folder = runs[0]
    path = folder / "pretrain" / "metrics.jsonl"
    first = [json.loads(text) for text in path.read_text().splitlines()]
    (folder / "sft").mkdir()
    for stage, name, values in (("pretrain", "bias", [0.0, 0.5]), ("sft", "auxiliary", [1.0, 1.25])):
        lines = [each | {"router/layers": each["router/layers"] | {name: values}} for each in first if "loss" in each]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    charts = dict((str(title), str(chart)) for title, chart in report.charts(folder))
    bias = charts["Balance bias, largest less smallest, in logits, by layer"]
    auxiliary = charts["Auxiliary loss, 1 is even, by layer"]
    assert "Share of tokens that no expert took, by layer" not in charts
    where = []
    for chart in (bias, auxiliary):
        assert re.findall(r'class="heat".*?fill-opacity="([\d.]+)"', chart) == ["0.04"] * 4 + ["1.00"] * 4
        cells = re.findall(r'class="heat" x="([\d.]+)".*?width="([\d.]+)"', chart)
        where.append((float(cells[0][0]), max(float(x) + float(width) for x, width in cells)))
        breaks = [float(x) for x in re.findall(r'class="break" x1="([\d.-]+)"', chart)]
        assert all(plots.LEFT <= x <= plots.WIDTH - plots.RIGHT for x in breaks) and len(breaks) == 2
    assert where[0][0] == plots.LEFT and where[0][1] < where[1][0] + 70 < 400, where
