"""Small networks and data for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIDE = 4, 6


def network(dtype: torch.dtype = torch.float32, *, norm: bool = True, seed: int = 0) -> nn.Module:
    """A smooth convolutional network, in training mode: no two runs can disagree about the side of a kink."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3, padding=1), *([nn.BatchNorm2d(6)] if norm else []), nn.Softplus()]
    layers += [nn.Conv2d(6, 6, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(24, CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def batch(count: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random inputs ``(N, 1, 6, 6)`` in [0, 1] and labels ``(N,)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, SIDE, SIDE, generator=generator, dtype=dtype)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def separable(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs whose class is the quarter that is brightest."""
    x, y = batch(count, seed=seed)
    x = x * 0.5
    for row in range(2):
        for column in range(2):
            quarter = x[y == 2 * row + column, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            x[y == 2 * row + column, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = quarter + 0.5
    return x, y


def loader(count: int = 64, size: int = 12, seed: int = 0, *, shuffle: bool = True) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of ``separable``."""
    return DataLoader(TensorDataset(*separable(count, seed)), size, shuffle=shuffle)
