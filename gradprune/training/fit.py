"""The loop over epochs: checkpoints, exact resumption, evaluation, early stopping.

Note [Exact resumption]: a run that was interrupted anywhere and goes on from its last checkpoint takes the same
trajectory as one that was not, bitwise on a CPU with the same number of threads and the same compiler cache (kernels
are chosen by measurement, and the choice is remembered there). Every epoch begins by seeding all generators with a
number made of the seed, the epoch and the rank, so that a loader that draws from them begins it in the same order
again; the batches used already are drawn once more and dropped, and then the generators are put where they were.
Checkpoints are written between updates only, when no gradients are accumulated.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gradprune.attacks import PGD, Attack
from gradprune.errors import GradpruneError, OptionError, TrainingError

from . import parallel
from .batches import Batch, BatchTrainer, checked_batches
from .checkpoint import (
    FORMAT,
    VERSION,
    check_settings,
    random_state,
    read_checkpoint,
    remove_leftovers,
    seed_all,
    set_random_state,
    text_of,
    write_checkpoint,
)
from .watchers import Start, Watcher

LAST, BEST = "last.pt", "best.pt"
EXAMPLES = 4
"""Inputs that watchers are given to look at."""


@dataclass
class History:
    """What a training did.

    Attributes:
        epochs: The records of all epochs: ``epoch`` and ``iteration`` (how many are done), ``updates``, ``loss`` and
            ``accuracy`` on the batches trained on, ``clean`` and ``robust`` accuracy on the validation data or
            ``None``, ``lr``, ``eps``, ``seconds``, and whether it was the ``best`` so far.
        best: The record of the best epoch: with the largest robust accuracy, or clean accuracy if no attack is run.
        stopped_early: Whether it ended because the best epoch was too long ago.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped_early: bool = False


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        epoch: Epochs done.
        batch: Batches of the current epoch that were used.
        loss: Sum of the losses of its samples.
        correct: How many of them were classified rightly.
        samples: How many there were.
        seconds: Time that its batches took.
        stale: Evaluations since the best.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    correct: int = 0
    samples: int = 0
    seconds: float = 0.0
    stale: int = 0


