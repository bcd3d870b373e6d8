"""Small networks for digits, trained in seconds: plainly, on FGSM and on PGD examples."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from attack_testing import EAGER, labels_of
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FGSM, PGD, Attack
from gradprune.workloads.digits import Digits

TRAINING_EPS = 0.15
EPOCHS = 10


@dataclass(frozen=True)
class DigitNetworks:
    """Networks by how they were trained, all in evaluation mode."""

    plain: nn.Module
    fgsm: nn.Module
    pgd: nn.Module

    def double(self) -> DigitNetworks:
        """Copies in float64."""
        return DigitNetworks(*(copy.deepcopy(model).double() for model in (self.plain, self.fgsm, self.pgd)))


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, 16 channels at most."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train_networks(digits: Digits) -> DigitNetworks:
    """Train all three, each from the same initial weights."""
    return DigitNetworks(
        _train(digits, None),
        _train(digits, FGSM(eps=TRAINING_EPS, seed=0)),
        _train(digits, PGD(eps=TRAINING_EPS, step_size=TRAINING_EPS / 2, steps=2, seed=0)),
    )


def _train(digits: Digits, attack: Attack | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(digits.train_x), generator=generator).split(64):
            x, y = digits.train_x[rows], digits.train_y[rows]
            if attack is not None:
                x = attack(model, x, y, runtime=EAGER)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(True)


def classified(model: nn.Module, digits: Digits, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Test digits that a network classifies correctly."""
    x, y = digits.test_x.to(dtype), digits.test_y
    rows = (labels_of(model, x) == y).nonzero().squeeze(1)[:count]
    return x[rows], y[rows]
