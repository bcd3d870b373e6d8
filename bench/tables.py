"""[SB] Tables 1 to 4 and Figure 2, and what libraries recommend today: each as shipped and in four other ways."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from gradprune.torch_compat.inductor import fresh_cache

from .attacks import Contest, half_fooled
from .benchmark import WHOLE, Benchmark, Plan, add_threads, already
from .cases import Workload
from .harness import Budget, start_compiler
from .report import circumstances, figure, grid, ratio_text, share
from .shims import LIBRARIES, versions
from .store import Results, Settings
from .table_attacks import BATCH, ROWS, Row
from .table_figures import draw
from .table_scales import SCALES, Scale, case_of
from .table_text import ATTACKS, measure_texts
from .table_text import PART as TEXTS
from .table_training import PART as EPOCHS
from .table_training import epoch_seconds, measure_epochs
from .table_ways import ACCELERATED, COMPILED, FROZEN, PATCHED, SHIPPED, WAYS, Entry, Models, measure_row, sharing

TITLES = {
    "1": "[SB] Table 1: PGD of six libraries, ResNet-50",
    "2": "[SB] Table 2: PGD of Torchattacks, by batch and by network",
    "3": "[SB] Table 3: attacks at their default settings, ResNet-50",
    TEXTS: "[SB] Table 4: what eight attacks of OpenAttack ask a BERT for",
    EPOCHS: "[SB] Figure 2: an epoch of adversarial training, ResNet-18 on images of 32 pixels",
    "attackbench": "What libraries recommend today, ResNet-50",
}
"""By their names on the command line."""

NOTES = {
    TEXTS: (
        "OpenAttack 2.1.1 cannot be run without downloads that are gone: a driver issues the questions of its attacks, "
        "with their defaults at the paper's scale, to a BERT with random weights, with random words and synonyms. "
        "Nothing fools it, so that every attack asks all it may ask, of one sentence.",
        "As shipped, every question runs a backward pass over all weights, as OpenAttack's get_prob does; frozen, one "
        "to the embeddings. Compiled by either, a question for a probability runs none; FD also asks for gradients.",
        "patch: of a function of the network that makes the victim and runs the attack.",
    ),
    EPOCHS: (
        "Seconds are those of 50,000 images at the pace of the iterations that were measured. The attack is PGD by "
        "loss.backward() from the input itself; the outer step is eager in all ways.",
    ),
}
"""Below some tables."""


def group_of(row: Row, scale: Scale) -> tuple[str, int | None]:
    """What shares compiled code with a row: the same network, and the same batch where code is for one batch."""
    for_any = row.shrinks or (scale.any_batch and row.batch != BATCH)
    return row.network, None if for_any else row.batch


def measure_rows(results: Results[Entry], tables: Sequence[str], scale: Scale, budget: Budget) -> None:
    """Measure the rows of some tables that ``results`` lack, and save after each.

    Rows that share compiled code come one after the other, whatever their tables.
    """
    settings = results.settings
    done = {(one.part, one.attack) for one in results.records}
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in ROWS:
        if row.table in tables and (row.table, row.name) in done:
            already(f"table {row.table}, {row.name}", results)
        elif row.table in tables:
            groups.setdefault(group_of(row, scale), []).append(row)
    for group in groups.values():
        works: dict[tuple[str, bool], Workload] = {}
        with sharing():
            models = Models(_prepared(works, group[0], scale, settings).model)
            for row in group:
                work = _prepared(works, row, scale, settings)
                results.add(measure_row(row, scale.lengths, models, work, settings, budget))


def _prepared(works: dict[tuple[str, bool], Workload], row: Row, scale: Scale, settings: Settings) -> Workload:
    """What a row attacks, which is kept in ``works``."""
    case = case_of(scale, row)
    if (case.name, False) not in works:
        works[case.name, False] = case.prepare(settings.device)
    if row.half_fooled and (case.name, True) not in works:
        works[case.name, True] = half_fooled(works[case.name, False])
    return works[case.name, row.half_fooled]


# --- Tables -----------------------------------------------------------------------------------------------------------


Cell = Callable[[Contest, Entry], str]


def _seconds(entry: Entry, which: str) -> str:
    """Of an attack, or of an epoch."""
    if not entry.seconds:
        return "-"
    value = getattr(entry, which)
    return figure(epoch_seconds(entry, value) if entry.part == EPOCHS else value)


COLUMNS: dict[str, Cell] = {
    "attack": lambda contest, entry: f"{entry.attack}, {entry.candidate}",
    "s": lambda contest, entry: _seconds(entry, "median"),
    "IQR": lambda contest, entry: _seconds(entry, "iqr"),
    "min": lambda contest, entry: _seconds(entry, "best"),
    "first s": lambda contest, entry: figure(entry.cold_seconds),
    **{
        f"vs {rival}": lambda contest, entry, rival=rival: ratio_text(contest.ratio(entry.candidate, rival))  # type: ignore[misc]
        for rival in (SHIPPED, FROZEN, COMPILED)
    },
    "pixels off": lambda contest, entry: share(entry.differing),
    "eager's own": lambda contest, entry: share(entry.rounding),
    "success": lambda contest, entry: share(entry.success_rate),
    "other verdicts": lambda contest, entry: "-" if entry.other_verdicts is None else str(entry.other_verdicts),
    "wgrad FLOPs": lambda contest, entry: "-" if entry.weight_flops is None else f"{entry.weight_flops:,}",
}


def paper_of(table: str, name: str) -> tuple[float, float] | None:
    """Seconds of [SB] on a T4, original and semi-backward."""
    if table == TEXTS:
        return ATTACKS[name][1]
    return next((row.paper for row in ROWS if (row.table, row.name) == (table, name)), None)


def _entries(contest: Contest) -> list[Entry]:
    return [record for record in contest.records if isinstance(record, Entry)]


def measured_tables(results: Results[Entry]) -> dict[str, list[Contest]]:
    """What was measured of each table, in the order of the paper."""
    order = {(row.table, row.name): place for place, row in enumerate(ROWS)}
    found = {
        table: sorted(Contest.all(results.records, table), key=lambda one: order.get((one.part, one.attack), 0))
        for table in TITLES
    }
    return {table: contests for table, contests in found.items() if contests}


def ours(contest: Contest) -> str:
    """The way that gradprune recommends: a patched attack, or an accelerated model where it cannot be patched."""
    return PATCHED if PATCHED in contest.measured else ACCELERATED


def summary(contests: Sequence[Contest]) -> str:
    """How many times as fast as shipped each way is, with the paper's own figure beside it."""
    ways = [way for way in WAYS if way != SHIPPED]
    head = ["times as fast as shipped", "batch", "T4 s [SB]", "T4 [SB]", "predicted", *ways]
    rows, against = [], []
    for contest in contests:
        entries = _entries(contest)
        paper = paper_of(contest.part, contest.attack)
        model = next((one.predicted for one in entries if one.predicted), None)
        frozen = contest.ratio(ours(contest), FROZEN)
        if frozen:
            against.append(frozen.median)
        rows.append(
            [
                contest.attack,
                str(entries[0].samples or "-"),
                f"{paper[0]:g} / {paper[1]:g}" if paper else "-",
                ratio_text(paper[0] / paper[1] if paper else None),
                ratio_text(model),
                *(ratio_text(contest.ratio(way, SHIPPED)) for way in ways),
                ratio_text(frozen),
                ratio_text(contest.ratio(ours(contest), COMPILED)),
            ]
        )
    text = grid([*head, "ours vs frozen", "ours vs compiled"], rows)
    if against:
        mean = statistics.geometric_mean(against)
        text += f"\n\nOn average (geometric mean) ours is {mean:.2f} times as fast as frozen, which is the paper's way."
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
- first s: the first attack. A network is compiled at its first row and shared by the other rows on it, so that only
  there it contains a compilation, which also finds the kernels of networks before. Attacks that go on with a part of
  the batch share code for any batch.
