"""Everything that is measured on one case: correctness first, then time, memory, and what the attack achieved."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gradprune.support.environment import environment
from gradprune.support.progress import counter, stage
from gradprune.torch_compat.inductor import fresh_cache

from . import timing as figures
from .attack_step import Step, attack, move, pgd_step
from .baselines import DTYPES, Baseline, Contender
from .cases import Case, Workload
from .demo_candidates import start_compiler
from .record import ALTERNATIVES, BASELINES, EAGER_BACKWARD, Record, Settings

MIN_ROUNDS = 3
POINT_SEEDS = (1, 2)

GRADIENT_TOLERANCE = 0.05
"""Allowed error in the Euclidean norm, for one ReLU that rounds to the other side can cost a percent; or four times the
error of eager, where that is larger; but never more than half of the distance between the points' own gradients."""

UPDATE_TOLERANCE = 1e-3
"""Allowed share of values that are not where the candidate's own gradient should have moved them."""


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        rounds: Attacks timed per candidate, at most.
        seconds: Seconds of timing per case after which no further round begins; three rounds are run in any case.
    """

    rounds: int = 9
    seconds: float = 120.0


class CheckFailed(Exception):
    """A candidate does not compute the step it should."""


@contextlib.contextmanager
def configured(settings: Settings) -> Iterator[dict[str, Any]]:
    """Let torch run as ``settings`` say, and yield the environment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every profile writes two lines to standard error
    here = environment()
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        here.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    try:
        yield here
    finally:
        torch.set_num_threads(threads)


def synchronize(device: str | torch.device) -> None:
    """Wait until a GPU has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def load_average() -> float | None:
    """Load average of the machine over a minute, where the system tells it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class Reference:
    """What candidates have to agree with.

    Attributes:
        work: The case.
        points: Pairs of an ``x_adv`` and the float64 gradient there. Two are drawn like the clean inputs, where the
            gradient is another one altogether; the last ``x_adv`` is the tensor of clean inputs itself.
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
    def of(work: Workload, settings: Settings) -> Reference:
        """Compute it with eager autograd."""
        case, x, y = work.case, work.x, work.y
        exact = pgd_step(copy.deepcopy(work.model).double().requires_grad_(False), case)
        eager = pgd_step(copy.deepcopy(work.model).requires_grad_(False), case, DTYPES[settings.autocast])
        drawn = [torch.empty_like(x).copy_(case.inputs(seed)) for seed in POINT_SEEDS]
        points = [(x_adv, exact(x_adv.double(), x.double(), y)[1]) for x_adv in (*drawn, x)]
        errors = [figures.relative_errors(eager(x_adv, x, y)[1], gradient) for x_adv, gradient in points]
        worst = max(error for error, _ in errors), max(error for _, error in errors)
        _, apart = figures.relative_errors(points[0][1], points[1][1])
        tolerance = min(max(GRADIENT_TOLERANCE, 4 * worst[1]), apart / 2)
        return Reference(work, points, worst, tolerance, attack(eager, x, y, settings.steps))

    def check(self, step: Step) -> tuple[float, float]:
        """Compare a step with float64, at two points and called with one tensor as both ``x_adv`` and ``x``.

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
            errors = figures.relative_errors(gradient, exact)
            if not errors[1] <= self.tolerance:
                raise CheckFailed(f"gradient off by {errors[1]:.1%} {where}, allowed are {self.tolerance:.1%}")
            if not (off := figures.differing_share(moved, move(case, x_adv, x, gradient))) <= UPDATE_TOLERANCE:
                raise CheckFailed(f"{off:.1%} of the values of the next x_adv are wrong {where}")
            largest, euclidean = max(largest, errors[0]), max(euclidean, errors[1])
        return largest, euclidean


