"""How long it takes until a model is judged: AutoAttack, PGD and APGD, the first time and again, and what they say."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.attacks import APGD, PGD, Attack, AutoAttack, Runtime

from .attack_candidates import (
    TORCHATTACKS_COMPILED,
    TORCHATTACKS_FROZEN,
    UNCOMPILED,
    Method,
    Theirs,
    our_contender,
    their_contender,
    torchattacks_version,
    with_ten_classes,
)
from .attacks import Attacked, Contest, check_examples, half_fooled, run_in_turn
from .baselines import GRADPRUNE, Baseline
from .benchmark import WHOLE, Benchmark, Plan, add_budget, add_cases, add_settings, already, chosen_cases, packages_of
from .cases import SEED, Case, Workload
from .harness import Budget
from .report import OTHERS, OURS, SECOND, Bar, circumstances, draw_bars, figure, grid, ratio_text, share
from .store import Results, Settings

PART = "verdict"
AUTO = "gradprune, auto"

DEFAULT = tuple(
    f"{network}-b{batch}"
    for network, batches in (
        ("mnist-cnn", (16, 64)),
        ("resnet8-32", (16, 64)),
        ("resnet18-112", (4, 8)),
        ("mobilenetv2-112", (4, 8)),
    )
    for batch in batches
)

ATTACKS = ("autoattack", "pgd-50", "apgd")
PGD_STEPS = 50


@dataclass(frozen=True)
class Judged(Attacked):
    """What was measured of an attack that judges a model.

    Attributes:
        other_verdicts: Samples that are fooled and were not by the same library, not compiled, or the other way round.
        missed: Samples that Torchattacks, not compiled, has fooled and this has not.
        work: Steps, queries and targets.
    """

    missed: int | None = None
    work: str = ""


@dataclass(frozen=True)
class Length:
    """How much an ensemble does: ``AutoAttack`` is standard with these.

    Attributes:
        steps: Of APGD and FAB.
        queries: Of Square.
        targets: Of targeted APGD and FAB-T.
    """

    steps: int = 100
    queries: int = 5000
    targets: int = 9

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.queries} queries, {self.targets} targets"


def methods(length: Length) -> dict[str, Method]:
    """The attacks of ``ATTACKS`` in both libraries."""

    def ball(case: Case) -> dict[str, Any]:
        return {"eps": case.eps, "bounds": case.bounds, "seed": SEED}

    def ensemble(case: Case) -> Attack:
        return AutoAttack(steps=length.steps, queries=length.queries, targets=length.targets, **ball(case))

    def their_ensemble(library: Any, model: nn.Module, case: Case) -> Theirs:
        # Its own AutoAttack takes ten steps, where the published one takes a hundred.
        common = {"eps": case.eps, "seed": SEED}
        steps, classes = length.steps, length.targets + 1
        attack: Theirs = library.MultiAttack(
            [
                library.APGD(model, loss="ce", steps=steps, **common),
                library.APGDT(model, steps=steps, n_classes=classes, **common),
                library.FAB(model, steps=steps, multi_targeted=True, n_classes=classes, **common),
                library.Square(model, n_queries=length.queries, **common),
            ]
        )
        return attack

    def pgd(case: Case) -> Attack:
        return PGD(steps=PGD_STEPS, step_size=case.step_size, random_start=False, stop_at_success=True, **ball(case))

    def their_pgd(library: Any, model: nn.Module, case: Case) -> Theirs:
        attack: Theirs = library.PGD(model, random_start=False, steps=PGD_STEPS, alpha=case.step_size, eps=case.eps)
        return attack

    def their_apgd(library: Any, model: nn.Module, case: Case) -> Theirs:
        attack: Theirs = library.APGD(model, loss="ce", steps=length.steps, eps=case.eps, seed=SEED)
        return attack

    made = (
        Method("autoattack", ensemble, their_ensemble, deterministic=False),
        Method("pgd-50", pgd, their_pgd),
        Method("apgd", lambda case: APGD(steps=length.steps, **ball(case)), their_apgd, deterministic=False),
    )
    return {method.key: method for method in made}


def ways(method: Method) -> list[Baseline]:
    """The ways to run one attack, in the order of the tables."""
    theirs = {
        name: Baseline("", name, partial(their_contender, name, method, True, compiled), compiles=compiled)
        for name, compiled in ((TORCHATTACKS_FROZEN, False), (TORCHATTACKS_COMPILED, True))
    }
    ours = {
        name: Baseline("", name, partial(our_contender, name, method.ours, runtime), compiles=bool(runtime.compile))
        for name, runtime in (
            (UNCOMPILED, Runtime(compile=False)),
            (GRADPRUNE, Runtime()),
            (AUTO, Runtime(compile="auto")),
        )
    }
    return [*theirs.values(), *ours.values()]


SAME_LIBRARY = {TORCHATTACKS_COMPILED: TORCHATTACKS_FROZEN, GRADPRUNE: UNCOMPILED, AUTO: UNCOMPILED}
"""Whose verdicts those of a way should be."""


def measure_verdict(
    method: Method,
    length: Length,
    work: Workload,
    settings: Settings,
    budget: Budget,
    made: Sequence[Baseline] | None = None,
) -> list[Judged]:
    """Run one attack in all ways.

    Args:
        method: The attack.
        length: What it was made with.
        work: What is attacked.
        settings: Of the run.
        budget: How long to time.
        made: In place of ``ways(method)``.

    Returns:
        A record for each way, in their order.
    """
    eps = work.case.eps
    blank = Judged(PART, work.case.name, method.key, "", eps=eps, norm="linf", work=str(length))
    trials = run_in_turn(blank, made or ways(method), work, settings, budget, partial(check_examples, work, eps))
    fooled = {trial.record.candidate: _fooled(work, trial.found) for trial in trials if trial.found is not None}
    records = []
    for trial in trials:
        record, own = trial.record, fooled.get(trial.record.candidate)
        assert isinstance(record, Judged)
        if own is not None:
            first, same = fooled.get(TORCHATTACKS_FROZEN), fooled.get(SAME_LIBRARY.get(record.candidate, ""))
            record = replace(
                record,
                missed=None if first is None else int((first & ~own).sum()),
                other_verdicts=None if same is None else int((same != own).sum()),
            )
        records.append(record)
    return records


def _fooled(work: Workload, found: Tensor) -> Tensor:
    with torch.no_grad():
        predictions: Tensor = work.model(found).argmax(1)
    return predictions != work.y


def prepared(case: Case, settings: Settings) -> Workload:
    """The network with ten classes at most, and the smallest ball in which a short PGD fools half of the samples."""
    return half_fooled(with_ten_classes(case.prepare(settings.device, channels_last=settings.channels_last)))


def even_after(contest: Contest, record: Attacked, samples: int) -> float | None:
    """From how many samples on a way takes less time than the fastest of Torchattacks, its compilation included."""
    rivals = [contest.measured[one] for one in (TORCHATTACKS_FROZEN, TORCHATTACKS_COMPILED) if one in contest.measured]
    is_ours = record.candidate in (GRADPRUNE, AUTO) and record.candidate in contest.measured
    if not is_ours or record.compile_seconds is None or not rivals:
        return None
    needed = []
    for rival in rivals:
        saved = (rival.median - record.median) / samples
        more = max(record.compile_seconds - (rival.compile_seconds or 0.0), 0.0)
        needed.append(more / saved if saved > 0 else math.inf)
    return max(needed)


# --- Tables and plot --------------------------------------------------------------------------------------------------


Cell = Callable[[Contest, Judged], str]


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _even(contest: Contest, record: Judged) -> str:
    samples = even_after(contest, record, int(record.case.rpartition("-b")[2]))
    return "-" if samples is None else "never" if math.isinf(samples) else f"{samples:,.0f}"


COLUMNS: dict[str, Cell] = {
    "attack": lambda contest, record: f"{record.attack}, {record.candidate}",
    "s": lambda contest, record: figure(record.median) if record.seconds else "-",
    "IQR": lambda contest, record: figure(record.iqr) if record.seconds else "-",
    "first s": lambda contest, record: figure(record.cold_seconds),
    **{
        f"vs {rival}": lambda contest, record, rival=rival: ratio_text(contest.ratio(record.candidate, rival))  # type: ignore[misc]
        for rival in (TORCHATTACKS_FROZEN, TORCHATTACKS_COMPILED, UNCOMPILED)
    },
    "even after": _even,
    "compilations": lambda contest, record: _count(record.compilations),
    "robust": lambda contest, record: share(None if record.success_rate is None else 1 - record.success_rate),
    "other verdicts": lambda contest, record: _count(record.other_verdicts),
    "missed": lambda contest, record: _count(record.missed),
}


class VerdictBenchmark(Benchmark):
    """``bench verdict``."""

    name = "verdict"
    help = "AutoAttack, PGD-50 and APGD until their verdicts, the first time and again, beside Torchattacks"
    record = Judged
    legend = """\
