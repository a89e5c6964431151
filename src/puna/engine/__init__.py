"""One engine for chat, serving and evaluation: batches of answers over a hybrid key/value cache.

Read cache.py (what iRoPE saves), pages.py and prefix.py (what is shared), scheduler.py (who runs next), forward.py (the
model over all these), sampler.py (which token), constrain.py (which ones may come), speculate.py (several at once),
text.py (when to stop), engine.py (how they join), ask.py (for one caller) and thread.py (for a server), in this order.
"""

from puna.engine.cache import HybridCache, bytes_all_layers, bytes_per_sequence
from puna.engine.engine import Engine
from puna.engine.request import Completion, Event, Prompt
from puna.engine.sampler import Sampling
from puna.engine.thread import EngineThread, Handle

__all__ = [
    "Completion", "Engine", "EngineThread", "Event", "Handle", "HybridCache", "Prompt", "Sampling",
    "bytes_all_layers", "bytes_per_sequence",
]  # fmt: skip
