"""Packages that only building corpora needs, imported when they are, with an error that says how to get them."""

from importlib import import_module
from types import ModuleType

from puna.errors import PunaError

EXTRAS = {"datasets": "hf"}  # the rest: data


def need(module: str) -> ModuleType:
    """The module; PunaError naming the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        extra = EXTRAS.get(module, "data")
        raise PunaError(f"this needs the package {module} ({error}): pip install 'puna[{extra}]'") from None
