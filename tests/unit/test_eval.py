"""The evaluation suite: which rows come, what they count, when a goal is met, and what a model that knows or sees
nothing gets."""

import dataclasses
import math

import pytest
import torch

from puna import nursery, tasks
from puna.engine import Engine
from puna.errors import PunaError
from puna.eval import GOALS, GOALS_HOUR, EvalConfig, suite
from puna.eval.config import ROWS, for_minutes, smaller
from puna.eval.rows import Sample, bits_row, chance_row, judge, missing_row, share_row
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.processor import Processor, format_box
from puna.tasks.naming import Naming, shuffled

EYE = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=32, adapter_width=16)
SMALL = EvalConfig(naming=6, naming_languages=1, grounding=2, addition=2, needle=1, needle_length=640, window=64,
                   batch=8, bpb_bytes=500, chance_chars=2000, samples=7)  # fmt: skip
TRAINING = {"text/en": ["Some text of a training."], "code": ["x = 1\n"]}


def tiny(processor, vision=EYE, context=1024):
    config = ModelConfig(
        vocab_size=processor.tokenizer.vocab_size, d_model=32, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=16,
        expert_width=32, dense_width=32, n_experts=2, chunk=64, floor_scale=64, max_context=context,
        patch_token=processor.tokenizer.patch, vision=vision,
    )  # fmt: skip
    model = Llama4(config, seed=1)
    with torch.no_grad():
        model.output.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.4)
    return model.eval()


@pytest.fixture(scope="module")
def measured(tiny_processor):
    """(rows by name in order, samples, rows as told to progress) of a random model."""
    torch.set_num_threads(1)
    told = []
    rows, samples = suite.run(tiny(tiny_processor), tiny_processor, SMALL, lambda name: nursery.texts("en")[:1],
                              progress=told.append)  # fmt: skip
    return {row.name: row for row in rows}, samples, told


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_share_and_its_error_by_hand():
    row = share_row("x", [1.0, 0.0, 0.0, 1.0, 0.0], 0.1, 0.4)
    assert (row.value, row.n, row.chance, row.goal, row.met) == (0.4, 5, 0.1, 0.4, True)
    assert row.stderr == pytest.approx(math.sqrt(0.4 * 0.6 / 5)) and row.better == "higher"
    assert share_row("x", [1.0, 0.0, 0.0], 0.1, 0.34).met is False
    assert share_row("x", [1.0], 0.1, None).met is None


def test_what_must_fall_to_chance_may_lie_two_errors_above_it():
    goal = 0.1 + 2 * math.sqrt(0.1 * 0.9 / 100)  # 0.16
    row = chance_row("x", [1.0] * 16 + [0.0] * 84, 0.1)
    assert row.goal == pytest.approx(goal) and row.met is True and row.better == "lower"
    assert chance_row("x", [1.0] * 17 + [0.0] * 83, 0.1).met is False
    assert chance_row("x", [0.0] * 100, 0.1).met is True


@pytest.mark.parametrize(
    ("bits", "fraction", "goal", "met"),
    [(3.1, 0.2, 3.2, True), (3.3, 0.2, 3.2, False), (3.99, 0.0, 4.0, True), (4.0, 0.0, 4.0, False),
     (1.0, None, None, None), (float("nan"), 0.2, 3.2, False)],
)  # fmt: skip
def test_bits_are_judged_against_a_fraction_of_chance(bits, fraction, goal, met):
    row = bits_row("bpb/en", bits, 10, 0.1, 4.0, fraction)
    assert row.met is met and row.goal == (None if goal is None else pytest.approx(goal))
    assert (row.better, row.unit, row.n) == ("lower", "bits/byte", 10)


def test_what_was_not_measured_does_not_meet_its_goal():
    row = missing_row("grounding/iou50", "share", 0.5, "why")
    assert (row.value, row.goal, row.met, row.n, row.note) == (None, 0.5, False, 0, "why")
    assert missing_row("x", "share", None, "").met is None
    bits = missing_row("bpb/en", "bits/byte", 0.2, "")
    assert bits.met is False and bits.goal is None, "a fraction of chance is no goal in bits"
    assert judge(0.5, 0.5, "higher") and judge(0.5, 0.5, "lower") and not judge(math.inf, 0.5, "higher")


# ---- goals ----------------------------------------------------------------------------------------------------------


