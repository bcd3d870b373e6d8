"""What a step computes once per attack is that of the weights as they are, also where a GPU is told and does it later.

``tests/compiler/test_freshness.py`` has every route by which weights change; here are those that differ on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_testing import Network, Subject, error, images, new_steps, without_buffers
from torch import nn

import gradprune

CHANGE = 0.02
"""How much a change of the weights changes the gradient at least."""

Change = Callable[[nn.Module], None]


def by_optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Change:
    def change(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer = kind(model.parameters(), lr=0.1, **options)
        optimizer.step()
        optimizer.zero_grad()

    return change


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: 1.3 * value + 0.1 for name, value in model.state_dict().items()})


def statistics(model: nn.Module) -> None:
    """Batch norm in training mode writes its buffers and advances no counter."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(5 + 3 * torch.randn(8, 3, 8, 8, device=next(model.parameters()).device))
    model.eval()


def through_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def invalidated(model: nn.Module) -> None:
    through_data(model)
    gradprune.invalidate(model)


NOTICED: dict[str, Change] = {
    "SGD foreach": by_optimizer(torch.optim.SGD, foreach=True),
    "SGD fused": by_optimizer(torch.optim.SGD, fused=True),
    "Adam fused": by_optimizer(torch.optim.Adam, fused=True),
    "Adam foreach": by_optimizer(torch.optim.Adam, foreach=True),
    "in place": in_place,
    "load_state_dict": loaded,
    "statistics": statistics,
    "invalidate": invalidated,
}


def check(subject: Subject, change: Change, *, in_mid_attack: bool) -> None:
    """The first step after a change gives what eager gives, and so do the next ones."""
    x_adv, x, y = images(next(subject.model.parameters()).device)
    start = x_adv
    for _ in range(2):
        x_adv, _ = subject(x_adv, x, y)
    x_adv = x_adv if in_mid_attack else start
    before = subject.eager(x_adv, x, y)[1]
    change(subject.model)
    assert error(subject.eager(x_adv, x, y)[1], before) > CHANGE, "the change is too small to be seen"
    for _ in range(3):
        x_adv, _ = subject(x_adv, x, y)


@pytest.mark.parametrize("in_mid_attack", [True, False], ids=["in mid-attack", "between attacks"])
@pytest.mark.parametrize("route", NOTICED)
def test_change_is_noticed(route: str, in_mid_attack: bool, device: torch.device):
    check(Subject(Network().to(device)), NOTICED[route], in_mid_attack=in_mid_attack)


def test_write_through_data_is_noticed_between_attacks(device: torch.device):
    check(Subject(Network().to(device)), through_data, in_mid_attack=False)


def test_training_between_attacks(device: torch.device):
    """The loop of adversarial training: an attack, an update, an attack, with gradients of weights in between."""
    model = Network().to(device)
    subject = Subject(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start, x, y = images(device)
    for _ in range(4):
        x_adv = start
        for _ in range(3):
            x_adv, _ = subject(x_adv, x, y)
        model.train()
        F.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()


def test_the_prologue_runs_once_per_attack_and_once_per_change(device: torch.device):
    with new_steps() as steps:
        subject = Subject(without_buffers().to(device))
        start, x, y = images(device)
        x_adv, _ = subject(start, x, y)
    (step,) = steps
    for _ in range(4):
        x_adv, _ = subject(x_adv, x, y)
    assert step.refreshes == 1
    in_place(subject.model)
    for _ in range(4):
        x_adv, _ = subject(x_adv, x, y)
    assert step.refreshes == 2


def test_accelerated_model_reads_the_weights_as_they_are(device: torch.device):
    model = Network().to(device)
    accelerated, reference = gradprune.accelerate(model), copy.deepcopy(model)
    _, x, y = images(device)
    for route in ("in place", "SGD fused", "statistics"):
        gradients = []
        for one in (accelerated, reference):
            x = x.detach().requires_grad_(True)
            F.cross_entropy(one(x), y).backward()
            gradients.append(x.grad)
        assert error(*gradients) < 1e-4
        assert all(parameter.grad is None for parameter in model.parameters())
        reference.zero_grad()
        NOTICED[route](model)
        reference.load_state_dict(model.state_dict())
