"""Attacks of adv-lib on an accelerated model."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from peer_testing import CLASSES, EPS, STEPS, Peers
from torch import Tensor, nn

INF = float("inf")
# The library looks for its init_lr_distance in steps of its own; given, a few steps are enough.
LAGRANGIAN = {"num_steps": STEPS, "init_lr_distance": 0.5}

ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ALMA": ("alma", LAGRANGIAN),
    "APGD Linf": ("apgd", {"eps": EPS, "norm": INF, "n_iter": STEPS}),
    "APGD L2": ("apgd", {"eps": 0.5, "norm": 2, "n_iter": STEPS}),
    "APGD L1": ("apgd", {"eps": 5.0, "norm": 1, "n_iter": STEPS}),
    "targeted APGD": ("apgd_targeted", {"eps": EPS, "norm": INF, "n_iter": STEPS, "num_targets": 2}),
    "CW L2": ("carlini_wagner_l2", {"learning_rate": 0.05, "binary_search_steps": 2, "max_iterations": 10}),
    "CW Linf": ("carlini_wagner_linf", {"learning_rate": 0.05, "max_iterations": 10, "initial_const": 1.0}),
    "DDN": ("ddn", {"steps": STEPS}),
    "DeepFool L2": ("df", {"steps": STEPS}),
    "DeepFool Linf": ("df", {"steps": STEPS, "norm": INF}),
    "SuperDeepFool": ("sdf", {"steps": STEPS}),
    "FAB Linf": ("fab", {"norm": INF, "n_iter": STEPS}),
    "FAB L2": ("fab", {"norm": 2, "n_iter": STEPS}),
    "FAB L1": ("fab", {"norm": 1, "n_iter": STEPS}),
    "FMN L0": ("fmn", {"norm": 0, "steps": STEPS}),
    "FMN L1": ("fmn", {"norm": 1, "steps": STEPS}),
    "FMN L2": ("fmn", {"norm": 2, "steps": STEPS}),
    "FMN Linf": ("fmn", {"norm": INF, "steps": STEPS}),
    "PDGD": ("pdgd", {"num_steps": 10}),
    "PDPGD L1": ("pdpgd", {"norm": 1, "num_steps": 10}),
    "PDPGD L2": ("pdpgd", {"norm": 2, "num_steps": 10}),
    "PDPGD Linf": ("pdpgd", {"norm": INF, "num_steps": 10}),
    "PerC-AL": ("perc_al", {"num_classes": CLASSES, "max_iterations": STEPS}),
    "PGD": ("pgd_linf", {"ε": EPS, "steps": STEPS}),
    "σ-zero": ("sigma_zero", {"num_steps": STEPS}),
    "FGA": ("fga", {"targeted": False, "max_iter": STEPS}),
    "VFGA": ("vfga", {"targeted": False, "max_iter": STEPS}),
    "trust region L2": ("tr", {"iter": STEPS}),
    "trust region Linf": ("tr", {"iter": STEPS, "p": INF}),
}


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """adv-lib imports visdom, which it plots with if asked to and which recent versions of setuptools do not build."""
    monkeypatch.setitem(sys.modules, "visdom", ModuleType("visdom"))


@pytest.mark.parametrize("name", ATTACKS)
def test_adv_lib(peers: Peers, name: str) -> None:
    attacks = pytest.importorskip("adv_lib.attacks")
    kind, settings = ATTACKS[name]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return getattr(attacks, kind)(model, x, y, **settings)  # type: ignore[no-any-return]

    peers.check(attack)
