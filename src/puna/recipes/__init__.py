"""Recipes: functions that return one frozen RunConfig, named for the model they raise. Copy one and own it."""

from __future__ import annotations

import inspect
import runpy
import traceback
from pathlib import Path

from puna.errors import PunaError
from puna.fields import nearest
from puna.recipes.nano import nano_maverick, nano_scout
from puna.stages import RunConfig

RECIPES = {f.__name__: f for f in (nano_scout, nano_maverick)}


def get(name: str, minutes: float | None = None) -> RunConfig:
    """The recipe called `name`, or the one that function `recipe()` of a .py file returns.

    minutes: how long the run is to be. A recipe whose function takes it may give another table of steps and mixtures
    to an hour than to ten minutes; `life.for_minutes` scales from there.

    Errors: PunaError with the nearest valid name; a file without a recipe() that returns a RunConfig.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PunaError(f"there is no recipe file {name}")
        config = _run(name, minutes)
        if not isinstance(config, RunConfig):
            raise PunaError(f"{name} must define a function recipe() that returns a RunConfig")
        return config
    if name not in RECIPES:
        raise PunaError(f"unknown recipe {name!r}; did you mean {nearest(name, RECIPES)!r}?")
    return _call(RECIPES[name], minutes)


def _run(file: str, minutes: float | None):
    """What the function recipe() of a .py file returns; None without one. A mistake in the file is told with its
    line."""
    try:
        made = runpy.run_path(file).get("recipe")
        return _call(made, minutes) if callable(made) else None
    except PunaError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{file}, line {line}" if line else file
        raise PunaError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())}; mend it") from error


def _call(recipe, minutes: float | None):
    return recipe(minutes) if inspect.signature(recipe).parameters else recipe()
