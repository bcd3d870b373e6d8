"""Attacks of the Adversarial Robustness Toolbox on an accelerated model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_testing import CLASSES, EPS, STEPS, Peers, network
from torch import Tensor, nn

import gradprune

BALL = {"eps": EPS, "eps_step": 0.03, "max_iter": STEPS}

ATTACKS: dict[str, dict[str, Any]] = {
    "FastGradientMethod": {"eps": EPS},
    "BasicIterativeMethod": BALL,
    "ProjectedGradientDescentNumpy": BALL,
    "ProjectedGradientDescentPyTorch": BALL,
    "MomentumIterativeMethod": BALL,
    "AutoProjectedGradientDescent": {**BALL, "nb_random_init": 1},
    "CarliniL2Method": {"binary_search_steps": 2, "max_iter": 20, "learning_rate": 0.1, "initial_const": 10.0},
    "DeepFool": {"max_iter": STEPS},
    "ElasticNet": {"binary_search_steps": 2, "max_iter": 20, "learning_rate": 0.1, "initial_const": 10.0},
    "NewtonFool": {"max_iter": STEPS},
    "SaliencyMapMethod": {"theta": 0.5, "gamma": 0.1},
    "UniversalPerturbation": {"attacker": "fgsm", "max_iter": 2, "eps": EPS},
}


def classifier(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    classifiers = pytest.importorskip("art.estimators.classification")
    shape = (3, 8, 8)
    return classifiers.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, CLASSES, optimizer, clip_values=(0.0, 1.0), device_type="cpu"
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_art(peers: Peers, name: str) -> None:
    evasion = pytest.importorskip("art.attacks.evasion")

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        settings = {**ATTACKS[name], **({} if name == "FastGradientMethod" else {"verbose": False})}
        return torch.from_numpy(getattr(evasion, name)(classifier(model), **settings).generate(x.numpy()))

    peers.check(attack)


def test_fit_says_that_it_does_not_train() -> None:
    fast = gradprune.accelerate(network())
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    with pytest.raises(gradprune.TrainingStepError, match="to train, use the model that was not compiled"):
        classifier(fast, optimizer).fit(x.numpy(), y.numpy(), batch_size=6, nb_epochs=1)
