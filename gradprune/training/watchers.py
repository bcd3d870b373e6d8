"""What ``AdversarialTrainer.fit`` tells of itself while it runs, and who listens: bar, file, TensorBoard, picture.

A watcher changes nothing about the training.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor, nn

from gradprune.attacks import Attack, Runtime
from gradprune.errors import GradpruneError, OptionError
from gradprune.runtime.guard import unchanged
from gradprune.support.figures import can_draw, figure_of, save_figure
from gradprune.support.files import write_text

METRICS, CURVES, TENSORBOARD = "metrics.jsonl", "curves.png", "tensorboard"
EVERY = 10
"""Iterations from one figure to the next."""
SHARES = ("accuracy", "clean", "robust")
SCHEDULES = {"lr": "training/learning rate", "eps": "training/eps"}

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


class Silent:
    """A watcher that does nothing, to inherit from."""

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""

    def iteration(self, record: Record) -> None:
        """See ``Watcher``."""

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""

    def end(self) -> None:
        """See ``Watcher``."""


# --- On the terminal --------------------------------------------------------------------------------------------------


class Progress(Silent):
    """One bar an epoch on standard error, which stays; where that is no terminal, one line an epoch."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._start: Start | None = None

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""
        self._start = start
        if start.iteration and start.folder is not None:
            print(f"going on from {start.folder}: {start.epoch} epochs done", file=sys.stderr, flush=True)
        # An epoch that was interrupted does not begin with its first batch.
        self._open(start.epoch + 1, start.iteration - start.epoch * start.batches if start.batches else 0)

    def iteration(self, record: Record) -> None:
        """See ``Watcher``."""
        if self._bar is not None:
            self._bar.set_postfix_str(_figures(record, ("loss", "accuracy", "lr")), refresh=False)
            self._bar.update()

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""
        assert self._start is not None
        figures = _figures(record, ("loss", "accuracy", "clean", "robust", "lr")) + (", best" if record["best"] else "")
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
            self.end()
            if record["epoch"] < self._start.epochs:
                self._open(record["epoch"] + 1, 0)
        else:
            title = _epoch_of(record["epoch"], self._start.epochs)
            print(f"{title}: {figures}, {record['seconds']:.1f} s", file=sys.stderr, flush=True)

    def end(self) -> None:
        """See ``Watcher``."""
        if self._bar is not None:
            self._bar.leave = self._bar.n > 0
            self._bar.close()
            self._bar = None

    def _open(self, epoch: int, done: int) -> None:
        """Show a bar before its first batch, which may have to wait for a compilation."""
        assert self._start is not None
        if sys.stderr.isatty():
            from tqdm import tqdm

            title = _epoch_of(epoch, self._start.epochs)
            self._bar = tqdm(total=self._start.batches, initial=done, desc=title, file=sys.stderr, dynamic_ncols=True)


def _epoch_of(epoch: int, epochs: int) -> str:
    return f"epoch {epoch:{len(str(epochs))}}/{epochs}"


def _figures(record: Record, names: Sequence[str]) -> str:
    """Some figures of a record in one line; shares in percent."""
    shown = []
    for name in names:
        value = record[name]
        if value is not None:
            shown.append(f"{name} {value:.1%}" if name in SHARES else f"{name} {value:.3g}")
    return ", ".join(shown)


# --- In files ---------------------------------------------------------------------------------------------------------


class JsonLines(Silent):
    """``metrics.jsonl``: a line of JSON for every epoch, and for every so many iterations, told apart by ``"kind"``.

    A run that was interrupted and went on leaves the lines of one that was not, but for their seconds.

    Args:
        every: Iterations from line to line.
    """

    def __init__(self, every: int = EVERY) -> None:
        self._every = every
        self._file: TextIO | None = None

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""
        path = _folder(start) / METRICS
        kept = [line for line in read_metrics(path) if not _is_beyond(line, start)] if start.iteration else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def iteration(self, record: Record) -> None:
        """See ``Watcher``."""
        if record["iteration"] % self._every == 0:
            self._write("iteration", record)

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""
        self._write("epoch", record)

    def end(self) -> None:
        """See ``Watcher``."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, kind: str, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps({"kind": kind, **record}) + "\n")
        self._file.flush()


def read_metrics(path: Path) -> list[Record]:
    """The lines of a ``metrics.jsonl``; none if there is no such file. One that was being written is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _is_beyond(line: Record, start: Start) -> bool:
    """Whether a line is about what will be done again."""
    return bool(line["epoch"] > start.epoch if line["kind"] == "epoch" else line["iteration"] > start.iteration)


class Curves(Silent):
    """``curves.png``: losses, accuracies, learning rate and eps by epoch, from the lines of ``JsonLines`` before it."""

    def __init__(self) -> None:
        self._start: Start | None = None

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""
        self._start = start

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""
        assert self._start is not None
        folder = _folder(self._start)
        draw_curves(folder / CURVES, read_metrics(folder / METRICS))


