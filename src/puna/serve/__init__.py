"""The OpenAI-compatible server and the chat page. Importing this package is cheap: the table of limits is read by the
command line, which must not wait for a web framework."""

from importlib import import_module

_LAZY = {"create_app": "puna.serve.api", "serve": "puna.serve.run", "Limits": "puna.serve.limits"}

__all__ = ["Limits", "create_app", "serve"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'puna.serve' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
