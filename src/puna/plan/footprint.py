"""What LoRA needs in memory, by arithmetic; `python -m puna.plan.footprint` prints the table of docs/finetuning.md.

    base          parameters x their bits: bfloat16 16; int8 and int4 take 8 and 4 and a 32-bit scale for every 128
    adapters      r (in + out) a matrix, for every expert; float32
    training      a gradient and two moments of every number of the adapters; float32
    activations   what the backward pass keeps of frozen layers in bfloat16 (memory.py), nothing recomputed
    head          a slice of the loss: logits and their log-softmax
    one matrix    the largest expert or linear while it is brought back from integers

Text; a tile adds the vision tower's activations. All but the activations are counted by the test on the meta device,
the activations by hooks on what autograd saves.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from puna.model import ModelConfig, preset
from puna.model.lora import LoRAConfig
from puna.plan.flops import shapes
from puna.plan.memory import head_slice, kept, weight_bytes
from puna.precision.quantized import SCHEMES

GB = 1e9


def matrices(config: ModelConfig, layer: int) -> dict[str, tuple[int, int, int]]:
    """Names of a layer's matrices, as patterns see them: how many, in, out."""
    c, prefix = config, f"layers.{layer}."
    heads = c.n_heads * c.head_dim
    found = {
        "attention.wqkv.weight": (1, c.d_model, heads + 2 * c.n_kv_heads * c.head_dim),
        "attention.wo.weight": (1, heads, c.d_model),
    }
    if c.is_moe(layer):
        for name, count in (("moe.experts.{}", c.n_experts), ("moe.shared.{}.weight", 1)):
            found[name.format("w13")] = (count, c.d_model, 2 * c.expert_width)
            found[name.format("w2")] = (count, c.expert_width, c.d_model)
        found["moe.router.weight"] = (1, c.d_model, c.n_experts)
    else:
        found["feed_forward.w13.weight"] = (1, c.d_model, 2 * c.dense_width)
        found["feed_forward.w2.weight"] = (1, c.dense_width, c.d_model)
    return {prefix + name: shape for name, shape in found.items()}


def footprint(config: ModelConfig, lora: LoRAConfig, tokens: int, rows: int = 1024) -> dict[str, float]:
    """Bytes by part for micro-batches of `tokens` tokens, the loss in slices of `rows` positions; what is not integers
    is bfloat16, or float32 where `lora.base` says so."""
    layers = [shape for i in range(config.n_layers) for shape in matrices(config, i).items()]
    integers = lora.base in SCHEMES
    adapters = sum(
        lora.rank_of(name) * n * (a + b)
        for name, (n, a, b) in layers
        if any(fnmatchcase(name, p) for p in lora.targets)
    )
    return {
        "base": sum(weight_bytes(config, lora.base, name, shape) for name, shape in shapes(config).items()),
        "adapters": 4 * adapters,
        "training": 12 * adapters,
        "activations": tokens * sum(kept(config, i, frozen=True) for i in range(config.n_layers)),
        "head": head_slice(rows, config.vocab_size),
        "one matrix": max((a * b for _, (_, a, b) in layers), default=0) * (4 + 4 + 1 + 2) if integers else 0,
    }


def table() -> str:
    """Scout with adapters on attention, experts and shared experts, GB by part."""
    parts = footprint(preset("nano_scout"), LoRAConfig(16), 0)
    lines = [f"| base held as | rank | tokens | {' | '.join(parts)} | total |"]
    lines.append("|---|" + "---:|" * (lines[0].count("|") - 2))
    for base, rank, tokens in (("bfloat16", 16, 4096), ("int8", 16, 1024), ("int4", 16, 4096), ("int4", 4, 512)):
        parts = footprint(preset("scout"), LoRAConfig(rank, base=base), tokens)
        numbers = [f"{value / GB:.2f}" for value in (*parts.values(), sum(parts.values()))]
        lines.append(f"| {base} | {rank} | {tokens:,} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
