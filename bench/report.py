"""How results are shown: Markdown that reads well as plain text too, and bars with their spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gradprune.support.figures import figure_of

from .cases import Case
from .store import Ratio, Results, Timed

OURS, OTHERS, SECOND = "#c1272d", "#7f9fbf", "#d0d7de"
COLORS = "#4d4d4d", "#7f9fbf", "#2a7f62", "#c98b2b"
"""Of lines that are not ours, in their order."""


def document(results: Results[Any], about: str, sections: Sequence[str], legend: str) -> str:
    """Everything about one file, in Markdown.

    Args:
        results: The file.
        about: What was measured on.
        sections: Its tables, with what goes above them.
        legend: What the columns say.
    """
    here = results.environment
    parts = [
        f"# gradprune bench {results.path.stem}",
        f"{here.get('gpu', here['cpu'])}, **{results.settings}**, BLAS **{here['blas']}**, oneDNN {here['onednn']}, "
        f"torch {here['torch']}. {about}",
        *sections,
        legend,
        "## Environment",
        "\n".join(f"- {name}: {value}" for name, value in here.items()),
    ]
    return "\n\n".join(parts) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (head, rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def ratio_text(ratio: Ratio | float | None, *, spread: bool = False) -> str:
    """Such as ``1.52x`` or, with its quartiles, ``1.52x (1.49-1.55)``."""
    if isinstance(ratio, Ratio):
        return f"{ratio.median:.2f}x" + f" ({ratio.low:.2f}-{ratio.high:.2f})" * spread
    return "-" if ratio is None else f"{ratio:.2f}x"


def figure(value: float | None, unit: float = 1.0) -> str:
    """Three significant digits, ``-`` for nothing."""
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.1f}" if scaled >= 100 else f"{scaled:.3g}"


def errors(largest: float | None, euclidean: float | None) -> str:
    """The largest one and that in the Euclidean norm."""
    return "-" if largest is None or euclidean is None else f"{largest:.0e} / {euclidean:.0e}"


def eps_text(size: float, like: float) -> str:
    """A radius or a step size as it is usually written."""
    return f"{size * 255:g}/255" if like < 0.1 else f"{size:g}"


def attacked(case: Case, steps: str = "") -> str:
    """The batch and its attack."""
    shape = "x".join(map(str, case.shape))
    eps, step = (eps_text(size, case.eps) for size in (case.eps, case.step_size))
    return f"Batch {case.batch} of {shape}; {steps}PGD in the Linf ball, eps {eps}, step size {step}"


def circumstances(records: Sequence[Timed]) -> str:
    """How often was measured, and how busy the machine was."""
    rounds = max((len(record.seconds) for record in records), default=0)
    load = max((getattr(record, "load", None) or 0 for record in records), default=0)
    return f"Up to {rounds} rounds; load average up to {load:.1f} when they were begun."


def failures(records: Iterable[Any]) -> list[str]:
    """Why candidates were not timed, each reason once."""
    return list(dict.fromkeys(f"**{record.candidate} failed:** {record.failed}" for record in records if record.failed))


def share(value: float | None) -> str:
    """As a percentage."""
    return "-" if value is None else f"{value:.1%}"


@dataclass(frozen=True)
class Bar:
    """One bar: what it stands for, its length, and the ends of its spread."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: str = OTHERS


def draw_bars(panels: dict[str, list[Bar]], label: str, *, ratios: bool = False) -> Any:
    """A panel of horizontal bars for each case that has any, two panels in a row.

    Args:
        panels: The bars of each case, from top to bottom.
        label: What their length says.
        ratios: Whether they are ratios, so that there is a line at 1.
    """
    panels = {case: bars for case, bars in panels.items() if bars}
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
        if ratios:
            axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    figure.supxlabel(label, fontsize=9)
    return figure


def finish_axis(axis: Any, title: str, xlabel: str, ylabel: str = "") -> None:
    """What all line plots have in common."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(fontsize=8)
