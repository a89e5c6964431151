"""Many processes, one model: who has what (layout, mesh), and the few collectives between them.

The model knows nothing of it. Parameters, gradients and optimizer state are DTensors at rest (FSDP2); the forward pass
computes on local tensors, with explicit collectives at the seams that the model leaves: the experts' dispatcher, the
share of a row's tokens, and hooks before and after attention and feed-forwards.
"""

from puna.parallel.apply import build_model, parts_of
from puna.parallel.layout import Layout, Part
from puna.parallel.mesh import Mesh, processes, world_size

__all__ = ["Layout", "Mesh", "Part", "build_model", "parts_of", "processes", "world_size"]
