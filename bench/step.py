"""The main comparison: time, memory and correctness of a step of PGD, in every way, on every case."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradprune.support.progress import counter, stage
from gradprune.torch_compat.inductor import fresh_cache

from . import timing
from .attack_step import Step, attack, move, pgd_step
from .baselines import (
    ALTERNATIVES,
    BASELINES,
    DTYPES,
    EAGER_BACKWARD,
    FROZEN,
    GRADPRUNE,
    NAMED,
    Baseline,
    Contender,
    choose,
    for_case,
)
from .benchmark import (
    WHOLE,
    Benchmark,
    Plan,
    add_budget,
    add_cases,
    add_settings,
    already,
    chosen_cases,
    packages_of,
)
from .cases import TINY, Case, Workload, find_case
from .harness import (
    Budget,
    CheckFailed,
    load_average,
    peak_bytes,
    reason,
    start_compiler,
    synchronize,
    time_rounds,
)
from .kernels import Kernels, KernelsBenchmark, limit
from .report import (
    OTHERS,
    OURS,
    Bar,
    attacked,
    draw_bars,
    errors,
    failures,
    figure,
    grid,
    ratio_text,
)
from .store import Compared, Ratio, Results, Settings, Timed
from .turns import side_by_side, within

POINT_SEEDS = (1, 2)

GRADIENT_TOLERANCE = 0.05
"""Allowed error in the Euclidean norm, for one ReLU that rounds to the other side can cost a percent; or four times the
error of eager, where that is larger; but never more than half of the distance between the points' own gradients."""

UPDATE_TOLERANCE = 1e-3
"""Allowed share of values that are not where the candidate's own gradient should have moved them."""

LEGEND = """\
- ms/step (or us): median over the rounds of attack / steps, so that what happens once per attack is in it; IQR: its
  interquartile range.
- vs: how many times as fast as that baseline, median of the ratios within each round; below 1 is slower. In brackets
  the quartiles of these ratios.
- best alternative: the fastest of frozen eager, frozen + compile(model), compile(step) and, where they were run, those
  with CUDA graphs (reduce-overhead) and max-autotune.
- of limit: how many times the isolated-kernel limit a step takes (`bench kernels`: convolutions and linear layers by
  themselves, each with the fastest kernel found).
- FLOPs say: the ratio to eager backward() if only the FLOPs of contractions counted.
- compile s: first call, with empty disk caches and a compiler that is already started; break-even: steps after which it
  has made up for compiling longer than the best alternative.
- saved MB: alive from forward to backward; gradprune's by its report. peak MB: most that a step holds beyond what was
  held before. "-": cannot be counted.
- gradient error: largest difference to float64 relative to the largest value / in the Euclidean norm; the worst of
  three points. A ReLU whose input rounds to the other side of zero costs up to percents, in eager too.
- pixels off: share of the adversarial values that differ from those of eager. success: inputs moved to another class.
- Every candidate was checked against float64 at two points and, without --distinct, called with x_adv = x; one that
  fails is not timed."""


# --- Records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record(Timed):
    """What was measured of one candidate on one case; ``None`` is what was not, or cannot be.

    Attributes:
        case: Name of the case.
        candidate: Name of the candidate.
        failed: Why there are no figures; ``None`` if there are.
        seconds: For every round, the seconds of the attack divided by its steps. Round ``i`` of all candidates of a
            case ran in turn.
        cold_seconds: Duration of the first call, if it compiles, with empty disk caches.
        warm_seconds: The same with the caches that an earlier process left.
        flops: FLOPs of the contractions of a step, a multiply-add as two.
        saved_bytes: Bytes alive from the forward to the backward pass.
        peak_bytes: Most bytes a step holds at once beyond what was held before it.
        gradient_error: Largest error of the gradient against float64, relative to its largest value; the worst point.
        gradient_error_l2: The same in the Euclidean norm.
        eager_error: ``gradient_error`` of eager autograd with the same settings.
        eager_error_l2: ``gradient_error_l2`` of the same.
        success_rate: Share of the inputs that the attack moved to another class.
        eager_success_rate: The same of eager.
        differing: Share of the values of the adversarial examples that are not those of eager.
        load: Load average of the machine when the case was begun.
    """

    case: str
    candidate: str
    failed: str | None = None
    seconds: list[float] = field(default_factory=list)
    cold_seconds: float | None = None
    warm_seconds: float | None = None
    flops: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    gradient_error: float | None = None
    gradient_error_l2: float | None = None
    eager_error: float | None = None
    eager_error_l2: float | None = None
    success_rate: float | None = None
    eager_success_rate: float | None = None
    differing: float | None = None
    load: float | None = None

    def derived(self, records: Sequence[Record]) -> dict[str, Any]:
        """All that follows from the figures, for the readers of a JSON file."""
        return Comparison(records, self.case).derived(self.candidate)


