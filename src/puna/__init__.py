"""puna: the whole life of a Llama 4, from real data to a chat page that sees.

Importing this package is cheap; each name below loads its part on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "load": ("puna.convert", "load"),
    "Llama4": ("puna.model", "Llama4"),
    "ModelConfig": ("puna.model", "ModelConfig"),
    "VisionConfig": ("puna.model", "VisionConfig"),
    "Engine": ("puna.engine", "Engine"),
    "Processor": ("puna.processor", "Processor"),
    "recipes": ("puna.recipes", None),
}

__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'puna' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
