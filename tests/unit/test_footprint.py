"""The arithmetic of docs/finetuning.md against what is really allocated."""

from pathlib import Path

import pytest
import torch

from puna.model import Llama4, ModelConfig, lora, preset
from puna.model.lora import LoRAConfig
from puna.plan.footprint import footprint, table
from puna.plan.memory import kept
from puna.precision.quantized import Quantization, attach

DOC = Path(__file__).parents[2] / "docs" / "finetuning.md"


def held(config, adapters):
    """(bytes of the base, numbers of the adapters) of a model on the meta device."""
    with torch.device("meta"):
        model = Llama4(config).bfloat16()
    if adapters.base in ("int8", "int4"):
        attach(model, Quantization(adapters.base))
    lora.attach(model, adapters)
    new = lora.adapters(model)
    total = sum(t.numel() * t.element_size() for name, t in model.state_dict().items() if name not in new)
    return total, sum(p.numel() for p in new.values())


@pytest.mark.parametrize("name", ["scout", "maverick", "nano_maverick"])
@pytest.mark.parametrize("base", ["bfloat16", "int8", "int4"])
def test_weights_are_those_of_the_meta_device(name, base):
    adapters = LoRAConfig(16, base=base, ranks={"*.experts.w2": 4})
    parts = footprint(preset(name), adapters, 0)
    base_bytes, numbers = held(preset(name), adapters)
    assert parts["base"] == base_bytes
    assert parts["adapters"] == 4 * numbers and parts["training"] == 12 * numbers
    assert parts["activations"] == 0 and footprint(preset(name), adapters, 7)["activations"] > 0


def test_scouts_parameters_are_the_facts():
    """llama4-facts.md §1.3: routed and shared experts at 4.25 bits, everything else at 16."""
    experts, total = 96_636_764_160 + 6_039_797_760, 108_641_793_536
    expected = experts * 4.25 / 8 + (total - experts) * 2
    assert footprint(preset("scout"), LoRAConfig(16, base="int4"), 0)["base"] == expected
    wide = 48 * (16 * ((5120 + 16384) + (8192 + 5120)) + (5120 + 16384) + (8192 + 5120) + (5120 + 7168) + (5120 + 5120))
    assert footprint(preset("scout"), LoRAConfig(16), 0)["adapters"] == 4 * 16 * wide


@pytest.mark.parametrize("change", [{}, {"moe_layers": ()}, {"qk_norm": False}, {"n_kv_heads": 4, "expert_width": 256}])
@pytest.mark.parametrize("base", [None, "int4"])
def test_activations_are_what_autograd_saves(change, base):
    """Within 8 %: what is one number a token, or r wide, is left out."""
    shape = dict(vocab_size=64, d_model=192, n_layers=4, n_heads=8, n_kv_heads=2, head_dim=64, expert_width=160,
                 dense_width=320, n_experts=4, chunk=1024, floor_scale=8192, max_context=4096) | change  # fmt: skip
    config = ModelConfig(**shape)
    model = Llama4(config).bfloat16().train()
    if base and config.is_moe(0):
        attach(model, Quantization(base))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.zero_() if name.endswith(".q") else buffer.fill_(0.01)
    after = "*.moe.*" if config.is_moe(0) else "*.feed_forward.*"
    lora.attach(model, LoRAConfig(2, targets=("*.attention.*", after), ranks={"*router*": 0} if "moe" in after else {}))
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    T = 640  # noqa: N806 - longer than what the CPU attends to by hand in bfloat16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.randint(0, 64, (1, T)))
    measured = sum(storage.nbytes() for storage in saved.values()) / T
    expected = sum(kept(config, i, frozen=True) for i in range(config.n_layers))
    assert 0.92 * measured < expected <= measured


def test_the_documents_table_is_this_one():
    assert table() in DOC.read_text(encoding="utf-8")