class Comparison(Compared[Record]):
    """The timed records of one case.

    Args:
        records: All records of a file.
        case: Name of the case.
    """

    def __init__(self, records: Sequence[Record], case: str) -> None:
        found = [record for record in records if record.case == case]
        self.failed = [record for record in found if record.failed]
        self.measured = {record.candidate: record for record in found if record.seconds}

    @property
    def best_alternative(self) -> str | None:
        """The fastest alternative by the medians."""
        return self.fastest(ALTERNATIVES)

    def predicted_ratio(self, candidate: str) -> float | None:
        """How many times as fast as ``eager backward()`` it would be if only FLOPs counted."""
        full, own = self.measured.get(EAGER_BACKWARD), self.measured.get(candidate)
        return full.flops / own.flops if full and own and full.flops and own.flops else None

    def break_even(self, candidate: str) -> float | None:
        """Steps after which a candidate has made up for compiling longer than the best alternative.

        Returns:
            ``None`` if it never has, or compiles nothing.
        """
        ours, best = self.measured[candidate], self.best_alternative
        if best is None or ours.cold_seconds is None or ours.median >= self.measured[best].median:
            return None
        theirs = self.measured[best]
        return max(0.0, ours.cold_seconds - (theirs.cold_seconds or 0.0)) / (theirs.median - ours.median)

    def more(self, candidate: str) -> dict[str, Any]:
        """As ``Compared.more``."""
        return {
            "best_alternative": self.best_alternative,
            "break_even_steps": self.break_even(candidate),
            "predicted_ratio": self.predicted_ratio(candidate),
        }


# --- Measuring --------------------------------------------------------------------------------------------------------


Reports = list[dict[str, Any]]
"""What gradprune says of the graphs of one candidate, before its step was called in other ways."""


@dataclass(frozen=True)
class Reference:
    """What candidates have to agree with.

    Attributes:
        work: The case.
        points: Pairs of an ``x_adv`` and the float64 gradient there. Two are drawn like the clean inputs, where the
            gradient is another one altogether; the last ``x_adv``, if asked for, is the tensor of clean inputs itself.
        errors: Largest gradient errors of eager with the same settings, in the maximum and the Euclidean norm.
        tolerance: Largest allowed error in the Euclidean norm.
        adversarial: Adversarial examples of eager.
    """

    work: Workload
    points: list[tuple[Tensor, Tensor]]
    errors: tuple[float, float]
    tolerance: float
    adversarial: Tensor

    @staticmethod
    def of(work: Workload, settings: Settings, *, same: bool = True) -> Reference:
        """Compute it with eager autograd; ``same``: also where ``x_adv`` is the tensor of clean inputs."""
        case, x, y = work.case, work.x, work.y
        exact = pgd_step(copy.deepcopy(work.model).double().requires_grad_(False), case)
        eager = pgd_step(copy.deepcopy(work.model).requires_grad_(False), case, DTYPES[settings.autocast])
        drawn = [torch.empty_like(x).copy_(case.inputs(seed)) for seed in POINT_SEEDS]
        points = [(x_adv, exact(x_adv.double(), x.double(), y)[1]) for x_adv in (*drawn, *[x] * same)]
        errors = [timing.relative_errors(eager(x_adv, x, y)[1], gradient) for x_adv, gradient in points]
        worst = max(error for error, _ in errors), max(error for _, error in errors)
        _, apart = timing.relative_errors(points[0][1], points[1][1])
        tolerance = min(max(GRADIENT_TOLERANCE, 4 * worst[1]), apart / 2)
        return Reference(work, points, worst, tolerance, attack(eager, x, y, settings.steps))

    def check(self, step: Step) -> tuple[float, float]:
        """Compare a step with float64 at all points.

        Returns:
            Largest gradient errors, in the maximum and the Euclidean norm.

        Raises:
            CheckFailed: A gradient is off, or the next ``x_adv`` does not follow from it.
        """
        case, x, y = self.work.case, self.work.x, self.work.y
        largest = euclidean = 0.0
        for x_adv, exact in self.points:
            where = "when x_adv is x itself" if x_adv is x else "at some x_adv"
            moved, gradient = step(x_adv, x, y)
            errors = timing.relative_errors(gradient, exact)
            if not errors[1] <= self.tolerance:
                raise CheckFailed(f"gradient off by {errors[1]:.1%} {where}, allowed are {self.tolerance:.1%}")
            if not (off := timing.differing_share(moved, move(case, x_adv, x, gradient))) <= UPDATE_TOLERANCE:
                raise CheckFailed(f"{off:.1%} of the values of the next x_adv are wrong {where}")
            largest, euclidean = max(largest, errors[0]), max(euclidean, errors[1])
        return largest, euclidean


