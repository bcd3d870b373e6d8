"""The comparison of ``bench step`` over the batch."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from gradprune.support.figures import figure_of

from .baselines import EAGER_BACKWARD, FROZEN, GRADPRUNE
from .benchmark import WHOLE, add_cases, chosen_cases
from .cases import Case, find_case
from .report import OURS, finish_axis
from .step import Comparison, StepBenchmark
from .store import Results

BATCHES = (1, 2, 4, 8, 16, 32, 64)
DEFAULT = ("resnet18-112-b8",)


class ScalingBenchmark(StepBenchmark):
    """``bench scaling``."""

    name = "scaling"
    help = "the same over the batch"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser, DEFAULT, batch=False)
        text = "batches to compare (default: 1 2 4 ... 64)"
        parser.add_argument("--batches", nargs="+", default=BATCHES, help=text, **WHOLE)
        parser.set_defaults(batch=None)
        self.add_timing(parser)

    def cases(self, arguments: argparse.Namespace) -> list[Case]:
        """What to measure on."""
        chosen = chosen_cases(arguments, DEFAULT)
        found = [dataclasses.replace(case, batch=batch) for case in chosen for batch in arguments.batches]
        return list({case.name: case for case in found}.values())

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``: ratio to frozen eager, a panel for each network, a line for each candidate."""
        networks: dict[str, dict[int, Comparison]] = {}
        for case in map(find_case, results.cases):
            networks.setdefault(case.network, {})[case.batch] = Comparison(results.records, case.name)
        figure = figure_of(6.5 * len(networks), 4.2)
        axes = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, (network, batches) in zip(axes, networks.items(), strict=True):
            names = list(dict.fromkeys(name for one in batches.values() for name in one.measured))
            for name in names:
                points = [(batch, batches[batch].ratio(name, FROZEN)) for batch in sorted(batches)]
                known = [(batch, ratio) for batch, ratio in points if ratio is not None]
                at, ratios = [batch for batch, _ in known], [ratio for _, ratio in known]
                style: dict[str, Any] = {"color": OURS, "linewidth": 2.2} if name == GRADPRUNE else {}
                style.update({"linestyle": ":"} if name == EAGER_BACKWARD else {})
                (line,) = axis.plot(at, [r.median for r in ratios], marker="o", markersize=3.5, label=name, **style)
                low, high = [r.low for r in ratios], [r.high for r in ratios]
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(batches), [str(batch) for batch in sorted(batches)])
            finish_axis(axis, network, "batch", f"times as fast as {FROZEN}")
        return figure
