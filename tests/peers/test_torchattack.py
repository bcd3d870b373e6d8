"""Attacks of torchattack (not Torchattacks) on an accelerated model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_testing import CLASSES, EPS, STEPS, Peers, network_with_relus

BALL = {"eps": EPS, "steps": STEPS}

ATTACKS: dict[str, dict[str, Any]] = {
    "Admix": {**BALL, "num_classes": CLASSES},
    "BSR": {**BALL, "num_scale": 2},
    "DeCoWA": {**BALL, "num_warping": 2},
    "DeepFool": {"steps": STEPS, "num_classes": CLASSES},
    "DIFGSM": {**BALL, "resize_rate": 0.75},
    "FGSM": {"eps": EPS},
    "GRA": {**BALL, "num_neighbors": 2},
    "IFGSM": BALL,
    "MIFGSM": BALL,
    "MIG": {**BALL, "s_factor": 3},
    "NIFGSM": BALL,
    "PGD": BALL,
    "PGDL2": {"eps": 0.5, "steps": STEPS},
    "SINIFGSM": BALL,
    "TIFGSM": {**BALL, "kern_len": 3},
    "VMIFGSM": BALL,
    "VNIFGSM": BALL,
}

FEATURES = {**BALL, "feature_layer_cfg": "1"}
WITH_HOOKS: dict[str, dict[str, Any]] = {
    "BFA": {**FEATURES, "num_ens": 3, "eta": 2, "num_classes": CLASSES},
    "DANAA": {**FEATURES, "num_ens": 3},
    "DR": FEATURES,
    "FDA": BALL,
    "FIA": {**FEATURES, "num_ens": 3},
    "ILPD": FEATURES,
    "NAA": {**FEATURES, "num_ens": 3},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_torchattack(peers: Peers, name: str) -> None:
    torchattack = pytest.importorskip("torchattack")
    cpu = torch.device("cpu")
    peers.check(lambda model, x, y: getattr(torchattack, name)(model, device=cpu, **ATTACKS[name])(x, y))


@pytest.mark.parametrize("name", WITH_HOOKS)
def test_attacks_with_hooks(name: str) -> None:
    torchattack = pytest.importorskip("torchattack")
    cpu = torch.device("cpu")
    Peers.of(network_with_relus()).check_eager(
        lambda model, x, y: getattr(torchattack, name)(model, device=cpu, **WITH_HOOKS[name])(x, y), "has a hook on"
    )