def measure_case(
    case: Case, baselines: Sequence[Baseline], settings: Settings, budget: Budget, *, same: bool = True
) -> list[Record]:
    """Check all candidates of one case, then time those that passed in turn; ``same`` as in ``measure_workload``.

    Returns:
        A record for each candidate, in their order.
    """
    with side_by_side(budget.lock) as alone:
        with stage(f"{case.name}: building"):
            work = case.prepare(settings.device, channels_last=settings.channels_last)
        return measure_workload(work, baselines, settings, budget, same=same, alone=alone)


def measure_workload(
    work: Workload,
    baselines: Sequence[Baseline],
    settings: Settings,
    budget: Budget,
    tell: Callable[[Contender, Tensor, Reports], None] = lambda contender, adversarial, reports: None,
    *,
    same: bool = True,
    alone: Callable[[], object] = lambda: None,
) -> list[Record]:
    """As ``measure_case``, of a case that has been built.

    Args:
        work: The case.
        baselines: The candidates.
        settings: Of the run.
        budget: How long to time.
        tell: Called with every candidate that was timed, the adversarial examples it found, and gradprune's reports.
        same: Also check a call with one tensor as both ``x_adv`` and ``x``, for which Dynamo compiles anew.
        alone: Called before the candidates are timed; waits for processes that would disturb it.
    """
    # Candidates of all cases share the code that Dynamo keys its memory of shapes by.
    torch.compiler.reset()
    load = load_average()
    case = work.case
    with stage(f"{case.name}: float64 gradients"):
        reference = Reference.of(work, settings, same=same)
    records: dict[str, Record] = {}
    passed: list[Contender] = []
    reports: dict[str, Reports] = {}
    counted: dict[str, int] = {}
    if any(baseline.compiles for baseline in baselines):
        start_compiler(settings.device)
    for baseline in baselines:
        record = Record(case.name, baseline.name, load=load)
        # Empty disk caches: a compile time that depended on earlier runs, or on other candidates, would be none. Beside
        # other processes it is none in any case.
        empty = fresh_cache() if baseline.compiles and budget.lock is None else contextlib.nullcontext()
        with stage(f"{case.name}: checking {baseline.name}"), empty, within(budget.patience):
            try:
                contender, figured, reports[baseline.name] = _enter(baseline, reference, settings)
            except Exception as error:  # whatever a compiler may raise: the others are measured all the same
                records[baseline.name] = replace(record, failed=reason(error))
                print(f"{baseline.name} failed: {reason(error)}", file=sys.stderr, flush=True)
                continue
        passed.append(contender)
        if budget.lock is not None:
            figured.pop("cold_seconds", None)
        records[baseline.name] = replace(record, **figured)
        if len(reports[baseline.name]) == 1:
            counted = counted or reports[baseline.name][0]["flops"]["before"]
    alone()
    with counter(f"{case.name}: timing", budget.rounds * len(passed)) as bar:
        seconds = time_rounds(passed, work, settings.steps, budget, bar.update)
    for contender in passed:
        with stage(f"{case.name}: memory and success of {contender.name}"):
            figured, adversarial = _finish(contender, reference, settings)
        figured["seconds"] = seconds[contender.name]
        tell(contender, adversarial, reports[contender.name])
        if counted and contender.name in {*NAMED, *ALTERNATIVES}:
            # All but one leave the weight gradients out. One way of counting for all, so that the figures compare.
            spared = counted["weight_grad"] if contender.name != EAGER_BACKWARD else 0
            figured["flops"] = sum(counted.values()) - spared
        records[contender.name] = replace(records[contender.name], **figured)
    return list(records.values())


