"""What a benchmark is to the command line, and the options that several have."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from gradprune.errors import OptionError
from gradprune.support.arguments import parse_whole

from .cases import CASES, Case, find_case
from .store import Results, Settings

LABELLED = "Random weights and random inputs, always the same; labels are the network's own clean predictions."


@dataclass(frozen=True)
class Plan:
    """What a benchmark is about to do: whatever can be known to fail is found out by making it.

    Attributes:
        benchmark: Whose it is.
        measure: Measures what results lack, and saves as it goes.
        packages: Modules it needs beyond gradprune's own dependencies.
        compiles: Whether a C++ compiler is needed.
        environment: What its figures depend on beside the machine.
    """

    benchmark: Benchmark
    measure: Callable[[Results[Any]], None]
    packages: set[str] = field(default_factory=set)
    compiles: bool = True
    environment: dict[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """A benchmark.

    Attributes:
        name: On the command line and of its files.
        help: One line for ``--help``.
        record: Class of its records.
        legend: What its columns say.
        about: What is measured on.
        takes_steps: Whether its figures depend on the number of steps of an attack.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    record: ClassVar[type]
    legend: ClassVar[str]
    about: ClassVar[str] = LABELLED
    takes_steps: ClassVar[bool] = False

    @abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add its options, without ``--output``."""

    @abstractmethod
    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """What was asked for, what has to come before it first.

        Raises:
            OptionError: There is no such thing.
        """

    @abstractmethod
    def sections(self, results: Results[Any]) -> list[str]:
        """Its tables in Markdown, with what goes above them."""

    @abstractmethod
    def draw(self, results: Results[Any]) -> Any:
        """Its figure."""


# --- Options ----------------------------------------------------------------------------------------------------------


WHOLE: dict[str, Any] = {"type": parse_whole, "metavar": "N"}


def add_cases(parser: argparse.ArgumentParser, default: Sequence[str] = ("all",), *, batch: bool = True) -> None:
    """Add ``--cases`` and, if it makes sense, ``--batch``."""
    shown = " ".join(default)
    parser.add_argument(
        "--cases", nargs="+", metavar="CASE", help=f"such as resnet18-112-b8, any batch (default: {shown})"
    )
    if batch:
        parser.add_argument("--batch", help="batch of all cases (default: that in their names)", **WHOLE)


def add_budget(parser: argparse.ArgumentParser, seconds: int | None, each: str = "case") -> None:
    """Add ``--rounds`` and, if there is a default, ``--seconds``."""
    if seconds:
        text = f"timing per {each}, but at least 3 rounds (default: {seconds})"
        parser.add_argument("--seconds", default=seconds, help=text, **WHOLE)
    parser.add_argument("--rounds", default=9, help="measurements of each, at most (default: 9)", **WHOLE)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and in which type to run."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one)")
    add_threads(parser)
    add("--autocast", choices=("fp16", "bf16"), help="type to run the model in (default: float32)")
    add("--tf32", action="store_true", help="allow TF32 in float32 products on CUDA (default: off)")
    add("--channels-last", action="store_true", help="images and weights channels last, for all (default: off)")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--fresh``."""
    parser.add_argument("--threads", help="CPU threads (default: torch's choice)", **WHOLE)
    parser.add_argument("--fresh", action="store_true", help="begin the file anew instead of going on (default: off)")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the options say about the device.

    Raises:
        OptionError: They do not go together, or there is no such device.
    """
    device = getattr(arguments, "device", "cpu") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no CUDA device; leave --device out or pass --device cpu")
    tf32 = getattr(arguments, "tf32", False)
    if tf32 and device != "cuda":
        raise OptionError("--tf32 is about CUDA: leave it out on a CPU")
    return Settings(
        device,
        arguments.threads or torch.get_num_threads(),
        getattr(arguments, "steps", 1),
        getattr(arguments, "autocast", None),
        tf32,
        getattr(arguments, "channels_last", False),
    )


def chosen_cases(arguments: argparse.Namespace, default: Iterable[str] | None = None) -> list[Case]:
    """The cases asked for, each once; all by default.

    Raises:
        OptionError: There is no such case.
    """
    cases = [find_case(name) for name in arguments.cases or default or [case.name for case in CASES]]
    if arguments.batch:
        cases = [dataclasses.replace(case, batch=arguments.batch) for case in cases]
    return list({case.name: case for case in cases}.values())


def packages_of(cases: Iterable[Case]) -> set[str]:
    """Modules that networks come from."""
    return {case.requires for case in cases if case.requires}


def already(what: str, results: Results[Any]) -> None:
    """Say that something is not measured again."""
    print(f"{what}: already in {results.path}", file=sys.stderr)
