"""Corpora: real data of any size, built once, trained on as `corpus:PATH`.

inputs.py  files, datasets, object storage -> documents      clean.py  the filters, one document at a time
grams.py   words and n-grams as numbers, MinHash, 13-grams   dedup.py  which documents are copies
build.py   workers, resuming, the whole                      store.py  a corpus on disk
"""

from puna.data.corpora.build import BuildConfig, build_corpus
from puna.data.corpora.store import Corpus

__all__ = ["BuildConfig", "Corpus", "build_corpus"]
