"""gradprune with each pass off in turn, and each option that is on by default."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from gradprune.compiler.options import Options
from gradprune.passes.pipeline import PASS_NAMES

from .baselines import GRADPRUNE, Baseline, compiled_by_us
from .benchmark import add_cases, chosen_cases
from .cases import Case, find_case
from .report import failures, figure, ratio_text
from .step import FIGURES, Column, Comparison, StepBenchmark, about, columns_of
from .store import Ratio, Results, Settings

DEFAULT = ("resnet18-112-b8",)

COLUMNS: dict[str, Column] = {
    "candidate": FIGURES["candidate"],
    "ms/step": lambda one, record: figure(record.median, 1e-3),
    "without / with": lambda one, record: ratio_text(one.ratio(GRADPRUNE, record.candidate), spread=True),
    "compile s": lambda one, record: figure(record.cold_seconds),
    **{name: FIGURES[name] for name in ("saved MB", "peak MB", "gradient error")},
}


def ablations() -> list[Baseline]:
    """gradprune, then gradprune with each pass off, and with each option off that is on by default."""
    off: dict[str, dict[str, Any]] = {name: {"disable": (name,)} for name in PASS_NAMES}
    for option in dataclasses.fields(Options):
        if option.default is True and option.name.replace("_", "-") not in off:
            off[option.name] = {option.name: False}
    without = {f"without {name}": options for name, options in off.items()}
    return [
        Baseline(name, name, compiled_by_us(name, **options)) for name, options in {GRADPRUNE: {}, **without}.items()
    ]


class AblationBenchmark(StepBenchmark):
    """``bench ablation``.

    Attributes:
        default: Names of its cases.
    """

    default: ClassVar[Sequence[str]] = DEFAULT

    name = "ablation"
    help = "gradprune with each pass off in turn, and each option that is on by default"
    label = "time per step without it / with all (right of 1: it helps), quartiles of the rounds"
    legend = """\
- without / with: how many times as long a step takes without it, by rounds, quartiles in brackets. Above 1 it helps;
  below 1 a step is faster without.
- saved MB by gradprune's report, peak MB measured, compile s with empty disk caches."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser, self.default)
        self.add_timing(parser, candidates=False)

    def cases(self, arguments: argparse.Namespace) -> list[Case]:
        """What to measure on."""
        return chosen_cases(arguments, self.default)

    def baselines(self, arguments: argparse.Namespace, settings: Settings) -> list[Baseline]:
        """What to measure."""
        return ablations()

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        body = []
        for case in results.cases:
            one = Comparison(results.records, case)
            body += [f"## {case}", about(one, find_case(case), results.settings.steps), *failures(one.failed)]
            body.append(columns_of(one, COLUMNS))
        return body

    def ratio(self, one: Comparison, candidate: str) -> Ratio | None:
        """What the bar of a candidate shows."""
        return one.ratio(GRADPRUNE, candidate)