def draw_curves(path: Path, lines: Sequence[Record]) -> None:
    """Draw the lines of a ``metrics.jsonl``, with at least one epoch among them."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    iterations = [line for line in lines if line["kind"] == "iteration"]
    length = epochs[-1]["iteration"] / epochs[-1]["epoch"]
    # Means over an epoch are drawn in its middle, what was measured behind it at its end.
    at, between = [line["epoch"] for line in epochs], [line["iteration"] / length for line in iterations]
    figure = figure_of(13, 3.9)
    loss, accuracy, schedule = figure.subplots(1, 3)
    if iterations:
        batches = [line["loss"] for line in iterations]
        loss.plot(between, batches, color="C0", alpha=0.3, linewidth=1, label="some batches")
    means = [line["loss"] for line in epochs]
    loss.plot([epoch - 0.5 for epoch in at], means, marker=".", color="C0", label="mean of the epoch")
    loss.legend(fontsize=8, frameon=False)
    loss.set_title("training loss", fontsize=11)
    for name, label, color in (
        ("accuracy", "in training", "0.65"),
        ("clean", "clean", "C0"),
        ("robust", "robust", "C3"),
    ):
        points = [(line["epoch"], 100 * line[name]) for line in epochs if line[name] is not None]
        if points:
            shift = 0.5 if name == "accuracy" else 0.0
            accuracy.plot([x - shift for x, _ in points], [y for _, y in points], marker=".", color=color, label=label)
    best = [line for line in epochs if line["best"]]
    if best:
        score = "clean" if best[-1]["robust"] is None else "robust"
        accuracy.plot(
            best[-1]["epoch"],
            100 * best[-1][score],
            linestyle="",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            color="black",
            label=f"best: {best[-1][score]:.1%} in epoch {best[-1]['epoch']}",
        )
    accuracy.set_title("accuracy, %", fontsize=11)
    accuracy.set_ylim(-2, 102)
    accuracy.legend(fontsize=8, frameon=False)
    both, places = (iterations, between) if iterations else (epochs, at)
    schedule.plot(places, [line["lr"] for line in both], color="C2", label="learning rate")
    schedule.set_title("learning rate", fontsize=11)
    schedule.set_ylim(bottom=0)
    radii = [line["eps"] for line in both]
    if None not in radii and len(set(radii)) > 1:
        second = schedule.twinx()
        second.plot(places, radii, color="C1", linestyle="--", label="eps")
        second.set_ylim(bottom=0)
        second.spines["top"].set_visible(False)
        schedule.legend(handles=[*schedule.lines, *second.lines], fontsize=8, frameon=False, loc="center right")
        schedule.set_title("learning rate; right: eps", fontsize=11)
    for axis in (loss, accuracy, schedule):
        axis.set_xlabel("epoch")
        axis.set_xlim(0, at[-1] * 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)


# --- In TensorBoard ---------------------------------------------------------------------------------------------------


class TensorBoard(Silent):
    """``tensorboard/``: figures by iteration, examples of every epoch as images, the network as a graph.

    Args:
        every: Iterations from point to point.

    Raises:
        GradpruneError: TensorBoard is not installed.
    """

    def __init__(self, every: int = EVERY) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise GradpruneError('TensorBoard is not installed: run pip install "gradprune[training]"')
        self._every = every
        self._writer: Any = None
        self._start: Start | None = None

    def begin(self, start: Start) -> None:
        """See ``Watcher``."""
        from torch.utils.tensorboard import SummaryWriter

        self._start = start
        # What lies beyond the checkpoint is done again; readers forget the first time.
        purge = start.iteration + 1 if start.iteration else None
        self._writer = SummaryWriter(str(_folder(start) / TENSORBOARD), purge_step=purge)
        if start.example is not None and not start.iteration:
            self._draw_graph(start.model, start.example)

    def iteration(self, record: Record) -> None:
        """See ``Watcher``."""
        if record["iteration"] % self._every == 0:
            self._add(record, {"loss": "training/loss", "accuracy": "training/accuracy", **SCHEDULES})

    def epoch(self, record: Record) -> None:
        """See ``Watcher``."""
        self._add(record, {"clean": "validation/accuracy", "robust": "validation/robust accuracy"})
        self._add_examples(record["iteration"])
        self._writer.flush()

    def end(self) -> None:
        """See ``Watcher``."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, record: Record, tags: Mapping[str, str]) -> None:
        for name, tag in tags.items():
            if record[name] is not None:
                self._writer.add_scalar(tag, record[name], record["iteration"])

    def _add_examples(self, iteration: int) -> None:
        """Originals, adversarial examples, and perturbations from black to white: one row of images for each."""
        assert self._start is not None
        x, attack = self._start.example, self._start.attack
        if x is None or not can_draw(x):
            return
        low, high = (attack.bounds if attack is not None else None) or (float(x.min()), float(x.max()))
        rows = [(x - low) / (high - low)]
        if attack is not None:
            with unchanged(self._start.model, "eval"), torch.no_grad():
                y = self._start.model(x).argmax(1)
            x_adv = attack(self._start.model, x, y, runtime=Runtime(compile=False))
            delta = x_adv - x
            rows += [(x_adv - low) / (high - low), 0.5 + delta / (2 * delta.abs().max().clamp_min(1e-12))]
        for tag, images in zip(("original", "adversarial", "perturbation"), rows, strict=False):
            self._writer.add_images(f"examples/{tag}", images.clamp(0, 1), iteration)

    def _draw_graph(self, model: nn.Module, x: Tensor) -> None:
        """Add the network's graph; one that cannot be traced has none."""
        quiet = (contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings())
        with quiet[0], quiet[1], torch.random.fork_rng(), unchanged(model, "eval"):
            warnings.simplefilter("ignore")  # of the tracer, about what a graph does not show
            with contextlib.suppress(Exception):  # whatever the tracer meets in the user's model
                self._writer.add_graph(model, x)


def _folder(start: Start) -> Path:
    if start.folder is None:
        raise OptionError("this watcher writes files: call fit(folder=...)")
    return start.folder
