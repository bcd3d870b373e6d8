"""The networks of [LAB] and [LR], for images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""Channels, height and width of the images."""


def drawn(seed: int, build: type[nn.Module], *arguments: object) -> nn.Module:
    """A network with initial weights that a seed determines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*arguments)


class LabNet(nn.Module):
    """Three convolutions, a max pool, two linear layers: more than 50,000 parameters from 8x8 grey images on [LAB].

    Args:
        shape: Of the images.
        classes: How many logits there are.
    """

    def __init__(self, shape: Shape, classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        rows, columns = height // 2, width // 2
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(32 * rows * columns, 128), nn.ReLU(), nn.Linear(128, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]
