"""One engine for chat, serving, evaluation and reinforcement learning: a batch of independent sequences, decoded
together over a hybrid cache that holds one chunk for local layers and everything for global ones."""

from puna.engine.cache import HybridCache, bytes_all_layers, bytes_per_sequence
from puna.engine.engine import Completion, Engine, Event, Request
from puna.engine.sampler import Sampling
from puna.engine.thread import EngineThread

__all__ = [
    "Completion",
    "Engine",
    "EngineThread",
    "Event",
    "HybridCache",
    "Request",
    "Sampling",
    "bytes_all_layers",
    "bytes_per_sequence",
]
