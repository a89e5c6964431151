"""The report: report.json holds every row and what each stage cost; report.html is one page that loads nothing, runs
nothing, and shows answers, boxes, pictures and curves."""

import base64
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from puna.errors import PunaError
from puna.eval import Sample, plots, report
from puna.eval.record import capability, read_report
from puna.eval.rows import bits_row, chance_row, missing_row, share_row
from puna.model import ModelConfig, VisionConfig
from puna.plan.flops import flops_per_tile, flops_per_token
from puna.processor import format_box
from puna.tasks import Grounding, Item, Naming
from puna.tasks.base import assistant, user

EYE = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=32, adapter_width=16)
MODEL = ModelConfig(400, 32, 4, 2, 1, 16, 32, 32, 2, chunk=64, max_context=256, patch_token=5, vision=EYE)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; javascript:"
CONFIG = {"name": "tiny", "model": MODEL.to_dict(), "sft": {"data": {"seq_len": 128}}, "note": HOSTILE}


def line(step, tokens, sources, **more):
    return {"step": step, "loss": 3.0 - step, "lr": 1e-3, "grad_norm": 0.5, "tokens": tokens, "valid": tokens // 2,
            "seconds": 0.25, "skipped": False, "sources": sources, "router/max_load": 1.5, "router/dead": 0.0,
            "router/flip_share": 0.1} | more  # fmt: skip


PRETRAIN = [
    line(0, 100, {"captions": 1, "text/en": 1}, source_tokens={"captions": 75, "text/en": 25}, tiles=3),
    line(1, 100, {"code": 2}, source_tokens={"code": 100}, tiles=0, loss=None, skipped=True),
    line(2, 50, {"captions": 2}, source_tokens={"captions": 50}, tiles=4),
    {"step": 3, "eval": "bpb", "bpb/en": 4.0, "bpb/code": 5.0, "bpb/th": None},
]
SFT = [line(s, 40, {"sft/naming": 1, "sft/addition": 2, "text/de": 1}) for s in range(3)]  # before tokens were counted


def asked(question, answer, *pictures):
    return Item([user(question, *pictures), assistant(answer)], answer)


@pytest.fixture(scope="module")
def pictures():
    """A picture of one thing, and a scene."""
    return next(Naming("en").items("test")).pictures[0], next(Grounding().items("test")).pictures[0]


@pytest.fixture
def run(tmp_path, pictures):
    """A run's folder with two stages, and what its report holds."""
    folder = tmp_path / "tiny"
    for stage, lines in (("pretrain", PRETRAIN), ("sft", SFT)):
        step = folder / stage / "step-00000003"
        step.mkdir(parents=True)
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + '{"step": 9')
        record = {"model": MODEL.to_dict(), "data": {"seq_len": 64 if stage == "pretrain" else 128}}
        saved = {"format": 1, "config": record, "step": 3, "finished": True, "hashes": {"b": "22", "a": stage}}
        (step / "run.json").write_text(json.dumps(saved))
    thing, scene = pictures
    right, said = format_box("dog", (100, 200, 300, 500)), format_box("<b>", (0, 1, 998, 999))
    samples = [
        Sample("naming/en", asked("What is this?", "pizza", thing), "pizza", 1.0),
        Sample("grounding/iou50", asked("Where is the dog?", right, scene), f"Here: {said}", 0.0),
        Sample("addition/2digit", asked(HOSTILE, HOSTILE), HOSTILE, 0.0),
        Sample("needle/2x", asked("word " * 500, "12345"), "", 0.0),
    ]
    rows = [
        share_row("naming/en", [1.0, 0.0, 1.0, 1.0], 0.1, 0.35), chance_row("naming/en/shuffled", [0.0] * 4, 0.1),
        share_row("addition/2digit", [0.0, 0.0], 0.05, 0.8, HOSTILE), share_row("naming/de", [1.0], 0.1, None),
        bits_row("bpb/en", 3.0, 99, 0.1, 5.0, 0.2), bits_row("bpb/th", float("inf"), 99, 0.1, 5.0, 0.0),
        missing_row("needle/2x", "share", 0.8, "too long"),
    ]  # fmt: skip
    values = report.write(folder, rows, samples, CONFIG, {"pretrain": 60.0, "sft": 30.0})
    return folder, values


