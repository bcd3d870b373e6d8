"""Accuracy under attacks: measured batch by batch, kept in files, shown in tables, plots and pictures."""

from .evaluation import Evaluation, evaluate
from .records import Record
from .robust_accuracy import benchmark

__all__ = ["Evaluation", "Record", "benchmark", "evaluate"]
