"""Robust accuracy in one call."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gradprune.attacks import AutoAttack
from gradprune.errors import AttackError, OptionError
from gradprune.evaluation import benchmark
from gradprune.runtime import Runtime

EAGER = Runtime(compile=False)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize(("threat_model", "eps"), [("Linf", 0.01), ("L2", 0.1), ("L1", 0.5)])
def test_is_what_auto_attack_leaves(
    network: nn.Module, threat_model: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = functools.partial(AutoAttack, steps=3, queries=20)
    monkeypatch.setattr("gradprune.evaluation.robust_accuracy.AutoAttack", short)
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = network(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    clean, robust = benchmark(network, x, y, threat_model, eps, batch_size=12, runtime=EAGER)
    attacked = short(norm=threat_model.lower(), eps=eps, seed=0)(network, x, y, runtime=EAGER)
    assert clean == 11 / 12
    assert robust == (network(attacked).argmax(1) == y).sum() / 12
    assert 0 < robust < clean
    assert network.training
    assert benchmark(network, x, y, threat_model, eps, batch_size=5, runtime=EAGER)[0] == clean


def test_what_cannot_be_measured_is_refused(network: nn.Module) -> None:
    x, y = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(OptionError, match="threat model 'corruptions'"):
        benchmark(network, x, y, "corruptions")
    with pytest.raises(OptionError, match="no images"):
        benchmark(network, x[:0], y[:0])
    with pytest.raises(AttackError, match="within the bounds"):
        benchmark(network, 255 * x, y)
    with pytest.raises(AttackError, match="labels have to be int64"):
        benchmark(network, x, y.float())
