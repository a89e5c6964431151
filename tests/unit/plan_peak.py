"""Run as a program: the peak of resident memory that training steps or decoding add to a process, in bytes.

argv[1] is JSON: {"what": "train" or "serve", "config": ModelConfig's, "dtype": of products, "rows", "seq_len",
"micros"}.
"""

import json
import sys

import torch

from puna.data import Batch
from puna.engine.cache import HybridCache, Place, page_size
from puna.model import Llama4, ModelConfig
from puna.optim import build_adamw
from puna.train.step import train_step
from puna.train.terms import NextToken


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def train(config, dtype, rows, seq_len, micros, steps=2):
    model = Llama4(config).train()
    model.compute_dtype = dtype
    with torch.no_grad():
        model.output.weight.normal_(std=0.02)
    optimizer = build_adamw(model, 1e-3, 0.1, (0.9, 0.99), 1e-8)
    for _ in range(steps):  # moments exist from the second on
        batches = []
        for _ in range(micros):
            tokens = torch.randint(0, config.vocab_size, (rows, seq_len))
            valid, docs = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens)
            batches.append(Batch(tokens, tokens, valid, docs, None, (0,) * rows, ("x",) * rows, tuple(range(rows))))
        train_step(model, optimizer, batches, NextToken(), 1.0, 1024)


@torch.inference_mode()
def serve(config, dtype, rows, seq_len, micros):
    model = Llama4(config).to(dtype).eval()
    size = page_size(config)
    each = -(-seq_len // size)
    cache = HybridCache(config, rows, rows * each, dtype)
    cache.reserve(rows, seq_len, rows * each)
    places = [Place(row, list(range(row * each, (row + 1) * each))) for row in range(rows)]
    for place in places:
        while place.fed < seq_len - 1:
            n = min(config.chunk - place.fed % config.chunk, seq_len - 1 - place.fed)
            model.hidden(torch.randint(0, config.vocab_size, (1, n)), cache=cache.view([place], [n]))
            place.fed += n
    model(torch.randint(0, config.vocab_size, (rows, 1)), cache=cache.view(places, [1] * rows))


def main(asked: dict) -> int:
    torch.set_num_threads(1)
    run = {"train": train, "serve": serve}[asked.pop("what")]
    config, dtype = asked.pop("config"), getattr(torch, asked.pop("dtype"))
    tiny = {"d_model": 64, "vocab_size": 64, "n_heads": 2, "n_kv_heads": 1, "expert_width": 64, "dense_width": 64}
    run(ModelConfig.from_dict(config | tiny), dtype, 1, 32, 1)  # what libraries keep for themselves
    before = status("VmRSS")
    run(ModelConfig.from_dict(config), dtype, **asked)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(main(json.loads(sys.argv[1])))