- T4 [SB]: seconds of the original and of the semi-backward attack as the paper has them, and their ratio. predicted: by
  FLOPs alone, what a step takes with both halves of its backward pass by what it takes with the half that reaches the
  input; of training (6K + 6) / (4K + 6); of a question without a backward pass 3. ours: patch, or accelerate where
  there is nothing to patch. compiled: frozen + compile(model).
- pixels off: share of the pixels that are off those of the attack as shipped, from the same seeds, by more than 0.001.
  An attack that goes by signs of gradients turns rounding into whole steps. success: inputs of another class than
  before. other verdicts: samples that one of both fools and the other does not. eager's own: pixels off in the attack
  as shipped itself where torch computes with its other kernels (no oneDNN, no cuDNN).
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
            with fresh_cache():
                start_compiler()
                measure_rows(results, arguments.table, scale, budget)
                if TEXTS in arguments.table:
                    measure_texts(results, scale.text, scale.texts, budget)
                if EPOCHS in arguments.table:
                    measure_epochs(results, scale, budget)

        return [Plan(self, measure, set(scale.packages), environment={"scale": scale.name, **versions()})]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        scale = SCALES.get(results.environment.get("scale", ""))
        body = [f"Sizes: **{scale.name}**, {scale.purpose}."] if scale else []
        for table, contests in measured_tables(results).items():
            entries = [(contest, record) for contest in contests for record in _entries(contest)]
            failed: dict[str, list[str]] = {}
            for _, one in entries:
                if one.failed:
                    failed.setdefault(f"**{one.candidate} failed:** {one.failed}", []).append(one.attack)
            rows = ([cell(contest, entry) for cell in COLUMNS.values()] for contest, entry in entries)
            known = [row for row in ROWS if row.table == table]
            notes = [*NOTES.get(table, ())]
            notes += [f"{row.name}, patch: {row.note}." for row in known if row.note]
            libraries = (LIBRARIES[name] for name in dict.fromkeys(row.library for row in known))
            notes += [f"{library.note}." for library in libraries if library.note]
            body += [
                f"## {TITLES[table]}",
                circumstances([one for _, one in entries]),
                *(f"{text} ({', '.join(names)})" for text, names in failed.items()),
                summary(contests),
                grid([*COLUMNS], rows),
                "\n".join(f"- {note}" for note in notes),
            ]
        return [one for one in body if one]

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        return draw(measured_tables(results), TITLES)