def _enter(baseline: Baseline, reference: Reference, settings: Settings) -> tuple[Contender, dict[str, Any], Reports]:
    """Build, compile, check and warm one contender; with what is known of it then, and gradprune's reports."""
    work = reference.work
    contender = baseline.build(work, settings)
    with contender.context():
        x_adv = reference.points[0][0].clone()  # see Note [Distinct tensors]
        started = time.perf_counter()
        contender.step(x_adv, work.x, work.y)
        synchronize(settings.device)
        seconds = time.perf_counter() - started
        reports = contender.reports()
        for report in reports:
            if report["fallback"]:
                raise CheckFailed(f"it fell back: {report['fallback']}")
        largest, euclidean = reference.check(contender.step)
        # Two steps: the second is given what the first returned, as in the attack that is timed.
        attack(contender.step, work.x, work.y, steps=2)
    figured: dict[str, Any] = {"gradient_error": largest, "gradient_error_l2": euclidean}
    figured["eager_error"], figured["eager_error_l2"] = reference.errors
    if contender.compiled:
        figured["cold_seconds"] = seconds
    # Torch 2.11 compiles what comes before requires_grad_() as a graph of its own, in which nothing is computed.
    reports = [report for report in reports if any(report["flops"]["before"].values())]
    if len(reports) == 1:  # more than one is a graph break, and their sum would not be the figure of a step
        figured["flops"] = sum(reports[0]["flops"]["after"].values())
        figured["saved_bytes"] = reports[0]["saved_bytes"]["after"]
    return contender, figured, reports


def _finish(contender: Contender, reference: Reference, settings: Settings) -> tuple[dict[str, Any], Tensor]:
    """What must not be measured between two rounds: what the attack achieves, and memory; with what it found."""
    work, step = reference.work, contender.step
    x, y = work.x, work.y
    with contender.context():
        contender.clear_gradients()
        adversarial = attack(step, x, y, settings.steps)
        figured: dict[str, Any] = {
            "success_rate": 1 - timing.accuracy(work.model, adversarial, y),
            "eager_success_rate": 1 - timing.accuracy(work.model, reference.adversarial, y),
            "differing": timing.differing_share(adversarial, reference.adversarial),
        }
        if not contender.foreign:
            figured["peak_bytes"] = peak_bytes(step, x, y)
        if contender.autograd:
            figured["saved_bytes"] = timing.saved_bytes(step, contender.model, x.clone(), x, y)
    return figured, adversarial


# --- Tables -----------------------------------------------------------------------------------------------------------

Column = Callable[[Comparison, Record], str]


def columns_of(one: Comparison, columns: Mapping[str, Column]) -> str:
    """A table with a row for each candidate that was timed."""
    return grid([*columns], ([column(one, record) for column in columns.values()] for record in one.measured.values()))


