"""Data: named sources -> documents -> packed rows -> a stateless mixture -> batches.

    sources.py   'text/en', 'captions', 'sft/naming', 'file:PATH' ... to tokens        files.py   the user's own files
    packing.py   documents into rows that fit chunked attention                        shards.py  packed rows on disk
    order.py     a shuffle that is a formula                                           mixture.py which row is read when
    batches.py   step -> tensors

Training reads `Batches(...)(step)`; the whole state of the data is the step.
"""

from puna.data.batches import Batch, Batches
from puna.data.mixture import Mixture
from puna.data.order import permutation
from puna.data.packing import PackedRows, pack
from puna.data.sources import DataConfig, Phase, build

__all__ = ["Batch", "Batches", "DataConfig", "Mixture", "PackedRows", "Phase", "build", "pack", "permutation"]
