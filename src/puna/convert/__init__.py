"""Models in and out of files: Hugging Face folders (`huggingface.py`), Meta's (`meta.py`), puna's own checkpoints
(`puna.py`), and `load`, which tells them apart."""

from puna.convert.huggingface import export_hf, load_hf
from puna.convert.load import load

__all__ = ["export_hf", "load", "load_hf"]
