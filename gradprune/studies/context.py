"""A study under way: what it was asked, what it measures cell by cell, how it attacks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import gradprune
from gradprune.attacks import PGD, Attack, Runtime
from gradprune.runtime.functions import Functions, original
from gradprune.runtime.guard import unchanged
from gradprune.support.environment import environment
from gradprune.support.figures import save_figure
from gradprune.support.progress import stage
from gradprune.torch_compat.dynamo import counters

from .data import Images
from .outcome import Picture
from .records import Figures, Records
from .written import as_written

RECORD, RUNS = "record.jsonl", "runs"
SCALES = ("full", "small", "toy")
EVALUATED = 250
"""Rows that are evaluated at once."""
PACES = 5
"""How often two ways are timed in turn."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        output: Folder in which every study has one of its own.
        scale: ``"full"``, as the paper has it; ``"small"``, minutes on two cores; ``"toy"``, seconds, which says
            nothing about the papers and is for tests.
        eager: Run attacks and training as the papers' programs do: nothing compiled, weight gradients computed.
        seed: Of all random numbers.
        fresh: Forget what was measured before.
        arch: Of networks that a study can choose from, those to run; empty for all.
        checkpoint: A state dict, for the study that fine-tunes one.
        tensorboard: Write logs for TensorBoard, if it is installed.
    """

    output: Path
    scale: str = "full"
    eager: bool = False
    seed: int = 0
    fresh: bool = False
    arch: tuple[str, ...] = ()
    checkpoint: Path | None = None
    tensorboard: bool = True


@dataclass
class Context:
    """A study under way.

    Attributes:
        name: The study's.
        options: What was asked for.
        images: The data.
        folder: Where it writes to.
        records: What it has measured.
    """

    name: str
    options: Options
    images: Images
    folder: Path
    records: Records
    _later: int = 0
    _models: list[Any] = field(default_factory=list)
    _notes: Figures = field(default_factory=dict)

    @staticmethod
    def open(name: str, options: Options, images: Images, scale: object) -> Context:
        """Begin a study, or go on with it.

        Args:
            name: The study's.
            options: What was asked for.
            images: The data.
            scale: The sizes that cells depend on; printed, and compared by what is printed.

        Raises:
            OptionError: The folder holds a run with other settings.
        """
        folder = options.output / (f"{name}-eager" if options.eager else name)
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "study": name,
            "scale": options.scale,
            "sizes": repr(scale),
            "eager": options.eager,
            "seed": options.seed,
            "data": images.name,
            "train": len(images.train_x),
            "test": len(images.test_x),
            "arch": list(options.arch),
        }
        records = Records(folder / RECORD, settings, environment())
        records.resume()
        return Context(name, options, images, folder, records)

    # --- Measuring ----------------------------------------------------------------------------------------------------

    def cell(self, key: str, compute: Callable[[], Figures]) -> Figures:
        """The figures of a cell: measured, or found in the record. Says how long it took."""

        def measured() -> tuple[Figures, Figures]:
            self._later, self._models, self._notes = 0, [], {}
            begun, used, compiled = time.perf_counter(), processor_seconds(), graphs_compiled()
            with stage(f"{self.name}: {key}"):
                figures = compute()
            run = {
                "seconds": time.perf_counter() - begun,
                "processor_seconds": processor_seconds() - used,
                "graphs": graphs_compiled() - compiled,
                "graphs_after_first_epoch": self._later,
                **attack_flops(self._models),
                **self._notes,
            }
            return figures, run

        figures = self.records.get(key, measured)
        for checkpoint in self.checkpoints(key).rglob("*.pt"):
            checkpoint.unlink()
        return figures

    def checkpoints(self, key: str) -> Path:
        """Where what belongs to a cell may be kept while it is measured."""
        return self.folder / RUNS / "".join(letter if letter.isalnum() else "-" for letter in key)

    def note_later(self, graphs: int) -> None:
        """Add to what the current cell compiled after its first epoch, or first batch."""
        self._later += graphs

    @property
    def compiled(self) -> bool | Literal["attack"]:
        """What of a training is compiled: what is small is done before an outer step's compilation would have paid."""
        return not self.options.eager and (self.options.scale == "full" or "attack")

    def note(self, **notes: float) -> None:
        """Note what a run happened to take in the current cell, such as seconds or bytes."""
        self._notes.update(notes)

    def watch(self, model: Any) -> None:
        """Count the FLOPs of what is compiled for attacks on ``model`` in the current cell."""
        if not any(model is one for one in self._models):
            self._models.append(model)

    def log(self, step: int, scalars: Figures) -> None:
        """Write numbers for TensorBoard, if that is wanted and installed."""
        if not self.logs:
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard"), filename_suffix=f".{step}") as writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

    @property
    def logs(self) -> bool:
        """Whether logs for TensorBoard are written."""
        return self.options.tensorboard and importlib.util.find_spec("tensorboard") is not None

    # --- Attacking ----------------------------------------------------------------------------------------------------

    def attack(self, attack: PGD) -> Attack:
        """An attack, seeded, as this study runs it: as it is, or as the papers' programs have it."""
        return as_written(attack) if self.options.eager else attack

    def runtime(self, batch: int) -> Runtime:
        """How attacks run, in batches of so many rows."""
        return Runtime(compile=not self.options.eager, batch_size=batch)

    @property
    def eagerly(self) -> Runtime:
        """How attacks run where nothing is compiled."""
        return Runtime(compile=False)

    def accuracy(self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None, batch: int) -> float:
        """Share of inputs that a model classifies as labelled, attacked or not, from 0 to 1; see ``top``."""
        return self.top(model, x, y, attack, batch)[0]

    def top(self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None, batch: int) -> list[float]:
        """Shares of inputs whose label is a model's first choice, and among its first five.

        Args:
            model: From inputs ``(N, ...)`` to logits ``(N, classes)``.
            x: Inputs.
            y: Labels ``(N,)``.
            attack: As ``self.attack`` returns it; ``None`` for none.
            batch: Rows to compute at once.
        """
        self.watch(model)
        runtime, right, done = self.runtime(min(batch, len(x))), torch.zeros(2), 0
        while done < len(x):
            # The last batch is a whole one too, some rows of it for the second time: others are compiled for their own.
            begin = max(min(done, len(x) - batch), 0)
            inputs, labels = x[begin : begin + batch], y[begin : begin + batch]
            attacked = inputs if attack is None else attack(model, inputs, labels, runtime=runtime)
            # Not through the runtime: compiling the forward pass takes longer than all of these calls.
            with unchanged(model, "eval"), torch.no_grad():
                logits = model(attacked)
            choices = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            hits = torch.stack([choices[:, 0], choices.any(1)], 1)[done - begin :]
            right += hits.sum(0)
            done = begin + len(inputs)
        return [float(count) / len(x) for count in right]

    def pace(self, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        """Note how many times as fast one way is as another, called in turn; both have been called before.

        Args:
            ours: What this study runs.
            theirs: What the papers' programs do.
        """
        self.note(times_as_fast=ratio_of_seconds(theirs, ours))

    # --- Writing ------------------------------------------------------------------------------------------------------

    def draw(self, figure: Any, file: str, caption: str) -> Picture:
        """Write a figure of matplotlib under a title: what it shows, the data, and the scale."""
        how = ", run eagerly" * self.options.eager
        figure.suptitle(f"{caption}\n{self.images.name}, {self.options.scale} scale{how}", fontsize=10)
        save_figure(figure, self.folder / file)
        return Picture(file, caption)

    def run_totals(self) -> Figures:
        """Seconds, compilations and FLOPs of all cells together."""
        runs = [cell["run"] for cell in self.records.cells.values()]
        totals = {name: sum(run.get(name, 0) for run in runs) for name in RUN_TOTALS}
        paces = [run["times_as_fast"] for run in runs if "times_as_fast" in run]
        return {**totals, "cells": len(runs), "times_as_fast": paces[-1] if paces else None}


RUN_TOTALS = (
    "seconds",
    "processor_seconds",
    "graphs",
    "graphs_after_first_epoch",
    "attack_graphs",
    "weight_gradient_flops",
    "input_gradient_flops",
)


def processor_seconds() -> float:
    """Seconds of processor time of this process and of those it waited for, such as the C++ compiler."""
    return sum(os.times()[:4])


def ratio_of_seconds(first: Callable[[], object], second: Callable[[], object]) -> float:
    """How many times as long one call takes as another, the median of a few turns."""
    return statistics.median(seconds_of(first) / seconds_of(second) for _ in range(PACES))


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def graphs_compiled() -> int:
    """How many graphs torch has compiled in this process, for whichever backend."""
    return int(counters["stats"]["unique_graphs"])


def attack_flops(models: Sequence[Any]) -> Figures:
    """Graphs compiled for attacks on some models, and the FLOPs of gradients in them, from their reports."""
    found = [
        report
        for model in models
        for compiled in Functions.of(original(model)).compiled
        for report in gradprune.reports(compiled)
    ]
    after = [report.flops["after"] for report in found if "after" in report.flops]
    return {
        "attack_graphs": len(found),
        "weight_gradient_flops": sum(flops["weight_grad"] for flops in after),
        "input_gradient_flops": sum(flops["input_grad"] for flops in after),
    }
