"""Figures of matplotlib, written to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import replacing


def can_draw(x: Any) -> bool:
    """Whether inputs ``(N, ...)`` are images, grey or in colour."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


def figure_of(width: float, height: float) -> Any:
    """A figure of that many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no window, whatever backend the user has configured.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
