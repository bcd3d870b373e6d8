"""Accuracy under attacks: measured batch by batch, kept in files, shown in tables, plots and pictures."""

from .evaluation import Evaluation, evaluate
from .records import Record

__all__ = ["Evaluation", "Record", "evaluate"]
