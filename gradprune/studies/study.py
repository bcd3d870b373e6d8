"""What a study is, and how one is run."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from gradprune.support.files import write_json

from .context import Context, Options
from .data import Images, load_images
from .outcome import Claim, Outcome, Picture, Table

OUTCOME = "outcome.json"


class Study(ABC):
    """A study: an object without state; its docstring is its help.

    Attributes:
        name: What it is called on the command line.
        title: What it is about, with the paper.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    scales: ClassVar[dict[str, Any]]
    """Sizes by the names in ``SCALES``."""

    @abstractmethod
    def measure(self, context: Context, scale: Any) -> Outcome:
        """Measure everything, cell by cell, and draw the figures."""

    def load(self, name: str | None, root: Path, scale: Any) -> Images:
        """The data asked for, or what the study takes where none are; see ``load_images``."""
        return load_images(name, root)

    def select(self, images: Images, scale: Any) -> Images:
        """The part of the data that is used."""
        return images.only(scale.train, scale.test)

    def outcome(
        self,
        context: Context,
        about: str,
        claims: Sequence[Claim],
        tables: Sequence[Table],
        pictures: Sequence[Picture],
    ) -> Outcome:
        """What ``measure`` returns; see ``Outcome``."""
        options = context.options
        return Outcome(
            *(self.name, self.title, about, context.images.name, options.scale, options.eager),
            *(claims, tables, pictures),
        )

    def run(self, options: Options, images: Images, scale: Any = None) -> Outcome:
        """Run the study, or what is left of it; write its outcome, and say how long it took.

        Args:
            options: What was asked for.
            images: The data, as ``load`` returns them.
            scale: Sizes of one's own in place of ``scales[options.scale]``.

        Raises:
            OptionError: The folder holds a run with other settings.
        """
        scale = self.scales[options.scale] if scale is None else scale
        images = self.select(images, scale)
        context = Context.open(self.name, options, images, scale)
        with torch.random.fork_rng(devices=[]):
            outcome = self.measure(context, scale)
        outcome = replace(outcome, run={**outcome.run, **context.run_totals()})
        write_json(context.folder / OUTCOME, asdict(outcome))
        run = outcome.run
        print(
            f"{self.name}: {run['seconds']:.0f} s in {run['cells']} cells, {run['processor_seconds']:.0f} s of "
            f"processor time; {run['graphs']} graphs compiled, {run['graphs_after_first_epoch']} of them after a first "
            f"epoch; {run['weight_gradient_flops']} FLOPs of weight gradients in attacks",
            file=sys.stderr,
            flush=True,
        )
        return outcome
