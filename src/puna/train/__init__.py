"""The one loop: every stage of a model's life is this loop with its own data, loss and schedule."""

from puna.train.config import TrainConfig
from puna.train.loop import Evaluation, Job, train

__all__ = ["Evaluation", "Job", "TrainConfig", "train"]
