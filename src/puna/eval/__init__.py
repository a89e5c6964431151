"""Evaluation: what a model can do, each number with its n, its error, its chance level and its goal."""

from puna.eval.nll import bpb_evaluation
from puna.eval.rows import EvalConfig, Row

__all__ = ["EvalConfig", "Row", "bpb_evaluation"]
