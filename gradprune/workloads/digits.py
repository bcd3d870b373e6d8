"""Handwritten digits from scikit-learn, and a network trained on them on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .networks import DigitsNet

SEED = 0
TEST_IMAGES = 450
EPOCHS = 15
BATCH = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)``, float32 in [0, 1], and labels ``(N,)``, int64, split once and for all."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """The 1797 digits that scikit-learn ships, 450 of them held out for testing."""
    from sklearn import datasets

    data = datasets.load_digits()
    # Grey values run from 0 to 16.
    x = torch.from_numpy(np.asarray(data.images, dtype=np.float32) / 16).unsqueeze(1)
    y = torch.from_numpy(np.asarray(data.target, dtype=np.int64))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    return Digits(x[train], y[train], x[test], y[test])


def train_digits(digits: Digits, build: Callable[[], nn.Module] = DigitsNet, epochs: int = EPOCHS) -> nn.Module:
    """Train a network on the training digits: Adam, cross entropy, a few seconds.

    Args:
        digits: The data; only its training part is used.
        build: Makes the network.
        epochs: How often it sees the data.

    Returns:
        The network, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build()
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train_x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train_x[rows]), digits.train_y[rows]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()
