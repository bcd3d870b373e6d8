"""Attacks and their runtime on a GPU, beside the same ones run eagerly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_testing import Network, error, images
from helpers import ModelState
from torch import Tensor, nn

import gradprune
from gradprune.attacks import APGD, FAB, PGD, Runtime, Square
from gradprune.attacks.base import Attack
from gradprune.runtime import measured

EAGER = Runtime(compile=False)

SAME = 0.99
"""Share of the values that have to be the same: where a gradient is zero but for rounding, its sign is anything."""

ATTACKS = (
    PGD(eps=0.1, step_size=0.02, steps=6, seed=0),
    PGD(norm="l2", eps=0.5, step_size=0.1, steps=6, seed=0),
    APGD(eps=0.1, steps=6, seed=0),
    Square(eps=0.1, queries=20, seed=0),
)


def network(device: torch.device) -> nn.Module:
    return Network().to(device)


def labelled(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and what the model takes them for."""
    x = images(device, 16)[1]
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name} {attack.norm}")
def test_examples_are_those_of_eager(attack: Attack, device: torch.device):
    model = network(device)
    x, y = labelled(model, device)
    state = ModelState.of(model)
    expected, found = attack(model, x, y, runtime=EAGER), attack(model, x, y)
    state.assert_untouched(model)
    assert found.device == x.device
    assert ((found - expected).abs() < 1e-3).double().mean() >= SAME


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_fab_finds_as_small_perturbations_as_eager(norm: str, device: torch.device):
    """Projections sort and search; distances are compared, for there may be several closest points."""
    model = network(device)
    x, y = labelled(model, device)
    attack = FAB(norm=norm, eps=None, steps=10, targets=3, seed=0)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    sizes, fooled = [], torch.ones(len(x), dtype=torch.bool, device=device)
    for runtime in (EAGER, Runtime()):
        found = attack(model, x, y, runtime=runtime)
        with torch.no_grad():
            fooled &= model(found).argmax(1) != y
        sizes.append((found - x).flatten(1).norm(order, dim=1).double())
    assert fooled.double().mean() > 0.9
    assert float((sizes[1] / sizes[0] - 1)[fooled].abs().median()) < 0.02


def test_auto_compiles_what_has_paid(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    model = network(device)
    x, y = labelled(model, device)
    attack = PGD(eps=0.1, step_size=0.02, steps=8, random_start=False)
    expected = attack(model, x, y, runtime=EAGER)
    monkeypatch.setattr(measured, "FIRST_SECONDS", 0.0)
    compiled: list[int] = []
    plain = measured.Measured._compile

    def compile(self: measured.Measured, model: nn.Module, x: Tensor, *others: Tensor) -> None:
        compiled.append(len(x))
        plain(self, model, x, *others)

    monkeypatch.setattr(measured.Measured, "_compile", compile)
    for _ in range(2):
        found = attack(model, x, y, runtime=Runtime(compile="auto"))
        assert ((found - expected).abs() < 1e-3).double().mean() >= SAME
    assert compiled
    assert set(compiled) == {len(x)}


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_keeps_the_perturbation_in_float32(autocast: torch.dtype, device: torch.device):
    model = network(device)
    x, y = labelled(model, device)
    attack = PGD(eps=0.1, step_size=0.02, steps=6, random_start=False)
    found = attack(model, x, y, runtime=Runtime(autocast=autocast))
    assert found.dtype == torch.float32
    assert (found - x).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        assert F.cross_entropy(model(found), y) > F.cross_entropy(model(x), y)


def test_accelerated_model_in_an_attack_of_another_library(device: torch.device):
    """The loop that such libraries have: it calls the model and takes the gradient by ``autograd.grad``."""
    model = network(device)
    accelerated = gradprune.accelerate(model)
    x, y = labelled(model, device)
    found = []
    for one in (model, accelerated):
        x_adv = x.clone()
        for _ in range(4):
            x_adv.requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(one(x_adv), y), x_adv)
            x_adv = (x + (x_adv.detach() + 0.02 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
        found.append(x_adv)
    assert ((found[1] - found[0]).abs() < 1e-3).double().mean() >= SAME
    assert error(found[1], found[0]) < 0.01
