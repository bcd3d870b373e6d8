"""Attacks of Torchattacks on an accelerated model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_testing import CLASSES, EPS, STEPS, Peers, network

import gradprune

PGD = {"eps": EPS, "alpha": 0.03, "steps": STEPS}
SMOOTHED = {"alpha": 0.03, "steps": STEPS, "noise_batch_size": 2, "batch_max": 6}
ELASTIC = {"lr": 0.05, "binary_search_steps": 2, "max_iterations": 10, "initial_const": 10}

ATTACKS: dict[str, dict[str, Any]] = {
    "FGSM": {"eps": EPS},
    "BIM": {"eps": EPS, "steps": STEPS},
    "RFGSM": {"eps": EPS, "steps": STEPS},
    "PGD": PGD,
    "EOTPGD": PGD,
    "FFGSM": {"eps": EPS},
    "TPGD": PGD,
    "MIFGSM": {"eps": EPS, "steps": STEPS},
    "UPGD": PGD,
    "APGD": {"eps": EPS, "steps": STEPS},
    "APGDT": {"eps": EPS, "steps": STEPS, "n_classes": CLASSES},
    "DIFGSM": {**PGD, "resize_rate": 0.75},
    "TIFGSM": {**PGD, "resize_rate": 0.75, "len_kernel": 3},
    "Jitter": PGD,
    "NIFGSM": {"eps": EPS, "steps": STEPS},
    "PGDRS": {"eps": EPS, **SMOOTHED},
    "SINIFGSM": {"eps": EPS, "steps": STEPS},
    "VMIFGSM": {"eps": EPS, "steps": STEPS},
    "VNIFGSM": {"eps": EPS, "steps": STEPS},
    "PIFGSM": {"max_epsilon": EPS, "num_iter_set": STEPS},
    "PIFGSMPP": {"max_epsilon": EPS, "num_iter_set": STEPS},
    "CW": {"steps": STEPS, "lr": 0.05, "c": 10},
    "PGDL2": {"eps": 0.5, "alpha": 0.2, "steps": STEPS},
    "PGDRSL2": {"eps": 0.5, **SMOOTHED},
    "DeepFool": {"steps": STEPS},
    "EADEN": ELASTIC,
    "EADL1": ELASTIC,
    "SparseFool": {"steps": 2},
    "JSMA": {"gamma": 0.1},
    "FAB": {"eps": 0.5, "steps": STEPS, "n_classes": CLASSES},
    "AutoAttack": {"eps": 0.5, "n_classes": CLASSES, "seed": 0},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_torchattacks(peers: Peers, name: str) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    peers.check(lambda model, x, y: getattr(torchattacks, name)(model, **ATTACKS[name])(x, y))


def test_lgv_that_trains_is_named() -> None:
    """It trains the model it is given, which takes the gradients that an accelerated one does not compute."""
    torchattacks = pytest.importorskip("torchattacks")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    attack = torchattacks.LGV(gradprune.accelerate(model), batches, epochs=1, nb_models_epoch=1, verbose=False, eps=EPS)
    with pytest.raises(gradprune.TrainingStepError, match="to train, use the model that was not compiled"):
        attack(*batches[0])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
