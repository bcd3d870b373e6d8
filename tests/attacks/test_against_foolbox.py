"""Projected gradient descent returns what Foolbox's does, from the same start, in all norms."""

from __future__ import annotations

import pytest
import torch
from attack_testing import EAGER, norm_in_float64
from digit_networks import DigitNetworks, classified
from references import foolbox
from torch import Tensor
from torch.nn import functional as F

from gradprune.attacks import FGSM, NORMS, PGD
from gradprune.workloads.digits import Digits

EPS = {"linf": 0.1, "l2": 0.8, "l1": 4.0}
STEPS = 8

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", EPS)
def test_descent_is_that_of_foolbox(
    norm: str, targeted: bool, digits: Digits, networks: DigitNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eps = networks.double().fgsm, EPS[norm]
    x, y = classified(model, digits, 30, torch.float64)
    start = (x + NORMS[norm].random(x, eps, torch.Generator().manual_seed(0))).clamp(0, 1)
    kind = {
        "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
        "l1": foolbox.attacks.L1ProjectedGradientDescentAttack,
    }[norm]
    theirs = kind(abs_stepsize=eps / 3, steps=STEPS, random_start=True)
    monkeypatch.setattr(kind, "get_random_start", lambda self, x0, epsilon: type(x0)(start))
    monkeypatch.setattr(PGD, "start", lambda self, x, generator: start)
    criterion = foolbox.criteria.Misclassification(y)
    if targeted:
        y = (y + 1) % 10
        criterion = foolbox.criteria.TargetedMisclassification(y)
    _, expected, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, criterion, epsilons=eps)

    def scaled(x_adv: Tensor, clean: Tensor) -> Tensor:
        delta = x_adv - clean
        factor = (eps / norm_in_float64(delta, "l1")).clamp(max=1)
        return (clean + factor[:, None, None, None] * delta).clamp(0, 1)

    ours = PGD(
        norm=norm,
        eps=eps,
        step_size=eps / 3,
        steps=STEPS,
        targeted="given" if targeted else None,
        # Foolbox shortens what is outside of the L1 ball, where ours goes to the closest point of the ball.
        constraint=scaled if norm == "l1" else None,
    )
    x_adv = ours(model, x, y, runtime=EAGER)
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)
    assert norm_in_float64(x_adv - x, norm).max() > eps / 2


def test_the_closest_point_of_the_l1_ball_is_worth_it(digits: Digits, networks: DigitNetworks) -> None:
    """The losses that the two projections lead to, on average."""
    model = networks.double().fgsm
    x, y = classified(model, digits, 100, torch.float64)
    settings = {"eps": EPS["l1"], "step_size": EPS["l1"] / 3, "steps": 20}
    theirs = foolbox.attacks.L1ProjectedGradientDescentAttack(
        abs_stepsize=settings["step_size"], steps=20, random_start=False
    )
    _, expected, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=EPS["l1"])
    x_adv = PGD(norm="l1", random_start=False, **settings)(model, x, y, runtime=EAGER)
    with torch.no_grad():
        assert F.cross_entropy(model(x_adv), y) >= F.cross_entropy(model(expected), y)


@pytest.mark.parametrize("norm", EPS)
def test_the_fast_gradient_method_is_that_of_foolbox(norm: str, digits: Digits, networks: DigitNetworks) -> None:
    model, eps = networks.double().plain, EPS[norm]
    x, y = classified(model, digits, 30, torch.float64)
    theirs = {
        "linf": foolbox.attacks.LinfFastGradientAttack,
        "l2": foolbox.attacks.L2FastGradientAttack,
        "l1": foolbox.attacks.L1FastGradientAttack,
    }[norm](random_start=False)
    _, expected, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=eps)
    torch.testing.assert_close(FGSM(norm=norm, eps=eps)(model, x, y, runtime=EAGER), expected, atol=1e-9, rtol=0)