class Page(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def find(self, tag, **wanted):
        wanted = {key.removesuffix("_"): value for key, value in wanted.items()}
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture
def page(run):
    return Page((run[0] / "report.html").read_text(encoding="utf-8"))


# ---- report.json ----------------------------------------------------------------------------------------------------


def test_report_json_is_what_was_returned_and_plain_json(run):
    folder, values = run
    text = (folder / "report.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == values
    assert read_report(folder) == values
    assert {"commit", "versions", "device", "config", "seconds", "results", "samples", "model", "stages"} <= set(values)
    assert values["seconds"] == 90.0 and values["parts"] == {"pretrain": 60.0, "sft": 30.0}
    assert values["versions"].keys() >= {"python", "torch", "puna"} and values["device"]["cpu"]
    assert values["config"] == CONFIG | {"model": json.loads(json.dumps(MODEL.to_dict()))}


def test_every_row_tells_value_error_chance_goal_and_verdict(run):
    rows = {row["name"]: row for row in run[1]["results"]}
    keys = {"name", "value", "n", "stderr", "chance", "goal", "met", "unit", "better"}
    assert len(rows) == 7 and all(keys <= row.keys() for row in rows.values())
    naming = rows["naming/en"]
    assert (naming["value"], naming["n"], naming["chance"], naming["goal"], naming["met"]) == (0.75, 4, 0.1, 0.35, True)
    assert naming["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert rows["bpb/en"]["goal"] == 4.0 and rows["bpb/en"]["met"] is True and rows["bpb/en"]["better"] == "lower"
    assert rows["bpb/th"]["value"] is None and rows["bpb/th"]["met"] is False, "infinity is no JSON number"
    assert rows["needle/2x"]["value"] is None and rows["needle/2x"]["met"] is False
    assert rows["naming/de"]["met"] is None


def test_stages_count_tokens_seconds_tiles_and_flops(run):
    stages = run[1]["stages"]
    assert list(stages) == ["pretrain", "sft"]
    first, second = stages.values()
    assert (first["steps"], first["tokens"], first["valid"], first["tiles"], first["skipped"]) == (3, 250, 125, 7, 1)
    assert first["seconds"] == 0.75 and first["loss"] == 1.0 and first["seq_len"] == 64 and second["seq_len"] == 128
    assert first["sources"] == {"captions": 125, "code": 100, "text/en": 25}
    assert first["capabilities"] == {"pictures": 125, "code": 100, "languages": 25}
    assert first["flops"] == pytest.approx(flops_per_token(MODEL, 64) * 250 + flops_per_tile(MODEL) * 7)
    assert second["capabilities"] == {"addition": 60, "languages": 30, "naming": 30}, "by rows where tokens are missing"
    assert second["flops"] == pytest.approx(flops_per_token(MODEL, 128) * 120) and "tiles" not in second
    sources = ("long/code", "sft/needle", "file:my/data.txt", "text/th", "captions", "code")
    words = ["long documents", "needle", "own files", "languages", "pictures", "code"]
    assert [capability(name) for name in sources] == words


def test_the_model_is_named_by_the_last_stages_weights(run):
    model = run[1]["model"]
    assert model["sha256"] == hashlib.sha256(b"a sft\nb 22").hexdigest()
    assert model["checkpoint"] == "sft/step-00000003" and model["finished"] is True and model["name"] == "tiny"
    assert model["experts"] == 2 and model["total"] > model["active"] > model["vision"] > 0


def test_a_run_without_stages_or_model_has_a_report_too(tmp_path):
    values = report.write(tmp_path, [share_row("addition/2digit", [1.0], 0.1, None)], [], {"any": 1}, 5)
    text = Page((tmp_path / "report.html").read_text()).text
    assert values["stages"] == {} and values["seconds"] == 5 and "No goals were set" in text


# ---- report.html ----------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_and_runs_nothing(run, page):
    text = (run[0] / "report.html").read_text(encoding="utf-8")
    loading = {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "img", "use", "meta"}
    tags = [(tag, a) for tag, a in page.tags if tag in loading]
    assert all(tag == "meta" and "http-equiv" not in a for tag, a in tags), tags
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
        assert "url(" not in attributes.get("style", "")
    assert "url(" not in report.STYLE and "@import" not in report.STYLE and text.count("<style>") == 1
    assert sorted(p.name for p in run[0].iterdir()) == ["pretrain", "report.html", "report.json", "sft"]


def test_hostile_text_stays_text(page):
    """It came as a question, an answer, an expected answer, a note and in the configuration."""
    assert page.text.count("<script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; javascript:") >= 4
    assert not page.find("script") and not page.find("img") and not page.find("b", label="")


def test_a_hostile_name_of_a_model_or_a_source_stays_text(tmp_path):
    (tmp_path / "pretrain").mkdir()
    lines = [line(0, 10, {f"file:{HOSTILE}": 1}), {"step": 1, "eval": "bpb", f"bpb/{HOSTILE}": 3.0}]
    (tmp_path / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report.write(tmp_path, [share_row(f"naming/{HOSTILE}", [1.0], 0.1, None)], [], CONFIG | {"name": HOSTILE}, 1)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("<script>alert(1)</script>") >= 4 and not page.find("script") and not page.find("img")


def test_the_first_line_says_which_goals_were_missed(page):
    text = " ".join(page.text.split())
    assert "3 of 6 goals met." in text
    missed = text[text.index("Not met:") :].partition("What was measured")[0]
    assert "addition/2digit (0.0 %, goal ≥ 80.0 %)" in missed and "needle/2x (not measured, goal ≥ 80.0 %)" in missed
    assert "bpb/th" in missed and "naming/en" not in missed and "bpb/en" not in missed


def test_pictures_are_embedded_as_the_model_was_shown_them(page, pictures):
    shown = [a["href"] for a in page.find("image")]
    assert len(shown) == 2
    for data, picture in zip(shown, pictures, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(data.partition("base64,")[2])))
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(picture.open()))


def test_boxes_are_drawn_where_they_were_said_and_where_they_are(page):
    place = ("x", "y", "width", "height")
    assert [[a[k] for k in place] for a in page.find("rect", class_="true")] == [["100", "200", "200", "300"]]
    assert [[a[k] for k in place] for a in page.find("rect", class_="said")] == [["0", "1", "998", "998"]]


def test_long_questions_are_cut_and_empty_answers_shown(page):
    text = " ".join(page.text.split())
    assert "[2,500 characters] …" in text and "(nothing)" in text and text.count("word word") < 60
    assert "wrong · expected 12345" in text


def test_curves_go_through_all_stages(page):
    titles = ["Loss, nats per learned token", "Bits per byte of held-out text, by language", "Tokens per second",
              "Busiest expert, load over the mean", "Gradient norm before clipping", "Learning rate"]  # fmt: skip
    assert all(title in page.text for title in titles)
    charts = page.find("svg", class_="chart")
    assert len(charts) == 8 and all(a["aria-label"] for a in charts)
    loss = page.find("polyline", class_="line t0 faint")[0]["points"].split()
    assert len(loss) == 5, "five steps had a finite loss"
    assert [float(point.partition(",")[0]) for point in loss] == sorted(float(p.partition(",")[0]) for p in loss)
    assert len(page.find("line", class_="break")) >= 2 and "pretrain" in page.text
    assert page.find("circle"), "an evaluation that was made once is a dot"


def test_the_page_can_be_made_again_and_only_of_a_whole_report(run, tmp_path):
    folder, _ = run
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert report.rebuild(folder) == folder / "report.html" and (folder / "report.html").read_bytes() == before
    (folder / "report.json").write_text('{"results": [')
    with pytest.raises(PunaError, match=re.escape(f"{folder / 'report.json'} can't be read")):
        report.rebuild(folder)
    with pytest.raises(PunaError, match="has no report.json: run `puna raise`"):
        report.rebuild(tmp_path)


def test_a_full_disk_keeps_the_report_before(run, monkeypatch):
    folder, values = run
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PunaError, match="can't write .*report.html: No space left on device; free some disk space"):
        report.write(folder, [], [], CONFIG, 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


# ---- charts ---------------------------------------------------------------------------------------------------------


def test_many_points_become_means_of_equal_runs():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    few = plots.thin(points, 100)
    assert len(few) == 100 and few[0] == (4.5, 0.5) and plots.thin(points[:100], 100) == points[:100]


def test_smoothing_is_unbiased_and_leaves_constants_alone():
    flat = [(float(i), 3.0) for i in range(200)]
    assert plots.smooth(flat) == [(x, pytest.approx(3.0)) for x, _ in flat]
    keep = 1 - 1 / (0.05 * 40)
    first, second = plots.smooth([(0, 1.0), (1, 5.0)] + [(i, 0.0) for i in range(2, 40)])[:2]
    assert first[1] == pytest.approx(1.0)
    assert second[1] == pytest.approx((keep * (1 - keep) * 1 + (1 - keep) * 5) / (1 - keep**2))


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (3.1, 3.2), (0, 12_345), (-2, 5)):
        found = plots.ticks(low, high)
        assert 2 <= len(found) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found), (low, high, found)
    assert [plots.number(x) for x in (12_345, 0.02, 2.5e6, 3e9, 999)] == ["12.3k", "0.02", "2.5M", "3G", "999"]


def test_what_is_not_finite_is_left_out_and_nothing_is_no_chart():
    assert plots.finite([(0, 1.0), (1, None), (2, float("nan")), (3, float("inf"))]) == [(0, 1.0)]
    assert plots.line_chart("x", [plots.Series("a", [])]) == ""
    assert 'aria-label="&lt;x&gt;"' in plots.line_chart("<x>", [plots.Series("<y>", [(0, 1.0), (1, 1.0)])])
