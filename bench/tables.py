"""[SB] Tables 1 to 4 and Figure 2, and what libraries recommend today: each as shipped and in four other ways."""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import gradprune
from gradprune.torch_compat.aot import functorch_config
from gradprune.torch_compat.inductor import fresh_cache

from . import timing
from .attack_candidates import whole
from .attacks import Attacked, Contest, check_examples, half_fooled, run_in_turn
from .baselines import Baseline, Contender
from .benchmark import WHOLE, Benchmark, Plan, add_threads, already
from .cases import SEED, Case, Workload
from .harness import Budget, start_compiler
from .report import circumstances, figure, grid, ratio_text, share
from .shims import LIBRARIES, versions
from .store import Results, Settings
from .table_attacks import ROWS, Patch, Row
from .table_scales import SCALES, Scale, case_of

SHIPPED = "as shipped"
FROZEN = "frozen"
COMPILED = "frozen + compile(model)"
ACCELERATED = "accelerate"
PATCHED = "patch"

WAYS = (SHIPPED, FROZEN, COMPILED, ACCELERATED, PATCHED)
"""In the order of the tables."""

TITLES = {
    "1": "[SB] Table 1: PGD of six libraries, ResNet-50",
    "2": "[SB] Table 2: PGD of Torchattacks, by batch and by network",
    "3": "[SB] Table 3: attacks at their default settings, ResNet-50",
    "attackbench": "What libraries recommend today, ResNet-50",
}
"""By their names on the command line."""

OFF = 1e-3
"""A pixel differs if it is off by more than this, pixels being from 0 to 1."""


@dataclass(frozen=True)
class Entry(Attacked):
    """What was measured of a row of a table, run in one way.

    Attributes:
        other_verdicts: Samples that are fooled and are not by the attack as shipped, or the other way round.
        differing: Share of the values that are off those of the attack as shipped by more than ``OFF``.
        weight_flops: FLOPs that compiled graphs spend on gradients of weights; ``None`` where gradprune compiled none.
        predicted: How many times as fast as with a full backward pass gradprune's model of costs says it is.
        samples: Inputs in a batch.
    """

    weight_flops: int | None = None
    predicted: float | None = None
    samples: int | None = None

    @property
    def best(self) -> float:
        """The smallest of the seconds."""
        return min(self.seconds)


class Models:
    """One network in the five ways, shared by all attacks on it, so that it is compiled once for each.

    Args:
        work: The network.
    """

    def __init__(self, work: Workload) -> None:
        self._work = work

    def _copy(self, frozen: bool) -> nn.Module:
        return copy.deepcopy(self._work.model).requires_grad_(not frozen)

    @cached_property
    def _shipped(self) -> nn.Module:
        return self._copy(False)

    @cached_property
    def _frozen(self) -> nn.Module:
        return self._copy(True)

    @cached_property
    def _compiled(self) -> tuple[nn.Module, Any]:
        model = self._copy(True)
        return model, compile_model(model)

    @cached_property
    def _accelerated(self) -> tuple[nn.Module, Any]:
        model = self._copy(False)
        return model, gradprune.accelerate(model)

    def of(self, way: str) -> tuple[nn.Module, Any]:
        """The network whose parameters show gradients, and what is attacked."""
        if way == COMPILED:
            return self._compiled
        if way in (ACCELERATED, PATCHED):
            return self._accelerated
        model = self._shipped if way == SHIPPED else self._frozen
        return model, model

    @property
    def reports(self) -> list[Any]:
        """What gradprune says it did."""
        return gradprune.reports(self._accelerated[1]) if "_accelerated" in vars(self) else []


def compile_model(model: nn.Module) -> Any:
    """What the way ``COMPILED`` attacks."""
    return torch.compile(model)


def as_it_is(attack: Any) -> Any:
    """In place of ``gradprune.patch``."""
    return attack


def contender(way: str, row: Row, scale: Scale, models: Models, work: Workload, settings: Settings) -> Contender:
    """An attack in one way; the settings of torch are those of the process."""
    model, attacked = models.of(way)
    patch: Patch = gradprune.patch if way == PATCHED else as_it_is
    attack = row.build(attacked, work, scale.lengths, patch)

    def seeded(x: Tensor, y: Tensor) -> Tensor:
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        return attack(x, y).detach()

    compiled = way not in (SHIPPED, FROZEN)
    return Contender(way, model, whole(seeded), compiled, context=_kept if way == COMPILED else contextlib.nullcontext)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """A compiled backward pass that may run again must not write into what was saved for it."""
    with functorch_config.patch(donated_buffer=False):
        yield