FIGURES: dict[str, Column] = {
    "candidate": lambda one, record: record.candidate,
    "GFLOP": lambda one, record: figure(record.flops, 1e9),
    "saved MB": lambda one, record: figure(record.saved_bytes, 1e6),
    "peak MB": lambda one, record: figure(record.peak_bytes, 1e6),
    "gradient error": lambda one, record: errors(record.gradient_error, record.gradient_error_l2),
    "eager's own": lambda one, record: errors(record.eager_error, record.eager_error_l2),
    "pixels off": lambda one, record: f"{record.differing or 0:.1%}",
    "success": lambda one, record: f"{record.success_rate or 0:.1%}",
    "eager's success": lambda one, record: f"{record.eager_success_rate or 0:.1%}",
}


def _times(one: Comparison, floor: float | None) -> dict[str, Column]:
    """Columns about time; ``floor`` is the isolated-kernel limit in seconds."""
    unit, name = (1e-6, "us") if max((r.median for r in one.measured.values()), default=1) < 1e-3 else (1e-3, "ms")

    def versus(baseline: str) -> Column:
        return lambda one, record: ratio_text(one.ratio(record.candidate, baseline))

    return {
        "candidate": FIGURES["candidate"],
        f"{name}/step": lambda one, record: figure(record.median, unit),
        "IQR": lambda one, record: figure(record.iqr, unit),
        **{f"vs {baseline}": versus(baseline) for baseline in NAMED},
        "vs best alternative": lambda one, record: ratio_text(
            one.ratio(record.candidate, one.best_alternative), spread=True
        ),
        "of limit": lambda one, record: figure(record.median / floor if floor else None),
        "FLOPs say": lambda one, record: ratio_text(one.predicted_ratio(record.candidate)),
        "compile s": lambda one, record: figure(record.cold_seconds),
        "break-even": _break_even,
    }


def _break_even(one: Comparison, record: Record) -> str:
    """Steps, ``never`` for what compiles only to be slower, ``-`` for what compiles nothing or is the best itself."""
    steps = one.break_even(record.candidate)
    never = steps is None and record.cold_seconds is not None and record.candidate != one.best_alternative
    return "never" if never else figure(steps)


def _summary(results: Results[Record], limits: Sequence[Kernels]) -> str:
    """One row for each case: gradprune against what matters most."""
    rows = []
    for case in results.cases:
        one, floor = Comparison(results.records, case), limit(limits, case)
        ours, best = one.measured.get(GRADPRUNE), one.best_alternative
        row = [case, figure(ours.median, 1e-3) if ours else "failed or not run"]
        row += [f"{figure(one.measured[best].median, 1e-3)} {best}" if best else "-"]
        row += [ratio_text(one.ratio(GRADPRUNE, best), spread=True)]
        row += [ratio_text(one.ratio(GRADPRUNE, baseline)) for baseline in (FROZEN, EAGER_BACKWARD)]
        rows.append([*row, figure(ours.median / floor if ours and floor else None)])
    head = "case", "gradprune ms", "best alternative ms", "vs best alternative", f"vs {FROZEN}", f"vs {EAGER_BACKWARD}"
    return "## Summary\n\n" + grid([*head, "of limit"], rows)


def about(one: Comparison, case: Case, steps: int) -> str:
    """What was attacked and how."""
    records = one.measured.values()
    rounds, load = max((len(r.seconds) for r in records), default=0), max((r.load or 0 for r in records), default=0)
    return f"{attacked(case, f'{steps} steps of ')}; {rounds} rounds; load average {load:.1f} at the start."


def limits_beside(results: Results[Record]) -> list[Kernels]:
    """What ``bench kernels`` has measured with the same settings."""
    path = results.path.with_name("kernels.json")
    found = Results.read(path, Kernels) if path.exists() else None
    return found.records if found and found.settings == replace(results.settings, steps=1) else []


# --- The benchmarks ---------------------------------------------------------------------------------------------------


