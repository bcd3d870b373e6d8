"""One PNG for each results file: bars with their spread, or lines over the batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradprune.support.figures import figure_of, save_figure

from .cases import find_case
from .record import (
    ACTIVE_SET,
    EAGER_BACKWARD,
    EAGER_TRAINING,
    FROZEN,
    FULL_BATCH,
    GRADPRUNE,
    NOTHING_DROPPED,
    TORCHATTACKS,
    TORCHATTACKS_COMPILED,
    UNCOMPILED,
    Comparison,
    Contest,
    Iteration,
    ObjectiveRecord,
    Ratio,
    Record,
    Results,
)
from .tables import kernel_classes, rates

OURS, OTHERS, SECOND = "#c1272d", "#7f9fbf", "#d0d7de"
COLORS = "#4d4d4d", "#7f9fbf", "#2a7f62", "#c98b2b"
"""Of lines that are not ours, in their order."""
COMPARED = ("step", "ablation", "attacks")
LABELS = {
    "step": "times as fast as the best alternative (right of 1: faster), quartiles of the rounds",
    "ablation": "time per step without it / with all (right of 1: it helps), quartiles of the rounds",
    "overhead": "microseconds per step, quartiles of the rounds",
    "compile": "seconds until the first step has run: cold (dark) and warm (light)",
    "kernels": "GFLOP/s: best kernel (dark) and plain kernel (light)",
    "attacks": "times as fast (right of 1: faster), quartiles of the rounds: whole attacks as Torchattacks (red), "
    "as it frozen + compile(model) (blue),\nas gradprune without compilation (grey); digits: as without the active set "
    "(red), as with nothing dropped (blue)",
}

AGAINST = {
    "attacks": (GRADPRUNE, {TORCHATTACKS: OURS, TORCHATTACKS_COMPILED: OTHERS, UNCOMPILED: SECOND}),
    "active-set": (ACTIVE_SET, {FULL_BATCH: OURS, NOTHING_DROPPED: OTHERS}),
}
"""By part of ``bench attacks``: whose speed is shown, and relative to whom in which colour."""


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, its length, and the ends of its spread."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: str = OTHERS


def save(path: Path, results: Results) -> None:
    """Draw a results file.

    Args:
        path: The PNG file.
        results: What to draw.
    """
    if results.kind == "scaling":
        figure = _lines(results)
    elif results.kind == "training":
        figure = _by_steps(results)
    elif results.kind == "objectives":
        figure = _by_epochs(results)
    else:
        panels = {case: _bars_of(results, case) for case in results.cases}
        figure = _bars({case: bars for case, bars in panels.items() if bars}, results.kind)
    where = results.environment.get("gpu", results.environment["cpu"])
    figure.suptitle(f"bench {results.kind}: {where}, {results.settings}", fontsize=11)
    save_figure(figure, path)


def _bars_of(results: Results, case: str) -> list[Bar]:
    """The bars of one case, from top to bottom."""
    one = Comparison(results.records, case)
    bars = []
    if results.kind == "attacks":
        for part, (candidate, rivals) in AGAINST.items():
            for contest in Contest.all(results.records, part, case):
                ratios = [(contest.ratio(candidate, rival), color) for rival, color in rivals.items()]
                known = [(ratio, color) for ratio, color in ratios if ratio]
                work = f", {contest.work:.1f}x the inputs" if contest.work and abs(contest.work - 1) > 0.1 else ""
                for i, (against, color) in enumerate(known):
                    label = "" if i else contest.attack + work
                    bars.append(Bar(label, against.median, against.low, against.high, color))
    elif results.kind == "kernels":
        for (kind, direction), layers in kernel_classes(results.records, case).items():
            plain, best = rates(layers)
            bars += [Bar(f"{kind}, {direction}", best / 1e9), Bar("", plain / 1e9, color=SECOND)]
    elif results.kind == "compile":
        for record in results.records:
            if isinstance(record, Record) and record.case == case and not record.failed:
                bars.append(Bar(record.candidate, record.cold_seconds or 0))
                bars.append(Bar("", record.warm_seconds or 0.0, color=SECOND))
    for name, record in one.measured.items():
        if results.kind == "overhead":
            ratio: Ratio | None = Ratio.paired([second * 1e6 for second in record.seconds], [1.0] * len(record.seconds))
        else:
            pair = (GRADPRUNE, name) if results.kind == "ablation" else (name, one.best_alternative)
            ratio = one.ratio(*pair)
        if ratio is not None:
            ours = name.startswith(GRADPRUNE)
            bars.append(Bar(name, ratio.median, ratio.low, ratio.high, OURS if ours else OTHERS))
    return bars


def _bars(panels: dict[str, list[Bar]], kind: str) -> Any:
    """A panel of horizontal bars for each case, two panels in a row."""
    columns = 1 if len(panels) < 2 else 2
    rows = max(1, -(-len(panels) // columns))
    tallest = max((len(bars) for bars in panels.values()), default=1)
    figure = figure_of(6.5 * columns, 1.0 + rows * (0.6 + 0.28 * tallest))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, bars) in zip(axes, panels.items(), strict=False):
        places = range(len(bars))
        axis.barh(places, [bar.value for bar in bars], color=[bar.color for bar in bars], height=0.75)
        for place, bar in zip(places, bars, strict=True):
            if bar.low is not None and bar.high is not None:
                axis.plot([bar.low, bar.high], [place, place], color="black", linewidth=1.2)
            end = max(bar.value, bar.high or 0.0)
            axis.annotate(f"{bar.value:.3g}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(places, [bar.label for bar in bars], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(case, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if kind in COMPARED:
            axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    figure.supxlabel(LABELS[kind], fontsize=9)
    return figure


def _lines(results: Results) -> Any:
    """Ratio to ``frozen eager`` over the batch: a panel for each network, a line for each candidate."""
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
        axis.set_ylim(bottom=0)
        axis.set_title(network, fontsize=10, loc="left")
        axis.set_xlabel("batch", fontsize=9)
        axis.set_ylabel(f"times as fast as {FROZEN}", fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    return figure


def _by_steps(results: Results) -> Any:
    """Seconds per iteration and how many times as fast as eager it is, over the steps: a row for each network."""
    cases = {case: Iteration.all(results.records, case) for case in results.cases}
    figure = figure_of(12, 4.2 * len(cases))
    rows = figure.subplots(len(cases), 2, squeeze=False)
    for (times, ratios), (case, iterations) in zip(rows, cases.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(name for one in iterations for name in one.measured)):
            own = [one for one in iterations if name in one.measured]
            style: dict[str, Any] = (
                {"color": OURS, "linewidth": 2.2} if name == GRADPRUNE else {"color": COLORS[i % len(COLORS)]}
            )
            style.update({"linestyle": ":"} if name == EAGER_TRAINING else {})
            seconds = [one.measured[name].median for one in own]
            times.plot([one.steps for one in own], seconds, marker="o", markersize=3.5, label=name, **style)
            known = [(one.steps, ratio) for one in own if (ratio := one.ratio(name, EAGER_TRAINING))]
            if name == EAGER_TRAINING or not known:
                continue
            at = [steps for steps, _ in known]
            ratios.plot(at, [ratio.median for _, ratio in known], marker="o", markersize=3.5, label=name, **style)
            low, high = [ratio.low for _, ratio in known], [ratio.high for _, ratio in known]
            ratios.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        steps = [one.steps for one in iterations]
        predicted = [one.predicted_ratio for one in iterations]
        ratios.plot(steps, predicted, color="black", linewidth=0.9, linestyle="--", label="FLOPs say: (6K+6)/(4K+6)")
        times.set_ylabel("seconds per iteration", fontsize=9)
        ratios.set_ylabel(f"times as fast as {EAGER_TRAINING}", fontsize=9)
        for axis in (times, ratios):
            axis.set_title(case, fontsize=10, loc="left")
            axis.set_xticks(steps, [str(count) for count in steps])
            axis.set_ylim(bottom=0)
            axis.set_xlabel("steps of the attack, K", fontsize=9)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=8)
    return figure


def _by_epochs(results: Results) -> Any:
    """Accuracy under attack and clean accuracy over the epochs, a line for each objective."""
    figure = figure_of(12, 4.4)
    axes = figure.subplots(1, 2)
    for i, record in enumerate(record for record in results.records if isinstance(record, ObjectiveRecord)):
        epochs = range(1, len(record.robust) + 1)
        style: dict[str, Any] = {"color": "0.4", "linestyle": ":"} if record.candidate == "plain" else {}
        for axis, values in zip(axes, (record.robust, record.clean), strict=True):
            shares = [100 * value for value in values]
            axis.plot(epochs, shares, **{"color": f"C{i}", **style}, label=record.candidate)
    for axis, title in zip(axes, ("under PGD-20", "clean"), strict=True):
        axis.set_title(f"accuracy {title}, %", fontsize=10, loc="left")
        axis.set_xlabel("epoch", fontsize=9)
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    if axes[1].lines:
        axes[1].legend(fontsize=8, frameon=False, loc="lower right")
    return figure
