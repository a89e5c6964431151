"""Recipes and settings from the command line: `puna raise nano_scout --pretrain.train.steps 100`.

A configuration is a tree; `--a.b.c VALUE` (or `--a.b.c=VALUE`) replaces one leaf, or a whole branch given as JSON.
Anything with a dot in its name is a setting, so these words are taken out before argparse sees the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import PunaError
from puna.fields import build, differences, nearest, override, to_dict

if TYPE_CHECKING:
    from puna.stages import RunConfig, StageRun

RUNS = Path("runs")


def split_overrides(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other words, [(path, text)]) of a command line. PunaError is not raised: a setting without a value gets
    the text '', which its type refuses."""
    rest: list[str] = []
    found: list[tuple[str, str]] = []
    i = 0
    while i < len(words):
        word = words[i]
        if word == "--":
            rest += words[i:]
            break
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and re.match(r"[a-z_]+\.", name):
            if not equals:
                i += 1
                value = words[i] if i < len(words) else ""
            found.append((name, value))
        else:
            rest.append(word)
        i += 1
    return rest, found


def apply(values: dict, overrides: list[tuple[str, str]]) -> dict:
    """Sets each override in `values`, which is changed and returned.

    Where a whole mixture is given (`--data.weights '{"file:mine.jsonl": 1}'`), later phases (`then`) and the settings
    of sources that are no longer in it go with the old one, unless they were given too.
    """
    paths = [path for path, _ in overrides]
    for path, text in overrides:
        if text == "":
            raise PunaError(f"setting --{path} needs a value")
        override(values, path, text)
        branch, _, last = path.rpartition(".")
        if last == "weights" and f"{branch}.then" not in paths:
            _at(values, branch)["then"] = []
    for path in paths:
        branch, _, last = path.rpartition(".")
        if last == "weights" and not any(other.startswith(f"{branch}.options") for other in paths):
            data = _at(values, branch)
            phases = [data["weights"], *(phase["weights"] for phase in data["then"] if "weights" in phase)]
            if all(isinstance(weights, dict) for weights in phases):
                data["options"] = {k: v for k, v in data["options"].items() if any(k in w for w in phases)}
    return values


def _at(values: dict, branch: str) -> dict:
    """The nested settings under a path that `override` has accepted."""
    for part in branch.split("."):
        values = values[part]
    return values


def read(recipe: str, minutes: float | None = None) -> tuple[dict, bool, str | None]:
    """(settings, is it one stage's?, --init) of a recipe's name, a .py file or a resolved .json.

    A .json is what a run left: runs/NAME/config.json, runs/NAME/<stage>.json, a checkpoint's run.json, or what `puna
    recipe show` prints.
    """
    if not recipe.endswith(".json"):
        from puna import recipes

        return to_dict(recipes.get(recipe, minutes)), False, None
    try:
        values = json.loads(Path(recipe).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PunaError(f"there is no file {recipe}: give a recipe's name, a .py file or a resolved .json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PunaError(f"{recipe} can't be read as JSON ({error})") from None
    init = None
    if isinstance(values, dict) and "run" in values:  # config.json and <stage>.json
        init, values = values.get("init"), values["run"]
    elif isinstance(values, dict) and isinstance(values.get("config"), dict):  # a checkpoint's run.json
        values = dict(values["config"])
        init = values.pop("init", None)
        values.pop("base", None)
    if not isinstance(values, dict) or "model" not in values:
        raise PunaError(f"{recipe} is no configuration of a run: it has no settings for a model")
    return values, "stage" in values, init


def run_config(args) -> RunConfig:
    """The run that `puna raise` and `puna tokenizer train` are asked for."""
    from puna.stages import RunConfig

    values, one_stage, _ = read(args.recipe, getattr(args, "minutes", None))
    if one_stage:
        raise PunaError(f"{args.recipe} holds the stage {values['stage']} alone: give it to `puna {values['stage']}`")
    return build(RunConfig, apply(_named(values, args), args.overrides))


def stage_config(args, stage: str) -> tuple[StageRun, str | None]:
    """(what `puna <stage>` is asked for, the model to start from or None)."""
    from puna.stages import RunConfig, StageRun

    values, one_stage, init = read(args.recipe)
    if not one_stage:
        values = to_dict(build(RunConfig, values).stage(stage))
    elif values["stage"] != stage:
        raise PunaError(f"{args.recipe} is of the stage {values['stage']}, not {stage}")
    overrides = args.overrides
    if args.data is not None:
        overrides = [("data.weights", json.dumps({f"file:{args.data}": 1.0})), *overrides]
    run = build(StageRun, apply(_named(values, args), overrides))
    return run, args.init or init


def _named(values: dict, args) -> dict:
    given = {"name": getattr(args, "name", None), "seed": getattr(args, "seed", None)}
    return values | {key: value for key, value in given.items() if value is not None}


def run_folder(name: str) -> Path:
    """runs/NAME. PunaError for a name that is no plain folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise PunaError(f"--name {name!r} can't be a folder's name: use letters, digits, '-', '_' and '.'")
    return RUNS / name


def existing_run(text: str) -> Path:
    """The folder of a run, given as a path or as a name in runs/."""
    for folder in (Path(text), RUNS / text):
        if folder.is_dir():
            return folder
    names = [p.name for p in RUNS.iterdir() if p.is_dir()] if RUNS.is_dir() else []
    hint = f"; did you mean {nearest(text, names)!r}?" if names else ": begin one with `puna raise`"
    raise PunaError(f"there is no run {text}{hint}")


def claim(path: Path, asked: dict) -> None:
    """Writes what a stage was asked for to `path`, once. PunaError naming the fields where it differs from what is
    there."""
    from puna.convert.tensors import read_json
    from puna.processor.files import write_atomic

    if path.is_file():
        must_equal(read_json(path), asked, path, " or --fresh to start over")
    else:
        write_atomic(path, json.dumps(asked, indent=1) + "\n")


def must_equal(saved: dict, asked: dict, path: Path, way_out: str = "") -> None:
    """PunaError naming the fields in which {"run": ..., "init": ...} was begun otherwise."""
    different = [name.removeprefix("run.") for name in differences(saved, asked)]
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise PunaError(
            f"{path} was begun with another {', '.join(different[:4])}{more}: choose another --name{way_out}"
        )