def test_an_hour_raises_goals_and_items_and_less_lowers_nothing():
    config = EvalConfig()
    assert config.goals == GOALS and for_minutes(config, 59.9) is config and for_minutes(config, 1) is config
    hour = for_minutes(config, 60)
    assert hour.goals == GOALS_HOUR and GOALS_HOUR.keys() > GOALS.keys()
    assert all(GOALS_HOUR[name] >= goal for name, goal in GOALS.items())
    assert any(GOALS_HOUR[name] > goal for name, goal in GOALS.items())
    counts = ("naming", "naming_languages", "grounding", "addition", "needle")
    assert all(getattr(hour, name) >= getattr(config, name) for name in counts)
    assert hour.grounding > config.grounding and hour.needle > config.needle


def test_a_higher_goal_or_count_of_ones_own_is_never_lowered():
    own = dataclasses.replace(EvalConfig(), goals={"naming/en": 0.9, "bpb/th": 0.4}, grounding=1000)
    hour = for_minutes(own, 240)
    assert hour.goals["naming/en"] == 0.9 and hour.goals["bpb/th"] == 0.4 and hour.grounding == 1000
    assert hour.goals["addition/2digit"] == GOALS_HOUR["addition/2digit"]


def test_a_smoke_run_asks_less_but_expects_the_same():
    small = smaller(EvalConfig())
    assert small.goals == GOALS and small.languages == EvalConfig().languages
    assert small.naming < EvalConfig().naming and small.bpb_bytes and smaller(SMALL).naming == SMALL.naming


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"goals": {"naming/enn": 1.0}}, "did you mean 'naming/en'"), ({"goals": {"naming/en": 35.0}}, "0..1"),
     ({"languages": ("xx",)}, "no language 'xx'"), ({"naming": 1}, "at least 2"), ({"window": 1}, "at least 2"),
     ({"samples": -1}, "not be negative")],
)  # fmt: skip
def test_impossible_settings_are_refused(changes, match):
    with pytest.raises(PunaError, match=match):
        EvalConfig(**changes)


# ---- the suite ------------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_measured(measured):
    rows, samples, told = measured
    assert rows.keys() == {*ROWS, "naming/en/shuffled"} and list(rows.values()) == told
    for name, row in rows.items():
        assert row.value is not None and row.n > 0 and math.isfinite(row.value), name
        assert 0 <= row.chance <= 1 or row.unit == "bits/byte"
        own = SMALL.goals.get(name)
        if row.unit == "bits/byte":
            assert row.goal == (None if own is None else pytest.approx(row.chance * (1 - own)))
        elif not name.endswith("shuffled"):
            assert row.goal == own
    assert [rows[name].n for name in ("naming/en", "naming/en/shuffled", "naming/de")] == [6, 6, 1]
    assert [rows[name].n for name in ("grounding/iou50", "addition/2digit", "needle/2x")] == [2, 2, 1]
    assert rows["naming/en/shuffled"].chance == rows["naming/en"].chance == 1 / 6
    assert rows["needle/2x"].note == "640 tokens"


def test_samples_are_first_items_of_the_test_right_or_wrong(measured):
    samples = measured[1]
    assert len(samples) == SMALL.samples
    assert {s.row.split("/")[0] for s in samples} == {"naming", "grounding", "addition", "needle"}
    first = list(Naming("en").items("test"))[:3]
    shown = [s.item.answer for s in samples if s.row == "naming/en"]
    assert shown == [item.answer for item in first][: len(shown)]
    for sample in samples:
        again = Sample.from_dict(sample.to_dict())
        assert (again.row, again.text, again.grade, again.item) == (sample.row, sample.text, sample.grade, sample.item)


def test_no_kind_of_sample_crowds_another_out():
    rows = ["naming/ar", "naming/en", "naming/en", "grounding/iou50", "grounding/iou50", "needle/2x"]
    samples = [Sample(row, None, str(i), 0.0) for i, row in enumerate(rows)]
    assert [s.text for s in suite.chosen(samples, 3)] == ["0", "3", "5"]
    assert [s.text for s in suite.chosen(samples, 5)] == ["0", "1", "3", "4", "5"]
    assert suite.chosen(samples, 99) == samples and suite.chosen(samples, 0) == []


def test_a_model_without_eyes_or_room_gets_rows_without_values(tiny_processor):
    model = tiny(tiny_processor, vision=None, context=512)
    config = dataclasses.replace(SMALL, goals=GOALS_HOUR)
    rows, samples = suite.run(model, Processor(tiny_processor.tokenizer), config, TRAINING, quiet=True)
    by_name = {row.name: row for row in rows}
    assert by_name.keys() == set(ROWS)
    for name in [name for name in ROWS if name.startswith(("naming", "grounding"))]:
        assert by_name[name].value is None and "text only" in by_name[name].note
    assert by_name["naming/en"].met is by_name["grounding/iou50"].met is False and by_name["naming/de"].met is None
    assert by_name["needle/2x"].value is None and "512" in by_name["needle/2x"].note
    assert by_name["needle/2x"].met is False
    assert by_name["addition/2digit"].value is not None and by_name["bpb/en"].value is not None
    assert by_name["bpb/de"].value is None and by_name["bpb/de"].met is False, "no training text, no chance level"
    assert {sample.row for sample in samples} == {"addition/2digit"}


