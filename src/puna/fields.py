"""Frozen dataclasses from and to plain JSON, with errors a person can act on.

Configurations are dataclasses; they are saved as JSON with every checkpoint, overridden on the command line
(`--train.steps 100`) and compared between runs. `build` checks names and types all the way down and, for a name it
does not know, gives the nearest one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from puna.errors import PunaError


def nearest(name: str, valid) -> str:
    """The closest of `valid` to `name`."""
    import difflib

    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return match[0] if match else ""


def to_dict(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON types."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def build(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """An instance of dataclass `cls` from JSON values. PunaError names the field's whole path."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise PunaError(f"no setting {where + key!r}; did you mean {where + nearest(key, names)!r}?")
    made = {key: _convert(hints[key], value, where + key) for key, value in values.items()}
    try:
        return cls(**made)
    except TypeError as error:
        raise PunaError(f"{where.rstrip('.') or cls.__name__}: {error}") from None


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise PunaError(f"setting {where!r} must be an object, not {value!r}")
        return build(kind, value, where + ".")
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise PunaError(f"setting {where!r} must be a list, not {value!r}")
        return origin(_convert(args[0] if args else Any, v, where) for v in value)
    if kind is Mapping or origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise PunaError(f"setting {where!r} must be an object, not {value!r}")
        return {k: _convert(args[1] if args else Any, v, f"{where}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and kind is not bool or not isinstance(value, kind):
        raise PunaError(f"setting {where!r} must be {kind.__name__}, not {value!r}")
    return value


def override(values: dict, path: str, text: str) -> None:
    """Sets `a.b.c` in nested JSON values from the command line's text, in the type of what stands there."""
    *parents, last = path.split(".")
    place = values
    for i, part in enumerate(parents):
        if not isinstance(place.get(part), dict):
            whole, prefix = ".".join(parents[: i + 1]), ".".join(parents[:i] + [""]).lstrip(".")
            raise PunaError(f"no setting {whole!r}; did you mean {prefix + nearest(part, place)!r}?")
        place = place[part]
    open_ended = parents and parents[-1] in ("weights", "goals") or (len(parents) > 1 and parents[-2] == "options")
    if last not in place and not open_ended:
        prefix = ".".join([*parents, ""])
        raise PunaError(f"no setting {path!r}; did you mean {prefix + nearest(last, place)!r}?")
    place[last] = _parse(text, place.get(last), path)


def _parse(text: str, old: Any, path: str) -> Any:
    import json

    if isinstance(old, str) and not isinstance(old, bool):
        return text
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        if old is None:
            return text
        if isinstance(old, list) and all(isinstance(item, str) for item in old):
            return text.split(",")
        raise PunaError(f"setting {path!r} must be like {old!r}, not {text!r}") from None
    if isinstance(old, int) and not isinstance(old, bool) and isinstance(value, float):
        raise PunaError(f"setting {path!r} must be a whole number, not {text!r}")
    return value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Paths at which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{where}{key}.")
        return found
    return [] if old == new else [where.rstrip(".")]
