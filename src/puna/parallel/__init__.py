"""Many processes, one model: who has what (layout, mesh), and the few collectives between them.

The model knows nothing of it. Parameters, gradients and optimizer state are DTensors at rest (FSDP2); the forward pass
computes on local tensors, with explicit collectives at the seams that the model leaves: the experts' dispatcher, the
share of a row's tokens, and hooks before and after attention and feed-forwards.

Read layout.py first (it needs no torch.distributed, and this package imports nothing, so that one process pays for
none of it), then apply.py.
"""
