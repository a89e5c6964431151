"""The architecture: Llama 4 on one device, in plain PyTorch, without torch.distributed."""

from puna.model.config import PRESETS, ModelConfig, RopeScaling, VisionConfig, preset
from puna.model.llama4 import Llama4

__all__ = ["PRESETS", "Llama4", "ModelConfig", "RopeScaling", "VisionConfig", "preset"]
