"""What a model can do, in numbers: bits per byte (nll.py), tasks answered by free generation (suite.py), and the one
page that shows them all (report.py)."""

from puna.eval.answers import answers_evaluation
from puna.eval.config import GOALS, GOALS_HOUR, EvalConfig
from puna.eval.nll import bits_per_byte, bpb_evaluation, unigram_bits_per_byte
from puna.eval.rows import Row, Sample

__all__ = [
    "GOALS",
    "GOALS_HOUR",
    "EvalConfig",
    "Row",
    "Sample",
    "answers_evaluation",
    "bits_per_byte",
    "bpb_evaluation",
    "unigram_bits_per_byte",
]
