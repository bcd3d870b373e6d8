"""Accuracy against eps, and four panels for each example."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradprune.attacks.registry import CLEAN
from gradprune.support.figures import figure_of, save_figure

from .records import Record
from .tables import eps_text, groups

COLUMNS = ("original", "adversarial", "perturbation", "|perturbation|")
AMPLIFICATION = 20
"""Of the perturbation, as in [HW]; less where that would leave nothing but black and white."""
SMALLEST, ROUNDING = 1e-4, 1e-3
MARKERS = "osD^v<>P"


@dataclass(frozen=True)
class Example:
    """One row of panels.

    Attributes:
        title: What stands beside it.
        x: The clean image ``(C, H, W)``, in [0, 1].
        x_adv: The adversarial one.
        before: What the model reads in ``x``.
        after: What it reads in ``x_adv``.
        eps: Radius of the Linf ball, which is the end of the colour scale; ``None`` where there is none.
    """

    title: str
    x: np.ndarray[Any, Any]
    x_adv: np.ndarray[Any, Any]
    before: str
    after: str
    eps: float | None


def save_accuracy(path: Path, records: Sequence[Record]) -> bool:
    """Draw robust accuracy against eps, a panel for each norm; returns whether there was anything to draw."""
    titles = groups(records)
    panels: dict[str, dict[str, dict[float, float]]] = {}
    for title, group in titles.items():
        clean = group[0].clean_accuracy
        for one in group:
            if one.eps is None:
                continue
            steps = f", {one.steps} steps" if one.steps and one.steps > 1 else ""
            label = f"{one.label}{steps}" + (f": {title}" if len(titles) > 1 else "")
            line = panels.setdefault(one.norm, {}).setdefault(label, {0.0: clean})
            line[one.eps] = one.robust_accuracy
    if not panels:
        return False
    longest = max(len(label) for lines in panels.values() for label in lines)
    figure = figure_of(6.5 * len(panels) + (2.0 if longest > 40 else 0.0), 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (norm, lines) in zip(axes, panels.items(), strict=True):
        # Lines may coincide; markers of several shapes and sizes show that there are more of them.
        for number, (label, points) in enumerate(lines.items()):
            at, shares = sorted(points), [points[eps] * 100 for eps in sorted(points)]
            marker, size = MARKERS[number % len(MARKERS)], max(4, 8 - 1.2 * number)
            axis.plot(at, shares, marker=marker, markersize=size, markeredgewidth=0, alpha=0.85, label=label)
        ticks = sorted({eps for points in lines.values() for eps in points})
        if len(ticks) <= 9:
            axis.set_xticks(ticks, [eps_text(eps) if eps else "0" for eps in ticks], fontsize=9)
            if _crowded(ticks):
                axis.tick_params(axis="x", labelrotation=60)
        axis.set_xlabel(f"eps ({norm})")
        axis.set_ylabel("robust accuracy, %")
        axis.set_ylim(-2, 102)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    if len(titles) == 1:
        figure.suptitle(next(iter(titles)).rpartition(" (")[0], fontsize=11)
    save_figure(figure, path)
    return True


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Draw one row of four panels for each example [HW]."""
    save_figure(draw_examples(examples), path)


def draw_examples(examples: Sequence[Example]) -> Any:
    """A figure with one row of four panels for each example [HW]."""
    figure = figure_of(11, 0.35 + 2.75 * len(examples))
    grid = figure.subplots(len(examples), len(COLUMNS), squeeze=False)
    for column, title in enumerate(COLUMNS):
        grid[0, column].set_title(title, fontsize=11)
    for row, example in zip(grid, examples, strict=True):
        _draw(figure, row, example)
    return figure


def examples_of(
    record: Record,
    x: np.ndarray[Any, Any],
    arrays: dict[str, np.ndarray[Any, Any]],
    bounds: tuple[float, float],
    *,
    title: str | None = None,
) -> list[Example]:
    """Rows for the first ``len(x)`` adversarial examples of a result.

    Args:
        record: The result.
        x: Clean images ``(N, C, H, W)``.
        arrays: Its adversarial examples, with the predictions.
        bounds: Smallest and largest valid input: black and white.
        title: What stands beside each row; by default, the label.
    """
    low, width = bounds[0], bounds[1] - bounds[0]
    scale = record.eps / width if record.eps is not None and record.norm == "linf" else None
    return [
        Example(
            title if title is not None else f"label {int(arrays['y'][i])}",
            (x[i] - low) / width,
            (arrays["x_adv"][i] - low) / width,
            _read(int(arrays["clean_predictions"][i])),
            _read(int(arrays["predictions"][i])),
            scale,
        )
        for i in range(min(len(x), len(arrays["y"])))
    ]


def title_of(record: Record) -> str:
    """Attack, eps and steps in a few lines."""
    parts = [record.label.replace(", ", "\n")]
    if record.label != CLEAN and record.eps is not None:
        parts.append(f"{record.norm}, eps {eps_text(record.eps)}")
    if record.steps is not None and record.steps > 1:
        parts.append(f"{record.steps} steps")
    return "\n".join(parts)


def _read(label: int) -> str:
    return str(label) if label >= 0 else "no class"


def _draw(figure: Any, row: Any, example: Example) -> None:
    """Fill the four panels of one example."""
    delta = example.x_adv - example.x
    largest = float(np.abs(delta).max())
    factor = AMPLIFICATION if largest * AMPLIFICATION <= 1 else max(1, int(0.5 / largest + ROUNDING))
    row[0].imshow(_image(example.x), vmin=0, vmax=1, cmap="gray")
    row[0].set_ylabel(example.title, fontsize=9)
    row[0].set_xlabel(f"read as {example.before}", fontsize=9)
    row[1].imshow(_image(example.x_adv), vmin=0, vmax=1, cmap="gray")
    row[1].set_xlabel(f"read as {example.after}", fontsize=9)
    row[2].imshow(_image(0.5 + factor * delta), vmin=0, vmax=1, cmap="gray")
    row[2].set_xlabel(f"x{factor}, grey is zero", fontsize=9)
    channels = len(delta)
    end = channels * example.eps if example.eps else max(float(np.abs(delta).sum(0).max()), SMALLEST)
    heat = row[3].imshow(np.abs(delta).sum(0), vmin=0, vmax=end, cmap="inferno")
    row[3].set_xlabel(f"summed over {channels} channels" if channels > 1 else "one channel", fontsize=9)
    figure.colorbar(heat, ax=row[3], fraction=0.046, pad=0.03).ax.tick_params(labelsize=8)
    for panel in row:
        panel.set_xticks([])
        panel.set_yticks([])


def _image(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``(C, H, W)`` as matplotlib wants it: ``(H, W, 3)``, or ``(H, W)`` if it is grey."""
    shown: np.ndarray[Any, Any] = np.clip(picture, 0, 1)
    return shown[0] if len(shown) == 1 else shown.transpose(1, 2, 0)


def _crowded(ticks: Sequence[float]) -> bool:
    span = ticks[-1] - ticks[0]
    return any(after - before < 0.09 * span for before, after in itertools.pairwise(ticks))
