"""Adversarial training of a model: batch by batch, or whole epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gradprune.attacks import Attack

from .batches import BatchTrainer
from .fit import Fit, History
from .watchers import Watcher


class AdversarialTrainer(BatchTrainer):
    """Trains a model against an objective, batch by batch.

    Args:
        model: From inputs ``(N, ...)`` to logits ``(N, classes)``; its weights are updated in place. It is trained in
            the modes that its modules are in: call ``model.train()`` first.
        optimizer: Updates them.
        objective: What is minimised, such as ``PGDTraining(attack=PGD(eps=8 / 255))``.
        scheduler: Of the learning rate; its ``step()`` is called after every update.
        eps_schedule: See ``EpsSchedule``; such as ``LinearEps(1000)``.
        batch_norm: What batch norm does during the attack. ``"eval"``: normalises by the running statistics.
            ``"train"``: by those of the attacked batch, and the running ones stay as they are. ``"separate"``: as
            ``"eval"``, by statistics that only adversarial examples of the outer step contribute to, while clean inputs
            contribute to the model's own.
        autocast: Type to run the model in. ``torch.float16`` scales the loss.
        clip: Largest norm of all weight gradients together; ``None`` for any.
        accumulate: Batches whose gradients are averaged for an update.
        ema: Decay of an exponential moving average of the weights, see ``averaged``; ``None`` for none.
        compile: Compile both steps; ``"attack"`` the attack only, where a training is too short for the outer step's
            compilation to pay; ``False`` runs both eagerly, the attack with frozen weights.
        options: For the compilation of the attack, see ``gradprune.Options``.
        parallel: ``"auto"`` trains with all processes of ``torch.distributed``, if it is initialised, see
            ``gradprune.training.parallel``; the batches of a process are its share. ``"none"`` leaves that to you.
        replica: Only for a model that is sharded by ``fully_shard``: a copy of it, made before. Attacks run on it.

    Attributes:
        iterations: Batches used so far.
        updates: Updates of the weights so far.
        state: What the objective keeps from batch to batch.
        largest_batch: Rows of the largest batch so far, which is what the attack is compiled for.

    Raises:
        OptionError: Something that does not exist or does not go together was asked for.
    """

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        *,
        validation: Iterable[Any] | None = None,
        evaluation: Attack | None = None,
        evaluate_every: int = 1,
        patience: int | None = None,
        folder: Path | str | None = None,
        resume: bool = True,
        checkpoint_seconds: float = 600,
        seed: int = 0,
        watchers: Sequence[Watcher] = (),
    ) -> History:
        """Train for some epochs, or for what is left of them, see Note [Exact resumption] in ``fit.py``.

        Args:
            loader: Returns batches of inputs and labels for an epoch each time it is iterated over. What it draws at
                random comes from torch's, Python's or numpy's global generator, or from that of the ``DataLoader``.
            epochs: How many in total, those of an interrupted run included.
            validation: Batches to measure accuracy on after epochs.
            evaluation: Attack for robust accuracy; ``None`` for PGD of 20 steps at the radius that is trained at, or
                for none with ``Plain``.
            evaluate_every: Evaluate after so many epochs, and after the last.
            patience: Stop when so many evaluations were no better than the best so far (Rice et al. 2020,
                "Overfitting in Adversarially Robust Deep Learning").
            folder: Where ``last.pt``, the checkpoint to go on from, and ``best.pt``, the weights of the best epoch, are
                written. ``None`` keeps nothing. With several processes they have to share it.
            resume: Go on from ``last.pt`` if it exists; ``False`` begins anew, and overwrites it.
            checkpoint_seconds: Write a checkpoint after so many seconds, and after every epoch.
            seed: Of everything random.
            watchers: See ``gradprune.training.watchers``.

        Returns:
            What happened, interrupted runs included.

        Raises:
            TrainingError: The loss is NaN or infinite, the loader fails, or a checkpoint cannot be written, is damaged,
                or is of another training. The last checkpoint stays.
            KeyboardInterrupt: On SIGINT, and on SIGTERM, behind a batch and with a checkpoint of it.
        """
        return Fit(
            self,
            loader,
            epochs,
            validation=validation,
            evaluation=evaluation,
            evaluate_every=evaluate_every,
            patience=patience,
            folder=None if folder is None else Path(folder),
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            seed=seed,
            watchers=watchers,
        ).run()
