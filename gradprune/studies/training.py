"""Training in a study: whole epochs by ``AdversarialTrainer``, from which an interrupted cell goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.attacks import PGD
from gradprune.training import AdversarialTrainer, History, LinearEps, Objective, PGDTraining, Plain
from gradprune.training.watchers import Silent, Start, TensorBoard, Watcher

from .context import Context, graphs_compiled
from .data import Batches

Record = dict[str, Any]


class Graphs(Silent):
    """Counts what is compiled after the first epoch: nothing should be.

    Args:
        context: The study, which is told.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._first: int | None = None

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""
        if self._first is None:
            self._first = graphs_compiled()

    def end(self) -> None:
        """See ``Watcher``."""
        if self._first is not None:
            self._context.note_later(graphs_compiled() - self._first)


class Bar(Silent):
    """One bar over all epochs of a cell, which goes when it is done; nothing where standard error is no terminal.

    Args:
        description: What is trained.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            total = None if start.batches is None else start.epochs * start.batches
            self._bar = tqdm(
                total=total, initial=start.iteration, desc=self._description, file=sys.stderr, leave=False, position=1
            )

    def iteration(self, record: Record) -> None:
        """See ``Watcher``."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.3g}", refresh=False)
            self._bar.update()

    def end(self) -> None:
        """See ``Watcher``."""
        if self._bar is not None:
            self._bar.close()


def seeded(seed: int, *names: object) -> int:
    """A seed for a part of a study, other than that of other parts."""
    generator = torch.Generator().manual_seed(seed)
    for letter in " ".join(map(str, names)).encode():
        generator.manual_seed((int(torch.randint(2**40, (), generator=generator)) * 257 + letter) % 2**62)
    return int(torch.randint(2**40, (), generator=generator))


def objective_of(context: Context, attack: PGD | None, **settings: Any) -> Objective:
    """Training on adversarial examples of an attack, or on the inputs as they are."""
    if attack is None:
        return Plain(**settings)
    return PGDTraining(attack=context.attack(attack), **settings)


def train(
    context: Context,
    key: str,
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch: int,
    validation: tuple[Tensor, Tensor] | None = None,
    watchers: Sequence[Watcher] = (),
    eps_schedule: LinearEps | None = None,
    part: str = "",
    compile: bool | Literal["attack"] | None = None,
) -> History:
    """Train a model for a cell, or for what is left of it after an interruption.

    Args:
        context: The study.
        key: The cell's.
        model: From inputs to logits.
        objective: See ``objective_of``.
        optimizer: Of the model's weights.
        data: Inputs and labels to train on.
        epochs: How often they are seen.
        batch: Samples in a batch.
        validation: Inputs and labels to measure clean accuracy on after every epoch.
        watchers: Beside the progress bar and TensorBoard's.
        compile: What is compiled; ``None`` for what suits the scale. Of an eager study nothing is.
        part: What is trained, of a cell that trains several; these have no TensorBoard logs of their own.
        eps_schedule: Has eps grow, see ``AdversarialTrainer``.

    Returns:
        What happened; the model is trained, and in evaluation mode.
    """
    compile_ = context.compiled if compile is None or context.options.eager else compile
    trainer = AdversarialTrainer(model, optimizer, objective, eps_schedule=eps_schedule, compile=compile_)
    context.watch(model)
    folder = context.checkpoints(key) / part
    folder.mkdir(parents=True, exist_ok=True)
    own: list[Watcher] = [Graphs(context), Bar(f"{key} {part}"), *watchers]
    if context.logs and not part:
        own.append(TensorBoard())
    history = trainer.fit(
        Batches(*data, batch),
        epochs,
        validation=None if validation is None else Batches(*validation, batch),
        folder=folder,
        seed=seeded(context.options.seed, key, part),
        watchers=own,
    )
    model.eval()
    return history
