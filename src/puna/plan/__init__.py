"""What fits, how fast, at what price: arithmetic on a configuration, checked against what is really allocated and sent.

hardware.py        GPUs, links, prices: hardware.toml, or the user's copy of it
layout.py          which of parallel/layout.py's layouts a model allows
flops.py           parameters and floating-point operations
memory.py          where the bytes of a training step are; footprint.py: those of LoRA
communication.py   bytes that a rank sends in a step
training.py        time and dollars of a layout; the search for the fastest one that fits
serving.py         weights, keys and values, decoding rates
show.py            tables and JSON
"""
