"""What tests of other libraries share: a network as it is and accelerated, and what must hold of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers import ModelState
from torch import Tensor, nn

import gradprune

EPS, STEPS, CLASSES = 0.1, 4, 10

Attack = Callable[[nn.Module, Tensor, Tensor], Any]
"""Takes a model, images and labels, and returns examples or attributions: one tensor or several."""


class InFloat64(nn.Module):
    """Layers that compute in float64 between float32 and float32, so that rounding changes the sign of no gradient."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x.double())
        return output.float()


def network() -> nn.Module:
    """A small network without kinks, so that rounding moves no sample to the other side of one."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ELU())
    model = nn.Sequential(first, nn.Conv2d(6, 6, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(96, CLASSES)).eval()
    nn.init.normal_(model[0][1].running_mean)  # type: ignore[index, arg-type]
    return InFloat64(*model).eval()


def network_with_relus() -> nn.Module:
    """A small network of the layers that attributions have rules for."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(24, CLASSES)).eval()


@dataclass
class Peers:
    """A model and what it has become.

    Attributes:
        eager: The model, in eager mode.
        model: An equal one.
        fast: ``model``, accelerated.
        x: Images.
        y: What the model reads in them.
    """

    eager: nn.Module
    model: nn.Module
    fast: nn.Module
    x: Tensor
    y: Tensor

    @staticmethod
    def of(model: nn.Module, size: int = 8) -> Peers:
        """A model, and images for it."""
        x = torch.rand(6, 3, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y = model(x).argmax(1)
        return Peers(copy.deepcopy(model), model, gradprune.accelerate(model), x, y)

    def check(self, attack: Attack, least: float = 1e-4, rtol: float = 1e-3, atol: float = 1e-4) -> None:
        """Run an attack on both models: the results are equal, the weights left alone, and none has a gradient.

        Args:
            attack: What is run.
            least: How far the examples, or attributions, are from the images at least.
            rtol: Relative tolerance.
            atol: Absolute tolerance.
        """
        self._compare(attack, least, rtol, atol)
        reports = gradprune.reports(self.fast)
        assert any(report.fallback_kind is None for report in reports)
        for report in reports:
            assert report.left_out == []
            assert report.flops["after"]["weight_grad"] == 0

    def check_eager(self, attack: Attack, reason: str, least: float = 1e-4, atol: float = 1e-4) -> None:
        """The same of one that keeps the model from being compiled, which has to be said."""
        self._compare(attack, least, 1e-3, atol)
        assert reason in str([(one.left_out, one.fallback_kind) for one in gradprune.reports(self.fast)])

    def _compare(self, attack: Attack, least: float, rtol: float, atol: float) -> None:
        expected = _seeded(attack, self.eager, self.x.clone(), self.y)
        before = ModelState.of(self.model)
        actual = _seeded(attack, self.fast, self.x.clone(), self.y)
        before.assert_untouched(self.model)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
        assert any((one - self.x).abs().max() > least for one in _tensors(actual) if one.shape == self.x.shape) or all(
            one.shape != self.x.shape and one.abs().max() > least for one in _tensors(actual)
        )


def _tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _seeded(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> Any:
    import random

    import numpy

    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    return attack(model, x, y)