def measure_row(
    row: Row, scale: Scale, models: Models, work: Workload, settings: Settings, budget: Budget
) -> list[Entry]:
    """Run one attack in all ways and compare what comes of them.

    Returns:
        A record for each of ``WAYS``, in their order.
    """
    eps = work.case.eps if row.eps == "case" else row.eps
    blank = Entry(row.table, work.case.name, row.name, "", eps=eps, norm=row.norm, samples=len(work.x))
    made = [
        Baseline("", way, partial(contender, way, row, scale, models), compiles=way not in (SHIPPED, FROZEN))
        for way in WAYS
    ]
    trials = run_in_turn(blank, made, work, settings, budget, partial(check_examples, work, eps), shared=True)
    first = trials[0].found
    records = []
    for trial in trials:
        entry = trial.record
        assert isinstance(entry, Entry)
        if trial.found is not None and first is not None:
            differing = timing.differing_share(trial.found, first, OFF)
            verdicts = int((_fooled(work, trial.found) != _fooled(work, first)).sum())
            entry = replace(entry, differing=differing, other_verdicts=verdicts)
        if entry.candidate in (ACCELERATED, PATCHED) and models.reports:
            flops = sum(report.flops["after"]["weight_grad"] for report in models.reports)
            entry = replace(entry, weight_flops=flops, predicted=_predicted(models.reports))
        records.append(entry)
    return records


def _predicted(reports: Sequence[Any]) -> float | None:
    """The ratio that the first report of a graph with a backward pass predicts."""
    ratios = [
        report.to_dict()["speedup"].get("predicted") for report in reports if report.flops["before"]["input_grad"]
    ]
    return next((ratio for ratio in ratios if ratio), None)


def _fooled(work: Workload, found: Tensor) -> Tensor:
    with torch.no_grad():
        predictions: Tensor = work.model(found).argmax(1)
    return predictions != work.y


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within it nothing is compiled before, and everything is kept until it ends."""
    torch.compiler.reset()
    with fresh_cache():
        start_compiler()
        yield
    torch.compiler.reset()


def measure_rows(results: Results[Entry], tables: Sequence[str], scale: Scale, budget: Budget) -> None:
    """Measure the rows of some tables that ``results`` lack, and save after each.

    Rows on the same network and batch come one after the other, whatever their tables, so that they share what is
    compiled; those that go on with parts of the batch are a group of their own, whose code is for any batch.
    """
    settings = results.settings
    done = {(one.part, one.attack) for one in results.records}
    groups: dict[tuple[str, bool], list[tuple[Row, Case]]] = {}
    for row in ROWS:
        if row.table in tables:
            case = case_of(scale, row)
            groups.setdefault((case.name, row.shrinks), []).append((row, case))
    for group in groups.values():
        missing = []
        for row, _ in group:
            if (row.table, row.name) in done:
                already(f"table {row.table}, {row.name}", results)
            else:
                missing.append(row)
        if not missing:
            continue
        case = group[0][1]
        work = case.prepare(settings.device)
        hard = cache(partial(half_fooled, work))
        with sharing():
            models = Models(work)
            for row in missing:
                results.add(measure_row(row, scale, models, hard() if row.half_fooled else work, settings, budget))


# --- Tables -----------------------------------------------------------------------------------------------------------


Cell = Callable[[Contest, Entry], str]

COLUMNS: dict[str, Cell] = {
    "attack": lambda contest, entry: f"{entry.attack}, {entry.candidate}",
    "s": lambda contest, entry: figure(entry.median) if entry.seconds else "-",
    "IQR": lambda contest, entry: figure(entry.iqr) if entry.seconds else "-",
    "min": lambda contest, entry: figure(entry.best) if entry.seconds else "-",
    "first s": lambda contest, entry: figure(entry.cold_seconds),
    **{
        f"vs {rival}": lambda contest, entry, rival=rival: ratio_text(contest.ratio(entry.candidate, rival))  # type: ignore[misc]
        for rival in (SHIPPED, FROZEN, COMPILED)
    },
    "pixels off": lambda contest, entry: share(entry.differing),
    "success": lambda contest, entry: share(entry.success_rate),
    "other verdicts": lambda contest, entry: "-" if entry.other_verdicts is None else str(entry.other_verdicts),
    "wgrad FLOPs": lambda contest, entry: "-" if entry.weight_flops is None else f"{entry.weight_flops:,}",
}


def paper_of(table: str, name: str) -> tuple[float, float] | None:
    """Seconds of [SB] on a T4, original and semi-backward."""
    return next((row.paper for row in ROWS if (row.table, row.name) == (table, name)), None)


def _entries(contest: Contest) -> list[Entry]:
    return [record for record in contest.records if isinstance(record, Entry)]


def summary(contests: Sequence[Contest]) -> str:
    """How many times as fast as shipped each way is, with the paper's own figure beside it."""
    ways = [way for way in WAYS if way != SHIPPED]
    head = [
        "times as fast as shipped",
        "batch",
        "T4 s [SB]",
        "T4 [SB]",
        *ways,
        "patch vs frozen",
        "patch vs compiled",
        "predicted",
    ]
    rows, against = [], []
    for contest in contests:
        first = _entries(contest)[0]
        paper = paper_of(contest.part, contest.attack)
        predicted = next((one.predicted for one in _entries(contest) if one.predicted), None)
        frozen = contest.ratio(PATCHED, FROZEN)
        if frozen:
            against.append(frozen.median)
        rows.append(
            [
                contest.attack,
                str(first.samples or "-"),
                f"{paper[0]:g} / {paper[1]:g}" if paper else "-",
                ratio_text(paper[0] / paper[1] if paper else None),
                *(ratio_text(contest.ratio(way, SHIPPED)) for way in ways),
                ratio_text(frozen),
                ratio_text(contest.ratio(PATCHED, COMPILED)),
                ratio_text(predicted),
            ]
        )
    text = grid(head, rows)
    if against:
        mean = statistics.geometric_mean(against)
        text += (
            f"\n\nOn average (geometric mean) patch is {mean:.2f} times as fast as frozen, which is the paper's way."
        )
    return text


