"""Attacks of CleverHans on an accelerated model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from peer_testing import CLASSES, EPS, STEPS, Peers
from torch import Tensor, nn

INF = float("inf")
BOX = {"clip_min": 0.0, "clip_max": 1.0}

ATTACKS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "FGM Linf": ("fast_gradient_method", (EPS, INF), BOX),
    "FGM L2": ("fast_gradient_method", (0.5, 2), BOX),
    "FGM L1": ("fast_gradient_method", (5.0, 1), BOX),
    "PGD Linf": ("projected_gradient_descent", (EPS, 0.03, STEPS, INF), {**BOX, "sanity_checks": False}),
    "PGD L2": ("projected_gradient_descent", (0.5, 0.2, STEPS, 2), {**BOX, "sanity_checks": False}),
    "CW": ("carlini_wagner_l2", (CLASSES,), {"lr": 0.05, "binary_search_steps": 2, "max_iterations": 10}),
    "sparse L1 descent": ("sparse_l1_descent", (), {"eps": 5.0, "nb_iter": STEPS, "grad_sparsity": 90}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_cleverhans(peers: Peers, name: str) -> None:
    pytest.importorskip("cleverhans")
    kind, positional, settings = ATTACKS[name]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        function = getattr(importlib.import_module(f"cleverhans.torch.attacks.{kind}"), kind)
        return function(model, x, *positional, y=y, **settings)  # type: ignore[no-any-return]

    peers.check(attack)
