"""The figure of ``bench tables``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attacks import Contest
from .report import OTHERS, OURS, SECOND, Bar, draw_bars
from .store import Results


def draw(results: Results[Any], titles: Mapping[str, str]) -> Any:
    """How many times as fast as shipped the ways are, a panel for each table."""
    colors = {"frozen": SECOND, "frozen + compile(model)": OTHERS, "patch": OURS}
    panels: dict[str, list[Bar]] = {}
    for table, title in titles.items():
        for contest in Contest.all(results.records, table):
            for i, (way, color) in enumerate(colors.items()):
                ratio = contest.ratio(way, "as shipped")
                if ratio:
                    bar = Bar("" if i else contest.attack, ratio.median, ratio.low, ratio.high, color)
                    panels.setdefault(title, []).append(bar)
    label = (
        "times as fast as shipped, quartiles of the rounds: frozen (grey), frozen + compile(model) (blue), patch (red)"
    )
    return draw_bars(panels, label, ratios=True)
