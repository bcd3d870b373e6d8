"""Attacks against those of the Adversarial Robustness Toolbox, which computes in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attack_testing import EAGER, labels_of
from digit_networks import DigitNetworks, classified
from references import ArtClassifier, art
from torch import Tensor, nn

from gradprune.attacks import APGD, BIM, CW, FGSM, MIFGSM, PGD, Attack, DeepFool
from gradprune.workloads.digits import Digits

Theirs = Callable[[ArtClassifier], Any]

STEPS = {"eps": 0.1, "step_size": 0.03, "steps": 6}
THEIR_STEPS = {"eps": 0.1, "eps_step": 0.03, "max_iter": 6, "verbose": False}

SAME: dict[str, tuple[Attack, Theirs]] = {
    "FGSM": (FGSM(eps=0.1), lambda model: art.FastGradientMethod(model, eps=0.1)),
    "FGSM in L2": (FGSM(norm="l2", eps=0.8), lambda model: art.FastGradientMethod(model, norm=2, eps=0.8)),
    "BIM": (BIM(**STEPS), lambda model: art.BasicIterativeMethod(model, **THEIR_STEPS)),
    "MIFGSM": (MIFGSM(**STEPS), lambda model: art.MomentumIterativeMethod(model, decay=1.0, **THEIR_STEPS)),
}

ALIKE: dict[str, tuple[Attack, Theirs]] = {
    # It brings a point within the bounds first and then into the ball, ours the other way round.
    "PGD in L2": (
        PGD(norm="l2", eps=0.8, step_size=0.3, steps=6, random_start=False),
        lambda model: art.ProjectedGradientDescent(model, norm=2, **{**THEIR_STEPS, "eps": 0.8, "eps_step": 0.3}),
    ),
    # Starts are drawn, and its loss is computed from probabilities.
    "APGD": (
        APGD(eps=0.1, steps=20, seed=0),
        lambda model: art.AutoProjectedGradientDescent(
            model, eps=0.1, eps_step=0.2, max_iter=20, nb_random_init=1, loss_type="cross_entropy", verbose=False
        ),
    ),
}


def classifier(model: nn.Module) -> ArtClassifier:
    return ArtClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def both(
    ours: Attack, theirs: Theirs, networks: DigitNetworks, digits: Digits, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Our examples and theirs as perturbations, and which of either fool the model."""
    model = networks.fgsm
    x, y = classified(model, digits, count, torch.float32)
    expected = torch.from_numpy(theirs(classifier(model)).generate(x.numpy(), y.numpy()))
    results = ours(model, x, y, runtime=EAGER), expected
    return *(x_adv - x for x_adv in results), *(labels_of(model, x_adv) != y for x_adv in results)


@pytest.mark.parametrize("name", SAME)
def test_examples_are_those_of_art(name: str, digits: Digits, networks: DigitNetworks) -> None:
    ours, theirs, fooled, _ = both(*SAME[name], networks, digits, 60)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert fooled.any()


@pytest.mark.parametrize("name", ALIKE)
def test_as_many_samples_are_fooled_as_by_art(name: str, digits: Digits, networks: DigitNetworks) -> None:
    _, _, fooled, by_theirs = both(*ALIKE[name], networks, digits, 100)
    assert 0.1 < by_theirs.float().mean() < 0.9
    assert fooled.float().mean() >= by_theirs.float().mean() - 0.02


MINIMAL: dict[str, tuple[Attack, Theirs]] = {
    "DeepFool": (
        DeepFool(candidates=9),
        lambda model: art.DeepFool(model, max_iter=50, epsilon=0.02, nb_grads=10, verbose=False),
    ),
    "CW": (
        CW(constant=1, searches=3, steps=40, learning_rate=0.05),
        lambda model: art.CarliniL2Method(
            model, initial_const=1, binary_search_steps=3, max_iter=40, learning_rate=0.05, batch_size=16, verbose=False
        ),
    ),
}


@pytest.mark.parametrize("name", MINIMAL)
def test_perturbations_are_no_larger_than_those_of_art(name: str, digits: Digits, networks: DigitNetworks) -> None:
    ours, theirs, fooled, by_theirs = both(*MINIMAL[name], networks, digits, 16)
    assert fooled.float().mean() >= by_theirs.float().mean()
    common = fooled & by_theirs
    assert common.sum() >= 12
    norms = [one.flatten(1).norm(dim=1)[common].median() for one in (ours, theirs)]
    assert norms[0] <= 1.05 * norms[1]
