"""Data: named sources -> documents -> packed rows -> a stateless mixture -> batches.

    sources.py   'text/en', 'captions', 'sft/naming', 'file:PATH' ... to tokens        files.py   the user's own files
    packing.py   documents into rows that fit chunked attention                        shards.py  packed rows on disk
    order.py     a shuffle that is a formula                                           mixture.py which row is read when
    batches.py   step -> tensors                                                       corpora/   building large data

Training reads `Batches(...)(step)`; the whole state of the data is the step.
"""

from importlib import import_module

_HOMES = {
    "batches": ("Batch", "Batches"),
    "mixture": ("Mixture",),
    "order": ("permutation",),
    "packing": ("PackedRows", "pack"),
    "sources": ("DataConfig", "Phase", "build"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    # On demand: those who build corpora, in many processes, have no use for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
