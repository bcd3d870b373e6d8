"""Options of ``gradprune demo`` and the order of its work."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprune.errors import GradpruneError
from gradprune.workloads.packages import PACKAGES

from .options import check_compiler, prepare_directory

DESCRIPTION = """\
Attack three networks with PGD: a ResNet-50 with random weights, for the time it takes; EfficientNet-Lite0 with trained
weights on 20 photographs of ImageNet; and a small network trained on the spot on MNIST digits. Up to four ways:

  eager backward()         on the model as it is: every weight gradient is computed and thrown away
  frozen eager             requires_grad_(False) on every parameter: the honest baseline
  frozen + compile(model)  the same with torch.compile(model), called from an eager step
  gradprune                the very code of "eager backward()", the whole step compiled with backend="gradprune"

All run in turn in one process. One table per network says what a step costs, what it saves for the backward pass, how
far its gradient is from float64, and what the attack achieved. Nothing is downloaded: pictures and weights come with
the packages of gradprune[demo].
"""

EPILOG = """\
examples:
  gradprune demo                               four to five minutes on two cores
  gradprune demo --quick --output demo-quick   a smaller network, smaller photographs, fewer steps
  gradprune demo --batch 8 --threads 1         how the figures move with the batch and the threads

It writes demo.md and demo.json (tables and raw figures with the environment) and demo.png (the examples).
"""

EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm", "timm": "timm", **PACKAGES}
"""Modules the demo needs beyond gradprune's own dependencies, and the names they are installed by."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        steps: PGD steps of one attack.
        batch: Photographs in a batch.
        size: Side of a photograph in pixels.
        rounds: Attacks timed per candidate.
    """

    steps: int = 10
    batch: int = 4
    size: int = 112
    rounds: int = 5


FULL = Settings()
QUICK = Settings(steps=3, batch=2, size=64, rounds=3)
LIMITS = {"steps": (1, 1000), "batch": (1, 1024), "size": (32, 1024), "rounds": (1, 1000), "threads": (1, 1024)}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradprune demo``."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller in every respect, without EfficientNet; about a minute (default: off)",
    )
    for name, text in (
        ("steps", "PGD steps of an attack"),
        ("batch", "photographs in a batch"),
        ("size", "side of a photograph in pixels"),
        ("rounds", "attacks timed per candidate"),
    ):
        parser.add_argument(
            f"--{name}",
            type=_within(name),
            metavar="N",
            help=f"{text} (default: {getattr(FULL, name)}, quick: {getattr(QUICK, name)})",
        )
    parser.add_argument("--threads", type=_within("threads"), metavar="N", help="CPU threads (default: torch's choice)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Carry out ``gradprune demo``.

    Raises:
        OptionError: The output directory cannot be written.
        GradpruneError: Something the demo needs is not installed.
    """
    # Whatever can be known to fail is found out here, not after minutes of compilation.
    check_extras()
    check_compiler()
    prepare_directory(arguments.output)
    preset = QUICK if arguments.quick else FULL
    chosen = {name: getattr(arguments, name) for name in ("steps", "batch", "size", "rounds")}
    settings = Settings(**{name: getattr(preset, name) if value is None else value for name, value in chosen.items()})

    import torch

    from gradprune.bench import demo

    threads = arguments.threads or torch.get_num_threads()
    measured = demo.measure(**vars(settings), threads=threads, quick=arguments.quick)
    demo.write(arguments.output, measured, vars(settings), threads)
    print(f"\nSaved in {arguments.output}: demo.md (tables, explained), demo.json (figures), demo.png (examples).")
    print('On your own attack: step = torch.compile(attack_step, backend="gradprune"), then call step in your loop.')
    print('For an attack library that calls loss.backward() itself: model = torch.compile(model, backend="gradprune").')
    return 0


def check_extras() -> None:
    """Make sure that the optional dependencies of the demo are there.

    Raises:
        GradpruneError: One of them is not installed.
    """
    missing = [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise GradpruneError(f'the demo needs {", ".join(missing)}: run pip install "gradprune[demo]"')


def _within(name: str) -> Any:
    """An argparse type for the integers that option ``name`` allows."""
    low, high = LIMITS[name]

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return value

    return parse