- s: median over the rounds of the whole attack, warm; IQR: its interquartile range. first s: the first attack of the
  ways that compile, with empty disk caches and a compiler that is already started. vs: how many times as fast as that
  way, median of the ratios within each round; below 1 is slower.
- Torchattacks stands for the published code of AutoAttack, which is not on PyPI; its parts take the steps of the
  standard ensemble, which are not its own defaults. frozen: parameters require no gradient; compile(model): of that.
  gradprune: Runtime(); not compiled: Runtime(compile=False); auto: Runtime(compile="auto"). Samples leave in all where
  the attack is over for them; PGD of Torchattacks has no such thing.
- even after: from how many samples in batches of this size on a way takes less time than the fastest of Torchattacks,
  compilations included.
- robust: samples that the network still takes for what it took them for. other verdicts: samples of another verdict
  than by the same library, not compiled. missed: samples that Torchattacks, not compiled, has fooled and this has not;
  AutoAttack and APGD draw random numbers, which are others in each library, and PGD of Torchattacks returns where it
  ends, be that fooled or not.
- eps: the smallest ball in which PGD of 20 steps fools half of the samples. Networks with more than ten classes are
  attacked as classifiers of their first ten."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        usual = Length()
        add_cases(parser, DEFAULT)
        parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS, help="which (default: all three)")
        for name, default in vars(usual).items():
            parser.add_argument(f"--{name}", default=default, help=f"of AutoAttack (default: {default})", **WHOLE)
        add_budget(parser, 120, "attack")
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        cases = chosen_cases(arguments, DEFAULT)
        length = Length(arguments.steps, arguments.queries, arguments.targets)
        budget, known = Budget(arguments.rounds, arguments.seconds), methods(length)

        def measure(results: Results[Judged]) -> None:
            done = {(one.case, one.attack) for one in results.records}
            for case in cases:
                prepare = cache(partial(prepared, case, settings))
                for attack in arguments.attacks:
                    if (case.name, attack) in done:
                        already(f"{case.name}, {attack}", results)
                    else:
                        results.add(measure_verdict(known[attack], length, prepare(), settings, budget))

        environment = {"torchattacks": torchattacks_version(), "autoattack": str(length)}
        return [Plan(self, measure, packages_of(cases), environment=environment)]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        body = []
        for case in results.cases:
            contests = Contest.all(results.records, PART, case)
            entries = [(one, record) for one in contests for record in one.records if isinstance(record, Judged)]
            records = [record for _, record in entries]
            radius = f"eps {figure(records[0].eps)}; " if records[0].eps else ""
            failed = {f"**{one.candidate} failed:** {one.failed} ({one.attack})" for one in records if one.failed}
            rows = ([cell(contest, record) for cell in COLUMNS.values()] for contest, record in entries)
            body += [f"## {case}", radius + circumstances(records), *sorted(failed), grid([*COLUMNS], rows)]
        return body

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        colors = {TORCHATTACKS_FROZEN: OURS, TORCHATTACKS_COMPILED: OTHERS, UNCOMPILED: SECOND}
        panels: dict[str, list[Bar]] = {}
        for contest in Contest.all(results.records, PART):
            known = [(contest.ratio(GRADPRUNE, rival), color) for rival, color in colors.items()]
            for i, (ratio, color) in enumerate((ratio, color) for ratio, color in known if ratio):
                bar = Bar("" if i else contest.attack, ratio.median, ratio.low, ratio.high, color)
                panels.setdefault(contest.case, []).append(bar)
        label = (
            "times as fast (right of 1: faster), warm, quartiles of the rounds: as Torchattacks, frozen (red), "
            "as it frozen + compile(model) (blue),\nas gradprune without compilation (grey)"
        )
        return draw_bars(panels, label, ratios=True)