class TablesBenchmark(Benchmark):
    """``bench tables``."""

    name = "tables"
    help = "[SB] Tables 1 to 4 and Figure 2, each row as shipped, frozen, frozen and compiled, accelerated, patched"
    record = Entry
    legend = """\
- as shipped: the library on a model whose parameters require gradients. frozen: they require none, which is the way of
  [SB]. frozen + compile(model): torch.compile of that. accelerate: gradprune.accelerate(model). patch: gradprune.patch
  of the attack.
- s: median over the rounds of the whole attack, warm; IQR: its interquartile range; min: the fastest round. vs: how
  many times as fast as that way, median of the ratios within each round; below 1 is slower. All ways run in turn.
- first s: the first attack. A network is compiled at its first row and shared by the other rows on the same network and
  batch, so that only there it contains a compilation.
- T4 [SB]: seconds of the original and of the semi-backward attack as the paper has them, and their ratio. predicted:
  what gradprune's model of FLOPs and memory traffic says of a step against one with a full backward pass, unmeasured.
- pixels off: share of the pixels that are off those of the attack as shipped, from the same seeds, by more than 0.001.
  An attack that goes by signs of gradients turns rounding into whole steps. success: inputs of another class than
  before. other verdicts: samples that one of both fools and the other does not.
- wgrad FLOPs: spent on gradients of weights by what gradprune compiled."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add = parser.add_argument
        add("--scale", choices=tuple(SCALES), default="small", help="sizes: " + "; ".join(map(str, SCALES.values())))
        add("--table", nargs="+", choices=tuple(TITLES), default=tuple(TITLES), help="which (default: all)")
        add("--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one)")
        add("--rounds", default=3, help="measurements of each (default: 3)", **WHOLE)
        add_threads(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        scale, budget = SCALES[arguments.scale], Budget(arguments.rounds, float("inf"))

        def measure(results: Results[Entry]) -> None:
            measure_rows(results, arguments.table, scale, budget)

        return [Plan(self, measure, set(scale.packages), environment={"scale": scale.name, **versions()})]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        body = []
        for table, title in TITLES.items():
            contests = Contest.all(results.records, table)
            if not contests:
                continue
            entries = [(contest, record) for contest in contests for record in _entries(contest)]
            failed = {f"**{one.attack}, {one.candidate} failed:** {one.failed}" for _, one in entries if one.failed}
            rows = ([cell(contest, entry) for cell in COLUMNS.values()] for contest, entry in entries)
            known = [row for row in ROWS if row.table == table]
            notes = [f"{row.name}, patch: {row.note}." for row in known if row.note]
            notes += [f"{LIBRARIES[name].note}." for name in {row.library: 0 for row in known} if LIBRARIES[name].note]
            body += [
                f"## {title}",
                circumstances([one for _, one in entries]),
                *sorted(failed),
                summary(contests),
                grid([*COLUMNS], rows),
                "\n".join(f"- {note}" for note in notes),
            ]
        return [one for one in body if one]

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        from .table_figures import draw

        return draw(results, TITLES)