def measure_case(case: Case, baselines: Sequence[Baseline], settings: Settings, budget: Budget) -> list[Record]:
    """Check all candidates of one case, then time those that passed in turn.

    Returns:
        A record for each candidate, in their order.
    """

    # Candidates of all cases share the code that Dynamo keys its memory of shapes by.
    torch.compiler.reset()
    load = load_average()
    with stage(f"{case.name}: building, float64 gradients"):
        work = case.prepare(settings.device, channels_last=settings.channels_last)
        reference = Reference.of(work, settings)
    records: dict[str, Record] = {}
    passed: list[Contender] = []
    counted: dict[str, int] = {}
    if any(baseline.compiles for baseline in baselines):
        start_compiler()
    for baseline in baselines:
        record = Record(case.name, baseline.name, load=load)
        # Empty disk caches: a compile time that depended on earlier runs, or on other candidates, would be none.
        empty = fresh_cache() if baseline.compiles else contextlib.nullcontext()
        with stage(f"{case.name}: checking {baseline.name}"), empty:
            try:
                contender, figured, report = _enter(baseline, reference, settings)
            except Exception as error:  # whatever a compiler may raise: the others are measured all the same
                records[baseline.name] = replace(record, failed=reason(error))
                print(f"{baseline.name} failed: {reason(error)}", file=sys.stderr, flush=True)
                continue
        passed.append(contender)
        records[baseline.name] = replace(record, **figured)
        counted = counted or report.get("flops", {}).get("before", {})
    with counter(f"{case.name}: timing", budget.rounds * len(passed)) as bar:
        seconds = time_rounds(passed, work, settings.steps, budget, bar.update)
    for contender in passed:
        with stage(f"{case.name}: memory and success of {contender.name}"):
            figured = {"seconds": seconds[contender.name], **_finish(contender, reference, settings)}
        if counted and contender.name in {*BASELINES, *ALTERNATIVES}:
            # All but one leave the weight gradients out. One way of counting for all, so that the figures compare.
            spared = counted["weight_grad"] if contender.name != EAGER_BACKWARD else 0
            figured["flops"] = sum(counted.values()) - spared
        records[contender.name] = replace(records[contender.name], **figured)
    return list(records.values())


def time_rounds(
    contenders: Sequence[Contender], work: Workload, steps: int, budget: Budget, finished: Callable[[], object]
) -> dict[str, list[float]]:
    """Run the attacks of all contenders in turn, round after round, so that a slow minute hits all alike.

    Args:
        contenders: Already warm.
        work: What they attack.
        steps: Steps of an attack.
        budget: When to stop.
        finished: Called after every attack.

    Returns:
        By name, for every round, the seconds of the attack divided by its steps, so that what a contender does once per
        attack is part of the figure.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    began = time.perf_counter()
    for turn in range(budget.rounds):
        if turn >= MIN_ROUNDS and (time.perf_counter() - began) * (turn + 1) / turn > budget.seconds:
            break
        # The start rotates: nobody always runs in the cache and the heat that the same other one left.
        first = turn % max(1, len(contenders))
        for contender in [*contenders[first:], *contenders[:first]]:
            contender.clear_gradients()
            with contender.context():
                synchronize(work.x.device)
                started = time.perf_counter()
                attack(contender.step, work.x, work.y, steps)
                synchronize(work.x.device)
                seconds[contender.name].append((time.perf_counter() - started) / steps)
            finished()
    return seconds


def peak_bytes(step: Step, x: Tensor, y: Tensor) -> int:
    """Most bytes that a step in the middle of an attack holds allocated at once beyond what was allocated before it."""
    x_adv, gradient = step(x.clone(), x, y)
    del gradient
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(x_adv, x, y)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step(x_adv, x, y)
    recorded: Any = profiler.profiler
    held = peak = 0
    events = (event for event in recorded.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result  # kept until here so that its release is not among the events
    return peak


def _enter(
    baseline: Baseline, reference: Reference, settings: Settings
) -> tuple[Contender, dict[str, Any], dict[str, Any]]:
    """Build, compile, check and warm one contender; with what is known of it then, and gradprune's report."""
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
    if len(reports) != 1:  # more than one is a graph break, and their sum would not be the figure of a step
        return contender, figured, {}
    figured["flops"] = sum(reports[0]["flops"]["after"].values())
    figured["saved_bytes"] = reports[0]["saved_bytes"]["after"]
    return contender, figured, reports[0]


def _finish(contender: Contender, reference: Reference, settings: Settings) -> dict[str, Any]:
    """What must not be measured between two rounds: what the attack achieves, and memory."""
    work, step = reference.work, contender.step
    x, y = work.x, work.y
    with contender.context():
        adversarial = attack(step, x, y, settings.steps)
        figured: dict[str, Any] = {
            "success_rate": 1 - figures.accuracy(work.model, adversarial, y),
            "eager_success_rate": 1 - figures.accuracy(work.model, reference.adversarial, y),
            "differing": figures.differing_share(adversarial, reference.adversarial),
        }
        if not contender.foreign:
            figured["peak_bytes"] = peak_bytes(step, x, y)
        if contender.autograd:
            figured["saved_bytes"] = figures.saved_bytes(step, contender.model, x.clone(), x, y)
    return figured


def reason(error: Exception) -> str:
    """One line about why a candidate cannot be measured."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return first if isinstance(error, CheckFailed) else f"{type(error).__name__}: {first}"
