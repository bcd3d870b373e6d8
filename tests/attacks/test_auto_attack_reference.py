"""AutoAttack reports the robust accuracy of the published algorithm, as shipped in Torchattacks."""

from __future__ import annotations

import pytest
import torch
from attack_testing import EAGER, labels_of
from digit_networks import DigitNetworks
from references import torchattacks
from torch import Tensor, nn

from gradprune.attacks import AutoAttack
from gradprune.workloads.digits import Digits

STEPS = {"plain": 40, "fgsm": 20, "pgd": 20}
QUERIES = 150
EPS = {"linf": 0.1, "l2": 0.6}
THEIR_NORM = {"linf": "Linf", "l2": "L2"}


def robust_accuracy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * float((labels_of(model, x_adv) == y).double().mean())


def published(model: nn.Module, norm: str, steps: int) -> torchattacks.AutoAttack:
    """The standard ensemble with as many steps and queries as ours takes."""
    attack = torchattacks.AutoAttack(model, norm=THEIR_NORM[norm], eps=EPS[norm], version="standard", seed=0)
    *along_the_gradient, square = attack._autoattack.attacks
    for part in along_the_gradient:
        part.steps = steps
    square.n_queries = QUERIES
    return attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("training", ["plain", "fgsm", "pgd"])
def test_robust_accuracy_is_that_of_the_published_algorithm(
    training: str, norm: str, digits: Digits, networks: DigitNetworks
) -> None:
    model: nn.Module = getattr(networks, training)
    x, y = digits.test_x, digits.test_y
    theirs = robust_accuracy(model, published(model, norm, STEPS[training])(x, y), y)
    attack = AutoAttack(norm=norm, eps=EPS[norm], steps=STEPS[training], queries=QUERIES, seed=0)
    x_adv = attack(model, x, y, runtime=EAGER)
    ours = robust_accuracy(model, x_adv, y)
    assert abs(ours - theirs) <= 0.5, f"{ours:.2f} % and {theirs:.2f} % are robust"
    assert ours < robust_accuracy(model, x, y) - 5
    assert attack.parts[0].ball.of(x_adv - x).max() <= EPS[norm] + 1e-6
    held = labels_of(model, x_adv) == y
    assert torch.equal(x_adv[held], x[held]), "samples that hold out come back as they were"
