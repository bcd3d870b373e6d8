"""The figure of ``bench tables``: Figure 2 of [SB], and bars for each table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradprune.support.figures import figure_of

from .attacks import Contest
from .report import COLORS, OTHERS, OURS, SECOND, finish_axis
from .table_training import PART as EPOCHS
from .table_training import epoch_seconds
from .table_ways import ACCELERATED, COMPILED, FROZEN, PATCHED, SHIPPED, WAYS

LIGHT = "#e0a3a6"

BARS = {FROZEN: SECOND, COMPILED: OTHERS, ACCELERATED: LIGHT, PATCHED: OURS}
"""The colours of the ways, each compared with the attack as shipped."""


def draw(tables: Mapping[str, Sequence[Contest]], titles: Mapping[str, str]) -> Any:
    """Lines for Figure 2 and bars for the tables, two panels in a row.

    Args:
        tables: What was measured of each.
        titles: Above the panels.
    """
    order = sorted(tables, key=lambda table: (table != EPOCHS, len(tables[table])))
    rows = [order[at : at + 2] for at in range(0, len(order), 2)] or [[]]
    heights = [max([3.2, *(0.8 + 0.72 * len(tables[one]) for one in row if one != EPOCHS)]) for row in rows]
    columns = max(1, *(len(row) for row in rows))
    figure = figure_of(7.5 * columns, 0.8 + sum(heights))
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for places, row in zip(axes, rows, strict=True):
        for axis in places[len(row) :]:
            axis.set_visible(False)
        for axis, table in zip(places, row, strict=False):
            (_draw_epochs if table == EPOCHS else _draw_bars)(axis, titles[table], tables[table])
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=way) for way, color in BARS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(BARS), fontsize=9, frameon=False)
    return figure


def _draw_bars(axis: Any, title: str, contests: Sequence[Contest]) -> None:
    """How many times as fast as shipped the ways are, a group of bars for each row of a table."""
    pitch = len(BARS) + 1.2
    for group, contest in enumerate(contests):
        for i, (way, color) in enumerate(BARS.items()):
            if ratio := contest.ratio(way, SHIPPED):
                place = group * pitch + i
                axis.barh(place, ratio.median, color=color, height=0.9)
                axis.plot([ratio.low, ratio.high], [place, place], color="black", linewidth=1)
                end = (max(ratio.median, ratio.high), place)
                axis.annotate(f"{ratio.median:.2f}", end, (4, 0), textcoords="offset points", va="center", fontsize=7)
    middles = [group * pitch + (len(BARS) - 1) / 2 for group in range(len(contests))]
    axis.set_yticks(middles, [contest.attack for contest in contests], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.02)
    axis.set_xlim(left=0)
    axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("times as fast as shipped, quartiles of the rounds", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_epochs(axis: Any, title: str, epochs: Sequence[Contest]) -> None:
    """Seconds of an epoch over the steps of its attack, a line for each way."""
    styles = {SHIPPED: (COLORS[0], ":"), FROZEN: (COLORS[0], "-"), COMPILED: (OTHERS, "-")}
    styles |= {ACCELERATED: (LIGHT, "-"), PATCHED: (OURS, "-")}
    for way in WAYS:
        own = [one.measured[way] for one in epochs if way in one.measured]
        color, line = styles[way]
        seconds: list[float] = [epoch_seconds(one, one.median) for one in own]  # type: ignore[arg-type]
        axis.plot([one.steps for one in own], seconds, line, color=color, marker="o", markersize=4, label=way)
    axis.set_xticks([one.records[0].steps for one in epochs])
    finish_axis(axis, title, "steps of the attack, K", "seconds per epoch of 50,000 images")
