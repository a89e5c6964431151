"""Tasks: items(split, seed, level), a prompt with pictures, a grade. Data, evaluation and RL all use these.

`TASKS` maps a name to its class, `task(name, **config)` makes one. `Captions` and `Scenes`
make pre-training documents with pictures, not items (`DOCUMENTS`).
"""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature

from puna.errors import PunaError
from puna.tasks.addition import Addition
from puna.tasks.base import Item, Task
from puna.tasks.captions import Captions
from puna.tasks.conversations import Conversations
from puna.tasks.facts import Facts
from puna.tasks.grounding import Grounding, Scenes
from puna.tasks.naming import Naming
from puna.tasks.needle import Needle
from puna.tasks.pictures import EmojiPicture, PictureRef, Scene
from puna.tasks.recall import Recall

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Addition, Conversations, Facts, Grounding, Naming, Needle, Recall)
}
DOCUMENTS: dict[str, type] = {kind.name: kind for kind in (Captions, Scenes)}

__all__ = ["DOCUMENTS", "TASKS", "Captions", "EmojiPicture", "Item", "PictureRef", "Scene", "Scenes", "Task", "task"]


def task(name: str, **config) -> Task:
    """The task called `name` with its settings. PunaError, with the nearest valid one, for an unknown name or
    setting."""
    if name not in TASKS:
        raise PunaError(f"unknown task {name!r}{_nearest(name, TASKS)}")
    settings = signature(TASKS[name]).parameters
    for key in config:
        if key not in settings:
            raise PunaError(f"task {name} has no setting {key!r}{_nearest(key, settings)}")
    missing = [key for key, parameter in settings.items() if parameter.default is parameter.empty and key not in config]
    if missing:
        raise PunaError(f"task {name} needs the setting {missing[0]!r}")
    return TASKS[name](**config)


def _nearest(name: str, valid) -> str:
    if not valid:
        return ": it takes none"
    near = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(valid)}"
