"""CW, DeepFool and FAB against the libraries that people use them from: the same steps, and perturbations no larger."""

from __future__ import annotations

import pytest
import torch
from attack_testing import EAGER, assert_close_for_most, labels_of, norm_in_float64
from digit_networks import DigitNetworks, classified
from references import foolbox, torchattacks
from torch import Tensor, nn

from gradprune.attacks import CW, FAB, DeepFool
from gradprune.workloads.digits import Digits


def median_norm(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, norm: str) -> float:
    """Of the perturbations that fool the model, which nearly all have to."""
    fooled = labels_of(model, x_adv) != y
    assert fooled.float().mean() > 0.9
    return float(norm_in_float64(x_adv - x, norm)[fooled].median())


# --- Carlini & Wagner -------------------------------------------------------------------------------------------------


class Positive(nn.Module):
    """Logits above zero. Torchattacks takes zero for the largest logit of another class if all of these are below."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.model(x) + 100


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_cw_takes_the_steps_of_torchattacks(targeted: bool, digits: Digits, networks: DigitNetworks) -> None:
    model = Positive(networks.double().plain)
    x, y = classified(model, digits, 12, torch.float64)
    x = x.clamp(0.01, 0.99)  # at the bounds themselves Torchattacks starts from infinity
    y = labels_of(model, x)
    if targeted:
        with torch.no_grad():
            y = model(x).argsort(dim=1)[:, -2]
    theirs = torchattacks.CW(model, c=1, kappa=0, steps=50, lr=0.02)
    if targeted:
        theirs.set_mode_targeted_by_function(lambda images, labels: labels)
    moved, found = 0, list[tuple[Tensor, Tensor]]()
    for rows in torch.arange(len(x)).split(1):  # it gives up when the loss of the batch has not fallen
        model.calls = 0
        expected = theirs(x[rows], y[rows])
        # It does not look at where its last step leads, ours does.
        ours = CW(steps=model.calls - 1, learning_rate=0.02, targeted="given" if targeted else None)
        x_adv = ours(model, x[rows], y[rows], runtime=EAGER)
        found += [(x_adv, expected)]
        moved += not torch.equal(expected, x[rows])
    assert_close_for_most(*map(torch.cat, zip(*found, strict=True)), atol=1e-8, share=0.9)
    assert moved >= 5


def test_cw_finds_perturbations_no_larger_than_torchattacks(digits: Digits, networks: DigitNetworks) -> None:
    model = Positive(networks.fgsm)
    x, y = classified(model, digits, 200, torch.float32)
    theirs = torchattacks.CW(model, c=5, steps=80, lr=0.05)(x, y)
    ours = CW(constant=5, steps=80, learning_rate=0.05)(model, x, y, runtime=EAGER)
    assert median_norm(model, ours, x, y, "l2") <= 1.05 * median_norm(model, theirs, x, y, "l2")
    searched = CW(constant=5, searches=5, steps=80, learning_rate=0.05)(model, x, y, runtime=EAGER)
    assert median_norm(model, searched, x, y, "l2") <= median_norm(model, ours, x, y, "l2")


# --- DeepFool ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_takes_the_steps_of_foolbox(norm: str, digits: Digits, networks: DigitNetworks) -> None:
    model = networks.double().fgsm
    x, y = classified(model, digits, 100, torch.float64)
    attack = {"l2": foolbox.attacks.L2DeepFoolAttack, "linf": foolbox.attacks.LinfDeepFoolAttack}[norm]
    theirs = attack(steps=50, candidates=10, overshoot=0.02, loss="logits")
    reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    expected, _, success = theirs(reference, x, y, epsilons=None)
    assert success.all()
    x_adv = DeepFool(norm=norm, steps=50, candidates=9, overshoot=0.02)(model, x, y, runtime=EAGER)
    assert_close_for_most(x_adv, expected, atol=1e-6)


# --- FAB --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_takes_the_steps_of_torchattacks(
    norm: str, digits: Digits, networks: DigitNetworks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it computes in float32 whatever it is given
    model = networks.double().fgsm
    x, y = classified(model, digits, 60, torch.float64)
    their_norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    theirs = torchattacks.FAB(model, norm=their_norm, eps=1e5, steps=15, multi_targeted=True)
    theirs.target_class = 2
    expected = theirs.attack_single_run_targeted(x, y)
    x_adv = FAB(norm=norm, eps=None, steps=15, targets=1)(model, x, y, runtime=EAGER)
    assert (labels_of(model, x_adv) == labels_of(model, expected)).double().mean() >= 0.95
    assert_close_for_most(x_adv, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_finds_perturbations_no_larger_than_torchattacks(
    norm: str, digits: Digits, networks: DigitNetworks
) -> None:
    """Against all classes; ours picks the closest, which takes theirs one run for each class."""
    model = networks.pgd
    x, y = classified(model, digits, 100, torch.float32)
    their_norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    theirs = torchattacks.FAB(model, norm=their_norm, eps=1e5, steps=20)
    found = theirs.attack_single_run(x, y)
    ours = FAB(norm=norm, eps=None, steps=20, targets=9)(model, x, y, runtime=EAGER)
    assert median_norm(model, ours, x, y, norm) <= 1.05 * median_norm(model, found, x, y, norm)
