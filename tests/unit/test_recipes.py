"""Recipes for every duration: whole, consistent configurations; steps in proportion to time and speed; goals that only
rise; files of one's own."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from puna import life, recipes, tasks
from puna.data.mixture import quotas
from puna.data.sources import _check, names
from puna.errors import PunaError
from puna.eval import GOALS, GOALS_HOUR
from puna.fields import build, to_dict
from puna.stages import RunConfig

MINUTES = (None, 0.5, 1, 12, 26, 28, 60, 600)
EVERY = [(name, minutes) for name in recipes.RECIPES for minutes in MINUTES]


def stages(run):
    return {name: getattr(run, name) for name in run.stages}


@pytest.mark.parametrize(("name", "minutes"), EVERY)
def test_every_recipe_is_a_whole_run_for_every_duration(name, minutes):
    run = recipes.get(name, minutes)
    assert isinstance(run, RunConfig) and run.name == name and run.speed > 0
    assert run.minutes == (60 if minutes is not None and minutes > 27 else 12), "the table nearest in proportion"
    assert build(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    for stage, part in stages(run).items():
        train = part.train
        for weights in (part.data.weights, *(phase.weights for phase in part.data.then)):
            assert 0.97 <= sum(weights.values()) <= 1.03, (stage, sum(weights.values()))
            assert set(weights) <= set(names()) and all(weight > 0 for weight in weights.values()), stage
            assert min(quotas(weights).values()) >= 1, f"a source of {stage} would never be read"
        part.data.mixture(dict.fromkeys(part.data.used, 1000), train.steps, train.rows)
        assert part.data.seq_len <= run.model.max_context
        assert part.data.seq_len % run.model.chunk == 0 or part.data.seq_len < run.model.chunk
        assert 0 < train.warmup < train.steps and train.checkpoint_every <= train.steps
    seeds = {part.data.seed for part in stages(run).values()}
    assert len(seeds) == len(run.stages), "stages read their items in another order"


@pytest.mark.parametrize(("name", "minutes"), [(name, m) for name in recipes.RECIPES for m in (12, 60)])
def test_every_option_is_one_that_its_source_takes(name, minutes):
    for part in stages(recipes.get(name, minutes)).values():
        for source, options in part.data.options.items():
            _check(source, options)
            own = {key: value for key, value in options.items() if key not in ("items", "level")}
            if source in tasks.DOCUMENTS:
                tasks.DOCUMENTS[source](**own)
            elif source == "sft/needle":
                tasks.task("needle", **{"length": part.data.seq_len - 30, "count": lambda text: len(text) // 3} | own)
            elif source.startswith("sft/"):
                tasks.task(source.removeprefix("sft/"), **own)
            if "languages" in options:
                assert sum(options["languages"].values()) == pytest.approx(1)


def test_the_herd_differs_in_its_experts():
    scout, maverick = (recipes.get(name).model for name in ("nano_scout", "nano_maverick"))
    assert (scout.n_experts, maverick.n_experts) == (16, 128)
    assert len(scout.moe_layers) == scout.n_layers and len(maverick.moe_layers) == maverick.n_layers // 2


# ---- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_its_own_time_on_its_own_machine_changes_nothing(name):
    run = recipes.get(name)
    assert life.for_minutes(run, run.minutes, run.speed) == run


@pytest.mark.parametrize(("minutes", "speed", "scale"), [
    (24, 1, 2), (6, 1, 0.5), (12, 1.5, 1.5), (12, 0.8, 0.8), (12, 40, 2), (12, 0.01, 0.5), (3, 2, 0.5), (48, 0.5, 2),
])  # fmt: skip
def test_steps_follow_time_and_speed_within_a_factor_of_two(minutes, speed, scale):
    run = recipes.get("nano_scout", 12)
    made = life.for_minutes(run, minutes, speed * run.speed)
    assert made.minutes == minutes
    for stage, part in stages(made).items():
        own = getattr(run, stage)
        assert part.train.steps == round(own.train.steps * scale)
        assert part.train.checkpoint_every == round(own.train.checkpoint_every * scale)
        assert part.train.warmup == round(own.train.warmup * min(1, scale)), "a longer run needs no longer warm-up"
        assert part.data.weights == own.data.weights and part.data.seq_len == own.data.seq_len
        same = ("steps", "warmup", "checkpoint_every", "eval_every")
        assert dataclasses.replace(part.train, **{key: getattr(own.train, key) for key in same}) == own.train
        for source, options in own.data.options.items():
            items = part.data.options[source].get("items")
            assert items == (round(options["items"] * scale) if "items" in options else None)
            assert {**part.data.options[source], "items": 0} == {**options, "items": 0} or "items" not in options
    assert (made.model, made.tokenizer, made.seed) == (run.model, run.tokenizer, run.seed)


def test_the_shortest_life_still_has_every_stage():
    run = recipes.get("nano_scout", 0.001)
    made = life.for_minutes(run, 0.001, run.speed)
    for part in stages(made).values():
        assert part.train.steps == 2 and min(part.train.warmup, part.train.checkpoint_every, part.train.eval_every) == 1
        assert all(options.get("items", 64) == 64 for options in part.data.options.values())
    assert made.eval.naming < run.eval.naming and made.eval.goals == GOALS, "a smoke run's own, short evaluation"


def test_a_long_life_reads_at_most_four_times_the_items():
    run = recipes.get("nano_scout", 600)
    made = life.for_minutes(run, 600, run.speed)
    assert made.sft.train.steps == 10 * run.sft.train.steps
    assert made.sft.data.options["sft/naming"]["items"] == 4 * run.sft.data.options["sft/naming"]["items"]


@pytest.mark.parametrize(("minutes", "goals"), [(12, GOALS), (59, GOALS), (60, GOALS_HOUR), (300, GOALS_HOUR)])
def test_an_hour_has_an_hours_goals(minutes, goals):
    run = recipes.get("nano_scout", minutes)
    assert life.for_minutes(run, minutes, run.speed).eval.goals == goals


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_impossible_durations_are_refused(minutes):
    with pytest.raises(PunaError, match="--minutes must be positive"):
        life.for_minutes(recipes.get("nano_scout"), minutes, 1000)


def test_minutes_become_steps_once(tmp_path, monkeypatch):
    """The machine is measured when a run begins; what config.json says then holds, however fast it is later."""
    speeds = iter([2 * recipes.get("nano_scout").speed])
    monkeypatch.setattr(life, "probe", lambda run, steps=3: next(speeds))
    run = recipes.get("nano_scout", 12)
    first = life.resolve(run, tmp_path, 12)
    assert first.sft.train.steps == 2 * run.sft.train.steps
    assert life.resolve(run, tmp_path, 12) == first, "measured again"
    for other, minutes in ((run, 13), (run, None), (dataclasses.replace(run, seed=1), 12)):
        with pytest.raises(PunaError, match="begun with another .*--name, or --fresh"):
            life.resolve(other, tmp_path, minutes)
    assert life.resolve(run, tmp_path / "plain", None) == run, "without minutes nothing is scaled"


@pytest.mark.parametrize("minutes", [12, 60])
def test_the_probe_measures_the_recipes_own_batch(minutes, monkeypatch):
    run = recipes.get("nano_scout", minutes)
    small = dataclasses.replace(run.model, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, expert_width=32,
                                vocab_size=400, n_experts=2, vision=None)  # fmt: skip
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0])  # steps of 4, 2 and 5 seconds
    monkeypatch.setattr(life.time, "perf_counter", lambda: next(clock))
    fed = []
    monkeypatch.setattr(life, "train_step", lambda *args, workers: fed.append(
        ([batch.tokens_BT.shape for batch in args[2]], len(workers.models) if workers else 1)))  # fmt: skip
    speed = life.probe(dataclasses.replace(run, model=small))
    shape = (run.pretrain.train.rows, run.pretrain.data.seq_len)
    parts = run.pretrain.train.accumulate
    assert fed == [([(shape[0] // parts, shape[1])] * parts, run.pretrain.train.workers)] * 3
    assert parts == (2 if minutes == 60 else 1)
    assert speed == shape[0] * shape[1] / 2.0, "the fastest step counts"


# ---- recipes of one's own -------------------------------------------------------------------------------------------

OWN = "from puna.recipes import nano_scout\n\n\ndef recipe({}):\n    return nano_scout({})\n"


def test_a_file_is_told_how_long_the_run_is_to_be_if_it_asks(tmp_path):
    asks, ignores = tmp_path / "asks.py", tmp_path / "ignores.py"
    asks.write_text(OWN.format("minutes=None", "minutes"))
    ignores.write_text(OWN.format("", "60"))
    for minutes in (None, 12, 60):
        assert recipes.get(str(asks), minutes) == recipes.get("nano_scout", minutes)
        assert recipes.get(str(ignores), minutes) == recipes.get("nano_scout", 60)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("x = 1\n", r"mine.py must define a function recipe\(\) that returns a RunConfig"),
        ("def recipe():\n    return {}\n", r"mine.py must define a function recipe\(\)"),
        ("def recipe(:\n", "mine.py, line 1: SyntaxError"),
        ("\n\nimport no_such_module\n", "mine.py, line 3: ModuleNotFoundError"),
        ("def recipe():\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero; mend it"),
        ("def recipe(a, b):\n    pass\n", "mine.py: TypeError"),
        ("from puna.errors import PunaError\nraise PunaError('own words')\n", "^own words$"),
    ],
)
def test_a_wrong_file_is_a_mistake_with_its_place(tmp_path, text, match):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(PunaError, match=match) as caught:
        recipes.get(str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)


def test_wrong_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(PunaError, match="unknown recipe 'nano_maverik'; did you mean 'nano_maverick'"):
        recipes.get("nano_maverik")
    with pytest.raises(PunaError, match="no recipe file .*gone.py"):
        recipes.get(str(tmp_path / "gone.py"))
    with pytest.raises(PunaError, match="unknown stage 'rl': choose from vision, pretrain, midtrain, sft"):
        recipes.get("nano_scout").stage("rl")


def test_the_view_of_a_stage_is_that_stages():
    run = recipes.get("nano_maverick")
    for name in run.stages:
        view, part = run.stage(name), getattr(run, name)
        assert (view.stage, view.data, view.train, view.model) == (name, part.data, part.train, run.model)
        assert view.with_model(SimpleNamespace()).model != run.model
