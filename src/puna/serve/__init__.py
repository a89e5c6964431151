"""The OpenAI-compatible server and the chat page."""

from puna.serve.api import create_app, serve
from puna.serve.limits import Limits

__all__ = ["Limits", "create_app", "serve"]
