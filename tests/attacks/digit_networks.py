"""Small networks for digits, trained plainly, on FGSM and on PGD examples; their weights are in a file.

Trained on the spot they would be other networks on every processor. ``python tests/attacks/digit_networks.py`` trains
them anew and writes the file.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from attack_testing import EAGER, labels_of
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.attacks import FGSM, PGD, Attack
from gradprune.workloads.digits import Digits, load_digits

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


FILE = Path(__file__).with_suffix(".npz")
TRAININGS: dict[str, Attack | None] = {
    "plain": None,
    "fgsm": FGSM(eps=TRAINING_EPS, seed=0),
    "pgd": PGD(eps=TRAINING_EPS, step_size=TRAINING_EPS / 2, steps=2, seed=0),
}


def load_networks() -> DigitNetworks:
    """All three, with the weights in the file."""
    with np.load(FILE) as weights:
        found = []
        for training in TRAININGS:
            model = network()
            names = model.state_dict()
            model.load_state_dict({name: torch.tensor(weights[f"{training}.{name}"]).float() for name in names})
            found.append(model.eval())
    return DigitNetworks(*found)


def write_networks() -> None:
    """Train all three, each from the same initial weights, and write their weights in half precision."""
    digits = load_digits()
    states = {name: _train(digits, attack).state_dict() for name, attack in TRAININGS.items()}
    weights = {
        f"{training}.{name}": value.half().numpy()
        for training, state in states.items()
        for name, value in state.items()
    }
    np.savez_compressed(FILE, **weights)


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


if __name__ == "__main__":
    write_networks()
