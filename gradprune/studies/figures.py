"""How figures of studies look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradprune.support.figures import figure_of

OURS, PAPER = "#c1272d", "#7f9fbf"


def panels(count: int, width: float = 5.6, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    figure = figure_of(width * count, height)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def finish(axis: Any, xlabel: str, ylabel: str, title: str = "", *, percent: bool = False) -> None:
    """Labels, grid and legend of a panel.

    Args:
        axis: The panel.
        xlabel: What is on the horizontal axis.
        ylabel: What is on the vertical one.
        title: What stands above it.
        percent: Whether the vertical axis runs from 0 to 100.
    """
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    if title:
        axis.set_title(title, fontsize=10, loc="left")
    if percent:
        axis.set_ylim(-3, 103)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def show_image(axis: Any, image: Any, caption: str = "") -> None:
    """An image ``(C, H, W)`` in [0, 1], grey or in colour, with a line below."""
    values = image.clamp(0, 1)
    axis.imshow(values[0] if len(values) == 1 else values.permute(1, 2, 0), vmin=0, vmax=1, cmap="gray")
    axis.set_xlabel(caption, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def percent(share: float | None) -> str:
    """Such as ``97.3``; ``-`` for nothing."""
    return "-" if share is None else f"{100 * share:.1f}"


CLOSE = 0.05
"""Shares that differ by no more are said to agree with a paper's."""


def beside(ours: float | None, paper: float | None) -> str:
    """A share of ours and the paper's, in percent, marked by whether they agree to five points."""
    if paper is None or ours is None:
        return percent(ours)
    return f"{percent(ours)} ({'=' if abs(ours - paper) <= CLOSE else '≠'} {100 * paper:.1f})"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of what lies between the smallest and the largest."""
    return sum(values) / len(values), (max(values) - min(values)) / 2
