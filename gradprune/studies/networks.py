"""The networks of [LAB] and [LR], for images of any size."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


class CapacityNet(nn.Module):
    """Two convolutions of 5x5 and one hidden layer, for small images.

    The filters and neurons are a caller's, in the proportions of the network of Madry et al. 2018 (32 and 64 filters,
    1024 neurons), which [LR] scales.

    Args:
        shape: Of the images.
        classes: How many logits there are.
        first: Filters of the first convolution.
        second: Of the second one.
        hidden: Neurons.
    """

    def __init__(self, shape: Shape, classes: int, first: int, second: int, hidden: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class BinaryNet(CapacityNet):
    """A network of one logit for two classes, returned as ``(0, logit)`` for a cross entropy.

    Args:
        shape: Of the images.
        first: Filters of the first convolution.
        second: Of the second one.
        hidden: Neurons, which are its features [LR 2].
    """

    def __init__(self, shape: Shape, first: int, second: int, hidden: int) -> None:
        super().__init__(shape, 1, first, second, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 2)``."""
        logit = super().forward(x)
        return torch.cat([torch.zeros_like(logit), logit], 1)


class Masked(nn.Module):
    """A parametrization that multiplies a weight with a mask, which is a buffer: another one recompiles nothing.

    Args:
        weight: The weight; the mask is shaped like it, and all ones at first.
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight where the mask is 1, and 0 where it is 0."""
        return weight * self.mask


class TicketNet(nn.Module):
    """Fully connected layers of 300 and 100 neurons whose weights have masks [LR 3].

    Args:
        shape: Of the images.
        classes: How many logits there are.
        neurons: Of the two hidden layers.
    """

    def __init__(self, shape: Shape, classes: int, neurons: tuple[int, int] = (300, 100)) -> None:
        super().__init__()
        widths = [shape[0] * shape[1] * shape[2], *neurons, classes]
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)  # type: ignore[no-any-return]

    @property
    def masks(self) -> list[Tensor]:
        """The masks of all layers; writing to them prunes."""
        return [module.mask for module in self.modules() if isinstance(module, Masked)]
