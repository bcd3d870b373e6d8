"""Attacks of Foolbox on an accelerated model."""

from __future__ import annotations

from typing import Any

import pytest
from peer_testing import EPS, STEPS, Peers
from torch import Tensor, nn

DESCENT = {"steps": STEPS, "random_start": False}

ATTACKS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "Linf FGSM": ("LinfFastGradientAttack", {}, EPS),
    "L2 FGM": ("L2FastGradientAttack", {}, 0.5),
    "L1 FGM": ("L1FastGradientAttack", {}, 5.0),
    "Linf PGD": ("LinfProjectedGradientDescentAttack", DESCENT, EPS),
    "L2 PGD": ("L2ProjectedGradientDescentAttack", DESCENT, 0.5),
    "L1 PGD": ("L1ProjectedGradientDescentAttack", DESCENT, 5.0),
    "Linf Adam PGD": ("LinfAdamProjectedGradientDescentAttack", DESCENT, EPS),
    "L2 Adam PGD": ("L2AdamProjectedGradientDescentAttack", DESCENT, 0.5),
    "L1 Adam PGD": ("L1AdamProjectedGradientDescentAttack", DESCENT, 5.0),
    "Linf BIM": ("LinfBasicIterativeAttack", DESCENT, EPS),
    "L2 BIM": ("L2BasicIterativeAttack", DESCENT, 0.5),
    "L1 BIM": ("L1BasicIterativeAttack", DESCENT, 5.0),
    "Linf MI-FGSM": ("LinfMomentumIterativeFastGradientMethod", DESCENT, EPS),
    "L2 MI-FGSM": ("L2MomentumIterativeFastGradientMethod", DESCENT, 0.5),
    "L1 MI-FGSM": ("L1MomentumIterativeFastGradientMethod", DESCENT, 5.0),
    "sparse L1 descent": ("SparseL1DescentAttack", {**DESCENT, "quantile": 0.9}, 5.0),
    "virtual adversarial": ("VirtualAdversarialAttack", {"steps": STEPS, "xi": 0.1}, 0.5),
    "DDN": ("DDNAttack", {"steps": STEPS}, None),
    "L2 DeepFool": ("L2DeepFoolAttack", {"steps": STEPS}, None),
    "Linf DeepFool": ("LinfDeepFoolAttack", {"steps": STEPS}, None),
    "CW": ("L2CarliniWagnerAttack", {"steps": STEPS, "binary_search_steps": 2}, None),
    "EAD": ("EADAttack", {"steps": STEPS, "binary_search_steps": 2, "initial_const": 10.0}, None),
    "NewtonFool": ("NewtonFoolAttack", {"steps": STEPS}, None),
    "L0 FMN": ("L0FMNAttack", {"steps": STEPS}, None),
    "L1 FMN": ("L1FMNAttack", {"steps": STEPS}, None),
    "L2 FMN": ("L2FMNAttack", {"steps": STEPS}, None),
    "Linf FMN": ("LInfFMNAttack", {"steps": STEPS}, None),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_foolbox(peers: Peers, name: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    kind, settings, eps = ATTACKS[name]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found, _, _ = getattr(foolbox.attacks, kind)(**settings)(wrapped, x, y, epsilons=eps)
        return found  # type: ignore[no-any-return]

    peers.check(attack)