class Fit:
    """One call of ``BatchTrainer.fit``, see there."""

    def __init__(
        self,
        trainer: BatchTrainer,
        loader: Iterable[Any],
        epochs: int,
        *,
        validation: Iterable[Any] | None,
        evaluation: Attack | None,
        evaluate_every: int,
        patience: int | None,
        folder: Path | None,
        resume: bool,
        checkpoint_seconds: float,
        seed: int,
        watchers: Sequence[Watcher],
    ) -> None:
        for name, value in (("epochs", epochs), ("evaluate_every", evaluate_every), ("patience", patience)):
            if value is not None and value < 1:
                raise OptionError(f"{name} has to be at least 1, not {value!r}")
        if patience is not None and validation is None:
            raise OptionError("patience needs validation data to look at: pass validation=")
        sampler = getattr(loader, "sampler", None)
        if parallel.processes() > 1 and not hasattr(sampler, "set_epoch"):
            raise OptionError(
                "with several processes each has to see a share of the data: make the loader with "
                "sampler=torch.utils.data.DistributedSampler(data)"
            )
        self.trainer = trainer
        self.loader = loader
        self.epochs = epochs
        self.validation = validation
        self.evaluation = evaluation or default_evaluation(trainer)
        if self.evaluation is not None and self.evaluation.seed is None:
            self.evaluation = replace(self.evaluation, seed=0)  # every evaluation draws the same
        self.evaluate_every = evaluate_every
        self.patience = patience
        self.folder = folder
        self.resume = resume
        self.checkpoint_seconds = checkpoint_seconds
        self.seed = seed
        self.watchers = watchers if parallel.is_first() else ()
        self.progress = Progress()
        self.history = History()
        # Before anything is loaded: the scheduler's own state then still is what it was made with.
        self._settings = self._describe()
        self._saved = time.monotonic()
        self._interrupted: int | None = None

    def run(self) -> History:
        """Train."""
        random_numbers = self._prepare()
        if self.history.stopped_early or self.progress.epoch >= self.epochs:
            return self.history
        modes = [(module, module.training) for module in self.trainer.model.modules()]
        try:
            for watcher in self.watchers:
                watcher.begin(self._start())
            with self._signals():
                while self.progress.epoch < self.epochs and not self.history.stopped_early:
                    self._epoch(random_numbers)
                    random_numbers = None
        finally:
            for module, training in modes:
                module.training = training
            for watcher in self.watchers:
                watcher.end()
        return self.history

    # --- One epoch ----------------------------------------------------------------------------------------------------

    def _epoch(self, random_numbers: dict[str, Any] | None) -> None:
        """Train for the rest of the current epoch; evaluate; write a checkpoint."""
        progress, trainer = self.progress, self.trainer
        self._seed_epoch()
        trainer.model.train()
        batches = self._batches()
        for _ in range(progress.batch):
            if next(batches, None) is None:
                raise TrainingError(
                    f"the loader ends before batch {progress.batch}, where this training was: it has to return what it "
                    "returned then"
                )
        if random_numbers is not None and progress.batch:  # else the loader has yet to draw its order
            set_random_state(random_numbers)
        begun = time.perf_counter()
        for x, y in batches:
            try:
                metrics = trainer.step(x, y)
            except TrainingError as error:
                raise TrainingError(f"{self._where()}: {error}{self._last_checkpoint()}") from error
            loss, correct = float(metrics.loss), int(metrics.correct)
            now = time.perf_counter()
            progress.batch += 1
            progress.loss += loss * metrics.samples
            progress.correct += correct
            progress.samples += metrics.samples
            progress.seconds += now - begun
            record = {
                **self._position(),
                "loss": loss,
                "accuracy": correct / metrics.samples,
                "samples": metrics.samples,
                "seconds": now - begun,
            }
            for watcher in self.watchers:
                watcher.iteration(record)
            self._save_if_due()
            begun = time.perf_counter()
        if not progress.samples:
            raise TrainingError(f"{self._where()}: the loader returned no batches")
        self._finish_epoch()

    def _finish_epoch(self) -> None:
        progress = self.progress
        loss, correct, samples = parallel.sum_counts(
            torch.tensor([progress.loss, progress.correct, progress.samples], dtype=torch.float64)
        ).tolist()
        progress.epoch += 1
        clean, robust = self._evaluate()
        score = clean if robust is None else robust
        best = self.history.best
        is_best = score is not None and (best is None or score > (best["clean"] if robust is None else best["robust"]))
        record = {
            **self._position(),
            "loss": loss / samples,
            "accuracy": correct / samples,
            "clean": clean,
            "robust": robust,
            "seconds": progress.seconds,
            "best": is_best,
        }
        self.history.epochs.append(record)
        if is_best:
            self.history.best, progress.stale = record, 0
            self._save_best(record)
        elif score is not None:
            progress.stale += 1
        self.history.stopped_early = self.patience is not None and progress.stale >= self.patience
        self.progress = Progress(epoch=progress.epoch, stale=progress.stale)
        # Watchers first: should one fail, the epoch's records are written when it is trained again.
        for watcher in self.watchers:
            watcher.epoch(record)
        self._save()

    def _evaluate(self) -> tuple[float | None, float | None]:
        is_due = self.progress.epoch % self.evaluate_every == 0 or self.progress.epoch == self.epochs
        if self.validation is None or not is_due:
            return None, None
        return self.trainer.evaluate(self.validation, self.evaluation)

    def _batches(self) -> Iterator[Batch]:
        """The batches of an epoch, checked and on the model's device."""
        try:
            yield from checked_batches(self.loader, self.trainer.device)
        except Exception as error:
            if isinstance(error, GradpruneError):
                raise
            if self.folder is not None and self.trainer.is_between_updates and parallel.processes() == 1:
                self._save()
            raise TrainingError(
                f"{self._where()}: the loader raised {type(error).__name__}: {error}{self._last_checkpoint()}"
            ) from error

    def _seed_epoch(self) -> None:
        name = f"{self.seed} {self.progress.epoch} {{}}"
        seed_all(_number(name.format(parallel.rank())))
        for owner in (self.loader, getattr(self.loader, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(_number(name.format("loader")))
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.progress.epoch)

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _prepare(self) -> dict[str, Any] | None:
        """Make the folder and go on from the checkpoint in it, if there is one; the random state to go on with."""
        if self.folder is None:
            return None
        path = self.folder / LAST
        if parallel.is_first():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in (LAST, BEST):
                    remove_leftovers(self.folder / name)
            except OSError as error:
                raise TrainingError(
                    f"cannot write to {self.folder}: {error.strerror or error}: pass another folder"
                ) from error
        parallel.barrier()
        if not (self.resume and path.exists()):
            return None
        saved = read_checkpoint(path)
        check_settings(path, saved["settings"], self._settings)
        self.progress = Progress(**saved["progress"])
        self.history = History(**saved["history"])
        # It may have another value than before.
        self.history.stopped_early = self.patience is not None and self.progress.stale >= self.patience
        self.trainer.load_state_dict(saved)
        return parallel.scatter(saved["random"])  # type: ignore[no-any-return]

    def _save_if_due(self) -> None:
        if self.folder is None:
            return
        is_due = time.monotonic() - self._saved >= self.checkpoint_seconds
        flags = torch.tensor([self._interrupted is not None, is_due], dtype=torch.int64)
        stops, saves = (bool(count) for count in parallel.sum_counts(flags))
        if (stops or saves) and self.trainer.is_between_updates:
            self._save()
            if stops:
                raise KeyboardInterrupt(f"training was interrupted and goes on from {self.folder / LAST}")

    def _save(self) -> None:
        if self.folder is None:
            return
        state = self.trainer.state_dict()
        numbers = parallel.gather(random_state())
        if parallel.is_first():
            write_checkpoint(
                self.folder / LAST,
                {
                    "format": FORMAT,
                    "version": VERSION,
                    **state,
                    "settings": self._settings,
                    "progress": asdict(self.progress),
                    "history": asdict(self.history),
                    "random": numbers,
                },
            )
        self._saved = time.monotonic()

    def _save_best(self, record: dict[str, Any]) -> None:
        if self.folder is None:
            return
        with self.trainer.averaged():  # until it is written: on a CPU the state is the weights' own memory
            weights = parallel.model_state(self.trainer.model)
            if parallel.is_first():
                write_checkpoint(self.folder / BEST, {"model": weights, "record": record})

    def _last_checkpoint(self) -> str:
        path = None if self.folder is None else self.folder / LAST
        return f"; the last checkpoint is {path}" if path is not None and path.exists() else ""

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Have SIGINT and SIGTERM end training behind the current batch, with a checkpoint; the second at once."""
        if self.folder is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._interrupted is not None:
                raise KeyboardInterrupt
            self._interrupted = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- Descriptions -------------------------------------------------------------------------------------------------

    def _describe(self) -> dict[str, str]:
        trainer, scheduler = self.trainer, self.trainer.scheduler
        values = {
            **trainer.settings(),
            "scheduler": None if scheduler is None else (type(scheduler).__name__, _hyperparameters(scheduler)),
            "seed": self.seed,
            "batches": _length(self.loader),
            "processes": parallel.processes(),
        }
        return {name: text_of(value) for name, value in values.items()}

    def _position(self) -> dict[str, Any]:
        trainer = self.trainer
        attack = trainer.objective.attack
        return {
            "epoch": self.progress.epoch,
            "iteration": trainer.iterations,
            "updates": trainer.updates,
            "lr": float(trainer.optimizer.param_groups[0]["lr"]),
            "eps": None if attack is None else getattr(trainer.scheduled(attack), "eps", None),
        }

    def _where(self) -> str:
        return f"epoch {self.progress.epoch + 1}, batch {self.progress.batch + 1}"

    def _start(self) -> Start:
        example = None
        if self.validation is not None:
            x, _ = next(checked_batches(self.validation, self.trainer.device))
            example = x[:EXAMPLES]
        return Start(
            folder=self.folder,
            epochs=self.epochs,
            batches=_length(self.loader),
            epoch=self.progress.epoch,
            iteration=self.trainer.iterations,
            model=self.trainer.model,
            example=example,
            attack=self.evaluation,
        )


def default_evaluation(trainer: BatchTrainer) -> Attack | None:
    """PGD of 20 steps in the ball that is trained in; ``None`` where none is."""
    attack = trainer.objective.attack
    eps = getattr(attack, "eps", None)
    if attack is None or eps is None:
        return None
    norm: Any = getattr(attack, "norm", "linf")
    return PGD(norm=norm, eps=eps, step_size=eps / 4, steps=20, bounds=attack.bounds, seed=0)


def _hyperparameters(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with, as far as it says so."""
    moving = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial", "lr_lambdas")
    return {
        name: [_hyperparameters_of_state(state) for state in value] if name == "_schedulers" else value
        for name, value in scheduler.state_dict().items()
        if name not in moving
    }


def _hyperparameters_of_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith("_") and name != "last_epoch"}


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**63
