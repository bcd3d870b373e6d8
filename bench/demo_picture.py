"""The picture of the demo: original, adversarial example, perturbation, and where the perturbation is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprune.support.files import replacing

from .demo_workload import Measured

COLUMNS = ("original", "adversarial", "perturbation", "|perturbation|")
EXAMPLES = 2
AMPLIFICATION = {3: 20, 1: 2}
"""By number of channels. The ball of the digits is so large that 20 times the perturbation would be black and white."""


def save(path: Path, measured: list[Measured]) -> None:
    """Draw two examples of every workload, four panels each [HW], and write them as PNG.

    Args:
        path: The file.
        measured: What to take the examples from.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    examples = [(one, index) for one in measured for index in _choose(one)]
    # Without pyplot: no global state, no window, whatever backend the user has configured.
    figure = Figure(figsize=(11, 2.75 * len(examples)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(examples), len(COLUMNS), squeeze=False)
    for column, title in enumerate(COLUMNS):
        grid[0, column].set_title(title, fontsize=11)
    for row, (one, index) in zip(grid, examples, strict=True):
        _draw(figure, row, one, index)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _choose(measured: Measured) -> list[int]:
    """Indices of the examples to show: such that are misclassified now, if there are any."""
    fooled = (_predictions(measured, measured.adversarial) != measured.workload.y).int()
    return torch.argsort(fooled, descending=True, stable=True)[:EXAMPLES].tolist()


def _draw(figure: Any, row: Any, measured: Measured, index: int) -> None:
    """Fill the four panels of one example."""
    workload = measured.workload
    clean, adversarial = workload.x[index], measured.adversarial[index]
    delta = adversarial - clean
    factor = AMPLIFICATION[len(clean)]
    before = int(_predictions(measured, workload.x[index : index + 1]))
    after = int(_predictions(measured, adversarial[None]))
    row[0].imshow(_image(clean), vmin=0, vmax=1, cmap="gray")
    row[0].set_ylabel(workload.title.split(",")[0].split(" on ")[0], fontsize=10)
    row[0].set_xlabel(f"read as {before}", fontsize=9)
    row[1].imshow(_image(adversarial), vmin=0, vmax=1, cmap="gray")
    row[1].set_xlabel(f"read as {after}", fontsize=9)
    row[2].imshow(_image((0.5 + factor * delta).clamp(0, 1)), vmin=0, vmax=1, cmap="gray")
    row[2].set_xlabel(f"x{factor}, grey is zero", fontsize=9)
    heat = row[3].imshow(delta.abs().sum(0).numpy(), vmin=0, vmax=len(clean) * workload.eps, cmap="inferno")
    row[3].set_xlabel(f"summed over {len(clean)} channels" if len(clean) > 1 else "one channel", fontsize=9)
    figure.colorbar(heat, ax=row[3], fraction=0.046, pad=0.03).ax.tick_params(labelsize=8)
    for panel in row:
        panel.set_xticks([])
        panel.set_yticks([])


def _predictions(measured: Measured, x: Tensor) -> Tensor:
    """Classes the model reads in images ``x``."""
    with torch.no_grad():
        return measured.workload.model(x).argmax(1)  # type: ignore[no-any-return]


def _image(picture: Tensor) -> np.ndarray[Any, Any]:
    """``(C, H, W)`` as matplotlib wants it: ``(H, W, 3)``, or ``(H, W)`` if it is grey."""
    return picture.permute(1, 2, 0).squeeze(-1).numpy()
