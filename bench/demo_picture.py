"""The picture of the demo: original, adversarial example, perturbation, and where the perturbation is large."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gradprune.evaluation.plots import Example, save_examples

from .demo_workload import Measured

EXAMPLES = 2
"""Of every workload."""


def save(path: Path, measured: list[Measured]) -> None:
    """Draw two examples of every workload, four panels each [HW], and write them as PNG.

    Args:
        path: The file.
        measured: What to take the examples from.
    """
    save_examples(path, [example for one in measured for example in _examples(one)])


def _examples(measured: Measured) -> list[Example]:
    """The examples to show: such that are misclassified now, if there are any."""
    workload = measured.workload
    before, after = (_predictions(measured, x) for x in (workload.x, measured.adversarial))
    fooled = (after != workload.y).int()
    title = workload.title.split(",")[0].split(" on ")[0]
    return [
        Example(
            title,
            workload.x[i].numpy(),
            measured.adversarial[i].numpy(),
            int(before[i]),
            int(after[i]),
            workload.eps,
        )
        for i in torch.argsort(fooled, descending=True, stable=True)[:EXAMPLES].tolist()
    ]


def _predictions(measured: Measured, x: Tensor) -> Tensor:
    """Classes the model reads in images ``x``."""
    with torch.no_grad():
        return measured.workload.model(x).argmax(1)  # type: ignore[no-any-return]