class StepBenchmark(Benchmark):
    """``bench step``."""

    name: ClassVar[str] = "step"
    help: ClassVar[str] = "the main comparison: time, memory and correctness of every candidate on every case"
    record = Record
    legend: ClassVar[str] = LEGEND
    takes_steps = True
    label: ClassVar[str] = "times as fast as the best alternative (right of 1: faster), quartiles of the rounds"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser)
        self.add_timing(parser)
        parser.add_argument(
            "--limit", action="store_true", help="run bench kernels for the same cases first (default: off)"
        )

    def add_timing(self, parser: argparse.ArgumentParser, *, candidates: bool = True) -> None:
        """Add the options about how to measure."""
        if candidates:
            text = "as listed by bench --help (default: all that fit)"
            parser.add_argument("--candidates", nargs="+", metavar="NAME", help=text)
        parser.add_argument("--steps", default=10, help="steps of an attack (default: 10)", **WHOLE)
        add_budget(parser, 120)
        text = "seconds that a candidate has to compile and to be checked (default: no limit)"
        parser.add_argument("--patience", help=text, **WHOLE)
        text = "compile beside others with this file, and time alone; compile times are left out (default: off)"
        parser.add_argument("--lock", type=Path, metavar="FILE", help=text)
        text = "leave out the check with x_adv = x, for which everything is compiled once more (default: off)"
        parser.add_argument("--distinct", action="store_true", help=text)
        add_settings(parser)

    def cases(self, arguments: argparse.Namespace) -> list[Case]:
        """What to measure on."""
        return chosen_cases(arguments)

    def baselines(self, arguments: argparse.Namespace, settings: Settings) -> list[Baseline]:
        """What to measure."""
        return choose(arguments.candidates, settings.device)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        cases, baselines = self.cases(arguments), self.baselines(arguments, settings)
        budget = Budget(arguments.rounds, arguments.seconds, arguments.patience, arguments.lock)
        own = Plan(
            self,
            lambda results: measure(results, cases, baselines, budget, same=not arguments.distinct),
            packages_of(cases),
            any(baseline.compiles for baseline in baselines),
        )
        before = KernelsBenchmark().plans(arguments, settings) if getattr(arguments, "limit", False) else []
        return [*before, own]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        limits = limits_beside(results)
        body = [_summary(results, limits)]
        for case in results.cases:
            one = Comparison(results.records, case)
            body += [f"## {case}", about(one, find_case(case), results.settings.steps), *failures(one.failed)]
            body += [columns_of(one, _times(one, limit(limits, case))), columns_of(one, FIGURES)]
        return body

    def ratio(self, one: Comparison, candidate: str) -> Ratio | None:
        """What the bar of a candidate shows."""
        return one.ratio(candidate, one.best_alternative)

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        panels = {}
        for case in results.cases:
            one = Comparison(results.records, case)
            known = {name: ratio for name in one.measured if (ratio := self.ratio(one, name))}
            panels[case] = [
                Bar(name, ratio.median, ratio.low, ratio.high, OURS if name.startswith(GRADPRUNE) else OTHERS)
                for name, ratio in known.items()
            ]
        return draw_bars(panels, self.label, ratios=self.name != "overhead")


class OverheadBenchmark(StepBenchmark):
    """``bench overhead``."""

    name = "overhead"
    help = "the same as step on a network so small that only the overhead of a call is left"
    label = "microseconds per step, quartiles of the rounds"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        self.add_timing(parser)

    def cases(self, arguments: argparse.Namespace) -> list[Case]:
        """What to measure on."""
        return [TINY]

    def ratio(self, one: Comparison, candidate: str) -> Ratio | None:
        """What the bar of a candidate shows."""
        seconds = one.measured[candidate].seconds
        return Ratio.paired([second * 1e6 for second in seconds], [1.0] * len(seconds))


def measure(
    results: Results[Record], cases: Sequence[Case], baselines: Sequence[Baseline], budget: Budget, *, same: bool
) -> None:
    """Measure what ``results`` lack, and save after every case; ``same`` as in ``measure_workload``."""
    for case in cases:
        wanted = for_case(baselines, case)
        if not results.missing(case.name, [baseline.name for baseline in wanted]):
            already(case.name, results)
            continue
        # Only candidates that ran in turn can be compared: what the case has is measured again with what it lacks.
        names = {baseline.name for baseline in wanted}
        others = [one for one in BASELINES if one.name not in names and not results.missing(case.name, [one.name])]
        records = measure_case(case, [*wanted, *others], results.settings, budget, same=same)
        results.add(records, instead_of=case.name)
