"""What ``AdversarialTrainer.fit`` tells of itself while it runs, and who listens: a bar, a file, TensorBoard, a picture.

A watcher changes nothing about the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..attacks import Attack

Record = dict[str, Any]
"""Figures by name, ready for JSON."""


@dataclass(frozen=True)
class Start:
    """What is known before the first batch.

    Attributes:
        folder: Where the run is kept; ``None`` if nowhere.
        epochs: How many there are to be, those of an interrupted run included.
        batches: How many an epoch has; ``None`` if the loader does not say.
        epoch: How many epochs are done.
        iteration: How many batches are done.
        model: What is trained.
        example: A few inputs ``(N, ...)`` to show; ``None`` without any.
        attack: What attacks them; ``None`` for nothing.
    """

    folder: Path | None
    epochs: int
    batches: int | None
    epoch: int
    iteration: int
    model: nn.Module
    example: Tensor | None
    attack: Attack | None


class Watcher(Protocol):
    """Listens to a run."""

    def begin(self, start: Start) -> None:
        """Before the first batch, after what an interrupted run left has been read."""

    def iteration(self, record: Record) -> None:
        """After a batch: epoch, iteration, updates, loss, accuracy, lr, eps, samples, seconds."""

    def epoch(self, record: Record) -> None:
        """After an epoch and its evaluation.

        As for an iteration, with means over the epoch, and clean, robust (``None`` where nothing was evaluated), best.
        """

    def end(self) -> None:
        """In the end, also after an error."""