def answers(monkeypatch, oracle):
    monkeypatch.setattr(suite, "answer", lambda engine, items, max_tokens: [oracle(item) for item in items])


def solved(monkeypatch, processor, oracle):
    answers(monkeypatch, oracle)
    config = dataclasses.replace(SMALL, languages=("en", "de"), goals=GOALS_HOUR, bpb_bytes=100, naming=40)
    rows, _ = suite.run(tiny(processor), processor, config, TRAINING, quiet=True)
    return {row.name: row for row in rows}


def test_who_knows_all_answers_meets_the_goals_but_not_by_looking(monkeypatch, tiny_processor):
    """An oracle that repeats the expected answer is right with exchanged pictures too: that row catches it."""
    rows = solved(monkeypatch, tiny_processor, lambda item: item.messages[-1]["content"])
    for name in ("naming/en", "grounding/iou50", "addition/2digit", "needle/2x"):
        assert rows[name].value == 1 and rows[name].met is True and rows[name].stderr == 0, name
    assert rows["naming/de"].value == 1 and rows["naming/de"].met is None
    assert rows["naming/en/shuffled"].value == 1 and rows["naming/en/shuffled"].met is False


def test_who_looks_falls_to_chance_when_pictures_are_exchanged(monkeypatch, tiny_processor):
    names = {concept.id: concept.names["en"] for concept in nursery.concepts()}

    def look(item):
        if item.meta["task"] == "naming":
            return names[item.pictures[0].concept]
        return format_box("thing", (0, 0, 999, 999)) if item.meta["task"] == "grounding" else "7 and 8 are 999"

    rows = solved(monkeypatch, tiny_processor, look)
    assert rows["naming/en"].value == 1 and rows["naming/en"].met is True
    assert rows["naming/en/shuffled"].value <= 0.05 and rows["naming/en/shuffled"].met is True
    for name in ("grounding/iou50", "addition/2digit", "needle/2x"):
        assert rows[name].value == 0 and rows[name].met is False, name


def test_exchanged_pictures_keep_questions_and_never_show_the_thing_asked():
    items = list(Naming("en").items("test"))[:40]
    mixed = shuffled(items)
    assert len(mixed) == 40 and {i.answer for i in mixed} == {i.answer for i in items}
    assert all(item.pictures[0].concept != item.meta["concept"] for item in mixed)
    assert {i.pictures[0].concept for i in mixed} == {i.meta["concept"] for i in items}


def test_answers_are_greedy_and_stop_at_their_length(tiny_processor):
    model = tiny(tiny_processor)
    engine, tokenizer = Engine(model, tiny_processor, max_batch=4), tiny_processor.tokenizer
    items = [*tasks.Addition().items("test")][:2] + [*Naming("en").items("test")][:2]
    banned = sorted(set(tokenizer.special.values()) - set(tokenizer.stop_ids))
    for item, text in zip(items, suite.answer(engine, items, 6), strict=True):
        encoded = tiny_processor.encode_chat(item.prompt, generation_prompt=True)
        ids, made = encoded.tokens.tolist(), []
        for _ in range(6):
            with torch.no_grad():
                logits = model(torch.tensor([ids + made]), tiny_processor.tiles(encoded.pictures))[0, -1]
            logits[banned] = -math.inf
            if (token := int(logits.argmax())) in tokenizer.stop_ids:
                break
            made.append(token)
        assert text == tokenizer.decode(made), item.prompt
    assert suite.answer(engine, items, 6) == suite.answer(engine, items, 6)


def test_the_model_is_given_back_as_it_was(tiny_processor):
    model = tiny(tiny_processor, vision=None, context=256).train()
    model.compute_dtype = torch.bfloat16
    config = dataclasses.replace(SMALL, languages=("en",), bpb_bytes=50)
    suite.run(model, Processor(tiny_processor.tokenizer), config, TRAINING, quiet=True)
    assert model.compute_dtype is torch.bfloat16 and model.training
    with pytest.raises(ZeroDivisionError):
        suite.run(model, Processor(tiny_processor.tokenizer), config, lambda name: 1 / 0, quiet=True)
    assert model.compute_dtype is torch.bfloat16
