"""Small steps that differ in what there is to see: layers, ways to take the gradient, what is read of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from helpers import step_by_autograd_grad, step_by_backward, step_by_func_grad
from torch import Tensor, nn

import gradprune

Made = tuple[Callable[..., Any], tuple[Tensor, ...]]


def network(training: bool = False) -> nn.Sequential:
    """Convolutions, batch norm, pooling and a linear layer for 8x8 images in three channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)),
    )
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model.train(training)


def images(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A perturbed image, the clean image and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, 3, 8, 8, generator=generator)
    noise = torch.rand(batch, 3, 8, 8, generator=generator)
    return x + 0.01 * noise, x, torch.randint(5, (batch,), generator=generator)


def convolutional() -> Made:
    """What most attacks are."""
    return step_by_backward(network(), F.cross_entropy), images()


def training_mode() -> Made:
    """Batch norm in training mode writes to its buffers; the loss has a constant of its own."""
    model, weights = network(training=True), torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, weight=weights) + (logits * torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])).sum()

    return step_by_autograd_grad(model, loss), images()


class Tokens(nn.Module):
    """A transformer layer over embeddings that are added to the perturbation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens) + x).mean(1))


def tokens() -> Made:
    """Attention, and integer inputs that index into a table."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 6, 16, generator=generator)
    numbers = torch.randint(11, (2, 6), generator=generator)
    step = step_by_func_grad(Tokens().eval(), F.cross_entropy)
    return step, (x + 0.01, x, torch.tensor([0, 2]), numbers)


STEPS = {"convolutional": convolutional, "training mode": training_mode, "tokens": tokens}


def compiled(made: Made, dump: Path | None = None, **options: Any) -> gradprune.Report:
    """The report of a step that has been compiled and called once."""
    step, args = made
    run = gradprune.compile(step, **({} if dump is None else {"dump": dump}), **options)
    run(*args)
    (report,) = gradprune.reports(run)
    return report


def folder_of(report: gradprune.Report) -> Path:
    """Where a report says that it was dumped, without an error."""
    assert report.dump_error is None
    assert report.dump is not None
    return Path(report.dump)


def read(folder: Path) -> dict[str, Any]:
    """The report in a dump folder."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found
