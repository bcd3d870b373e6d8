"""Attacks of other libraries find the same on an accelerated model as on the eager one, and leave its weights alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradprune
from gradprune.workloads.vision import let_torchvision_import

pytestmark = pytest.mark.usefixtures("no_code")

EPS, STEPS, CLASSES = 0.1, 4, 5


def network() -> nn.Sequential:
    """A small network without kinks, so that rounding moves no sample to the other side of one."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ELU())
    model = nn.Sequential(first, nn.Conv2d(6, 6, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(96, CLASSES)).eval()
    nn.init.normal_(model[0][1].running_mean)  # type: ignore[index, arg-type]
    return model


def images() -> tuple[Tensor, Tensor]:
    """Images and what the network reads in them."""
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, network()(x).argmax(1)


def check(attack: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    """Run an attack on both, and compare."""
    x, y = images()
    model, eager = network(), network()
    fast = gradprune.accelerate(model)
    torch.manual_seed(5)
    expected = attack(eager, x.clone(), y)
    torch.manual_seed(5)
    actual = attack(fast, x.clone(), y)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    assert (actual - x).abs().max() > 1e-4
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    reports = gradprune.reports(fast)
    assert reports
    for report in reports:
        assert report.left_out == []
        assert report.flops["after"]["weight_grad"] == 0


# --- Torchattacks -----------------------------------------------------------------------------------------------------

TORCHATTACKS: dict[str, dict[str, Any]] = {
    "FGSM": {"eps": EPS},
    "BIM": {"eps": EPS, "steps": STEPS},
    "RFGSM": {"eps": EPS, "steps": STEPS},
    "PGD": {"eps": EPS, "alpha": 0.03, "steps": STEPS},
    "PGDL2": {"eps": 0.5, "alpha": 0.2, "steps": STEPS},
    "TPGD": {"eps": EPS, "alpha": 0.03, "steps": STEPS},
    "FFGSM": {"eps": EPS},
    "MIFGSM": {"eps": EPS, "steps": STEPS},
    "NIFGSM": {"eps": EPS, "steps": STEPS},
    "SINIFGSM": {"eps": EPS, "steps": STEPS},
    "VMIFGSM": {"eps": EPS, "steps": STEPS},
    "UPGD": {"eps": EPS, "alpha": 0.03, "steps": STEPS},
    "Jitter": {"eps": EPS, "alpha": 0.03, "steps": STEPS},
    "CW": {"steps": STEPS, "lr": 0.05, "c": 10},
    "DeepFool": {"steps": STEPS},
    "SparseFool": {"steps": 2},
}


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_torchattacks(name: str) -> None:
    let_torchvision_import()
    torchattacks = pytest.importorskip("torchattacks")
    check(lambda model, x, y: getattr(torchattacks, name)(model, **TORCHATTACKS[name])(x, y))


# --- Foolbox ----------------------------------------------------------------------------------------------------------

FOOLBOX: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "PGD": ("LinfPGD", {"steps": STEPS, "random_start": False}, EPS),
    "L2 PGD": ("L2PGD", {"steps": STEPS, "random_start": False}, 0.5),
    "FGM": ("L2FastGradientAttack", {}, 0.5),
    "DDN": ("DDNAttack", {"steps": STEPS}, None),
    "DeepFool": ("L2DeepFoolAttack", {"steps": STEPS}, None),
    "CW": ("L2CarliniWagnerAttack", {"steps": STEPS, "binary_search_steps": 2}, None),
}


@pytest.mark.parametrize("name", FOOLBOX)
def test_foolbox(name: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    kind, settings, eps = FOOLBOX[name]

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        found, _, _ = getattr(foolbox.attacks, kind)(**settings)(wrapped, x, y, epsilons=eps)
        return found  # type: ignore[no-any-return]

    check(attack)
