"""A store seen as another: quantised, brought back, with an adapter added. Each is a rule for rows, applied while they
are read, so that a model of any size passes through in slices whatever is done to it on the way.

    Quantizing     NAME                  -> NAME.q, NAME.scale       `load(quantize=)`, `puna quantize`
    Dequantizing   NAME.q, NAME.scale    -> NAME                     exports, full training
    Merging        NAME, A, B            -> NAME + s B A             exports of what LoRA trained
    Watched        the same                                          SHA-256 of every tensor that was read

Rows of the middle two are float32: they are rounded once, to what they are written as.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from puna.convert.layout import FileStore, Shape
from puna.convert.tensors import parameter_shapes
from puna.errors import PunaError
from puna.model.lora import merged_rows
from puna.precision.quantized import PARTS, SCHEMES, Quantization

Adapters = Mapping[str, tuple[Tensor, Tensor, float]]  # weight's name -> A, B, scale


class View:
    """A store for reading that passes everything on."""

    def __init__(self, store: FileStore | View):
        self.store, self.config, self.table = store, store.config, store.table

    def shapes(self) -> dict[str, Shape]:
        return self.store.shapes()

    def dtype(self, name: str) -> torch.dtype:
        return self.store.dtype(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.store.read(name, start, stop)


class Quantizing(View):
    """Matrices that match become integers and scales. Each is read twice, once for either."""

    def __init__(self, store: FileStore | View, quantization: Quantization):
        super().__init__(store)
        self.scheme, self.quantization = SCHEMES[quantization.scheme], quantization

    def shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.config, self.quantization)

    def dtype(self, name: str) -> torch.dtype:
        _, part = self._split(name)
        return {"q": self.scheme.DTYPE, "scale": torch.float32}[part] if part else super().dtype(name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        weight, part = self._split(name)
        if not part:
            return super().read(name, start, stop)
        return self.scheme.quantize(self.store.read(weight, start, stop))[PARTS.index(part)]

    def _split(self, name: str) -> tuple[str, str]:
        weight, _, part = name.rpartition(".")
        return (weight, part) if part in PARTS else (name, "")


class Dequantizing(View):
    """A quantised store as numbers."""

    def __init__(self, store: FileStore | View, quantization: Quantization):
        super().__init__(store)
        self.scheme = SCHEMES[quantization.scheme]
        self.quantized = {name.removesuffix(".q") for name in store.shapes() if name.endswith(".q")}

    def shapes(self) -> dict[str, Shape]:
        return parameter_shapes(self.config)

    def dtype(self, name: str) -> torch.dtype:
        return self.store.dtype("tok_embeddings.weight" if name in self.quantized else name)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.quantized:
            return super().read(name, start, stop)
        q, scale = (self.store.read(f"{name}.{part}", start, stop) for part in PARTS)
        return self.scheme.dequantize(q, scale, torch.float32)


class Merging(View):
    """Weights with their adapters added."""

    def __init__(self, store: FileStore | View, adapters: Adapters, table: Mapping):
        super().__init__(store)
        self.adapters, self.table = adapters, {**store.table, **table}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().read(name, start, stop)
        return merged_rows(rows, *self.adapters[name], start) if name in self.adapters else rows


class Watched(View):
    """Takes the SHA-256 of every tensor that is read from its first row to its last (`hashes`), and compares it with
    the one expected."""

    def __init__(self, store: FileStore | View, place: str, expected: Mapping[str, str] | None = None):
        super().__init__(store)
        self.place, self.expected = place, expected
        self.hashes: dict[str, str] = {}
        self._digests: dict = {}
        self._lengths = {name: shape[0] for name, shape in store.shapes().items()}
        if expected is not None and (other := sorted(expected.keys() ^ self._lengths.keys())):
            self._refuse(other[0])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        rows = super().read(name, start, stop)
        if start == 0:
            self._digests[name] = hashlib.sha256()
        self._digests[name].update(rows.contiguous().flatten().view(torch.uint8).numpy().data)
        if stop == self._lengths[name]:
            self.hashes[name] = self._digests.pop(name).hexdigest()
            if self.expected is not None and self.hashes[name] != self.expected[name]:
                self._refuse(name)
        return rows

    def _refuse(self, name: str) -> None:
        raise PunaError(
            f"{self.place} is not the base that the adapter was trained on: tensor {name} is another; restore the base"
        )
