"""Gradients of gradients of an accelerated model, batches of gradients, and transforms."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState
from tiny import images, input_gradient, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")


def penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the norm of a gradient, as attacks on attributions take it."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    return torch.cat([gradient.detach(), second])


def of_an_earlier_value(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The input of the model is no leaf."""
    start = x.clone().requires_grad_()
    value = start.sin()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(value), y), value, create_graph=True)
    (second,) = torch.autograd.grad((gradient * value).sum(), start)
    return second


def hessian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda one: F.cross_entropy(model(one), y[:1]), x[:1, :, :3, :3])


def vectorized_jacobian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return torch.autograd.functional.jacobian(model, x, vectorize=True)


def batched(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    logits = model(x)
    directions = torch.stack([F.one_hot(torch.full((len(x),), one), logits.shape[1]).float() for one in range(3)])
    return torch.autograd.grad(logits, x, directions, is_grads_batched=True)[0]


def functional_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return torch.func.grad(lambda one: F.cross_entropy(model(one), y))(x)


class Smooth(nn.Module):
    """Twice differentiable everywhere, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.softplus(self.norm(self.conv(x))).mean((2, 3)))


class Twice(Smooth):
    """With two outputs, of which one is used."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = super().forward(x)
        return {"logits": logits, "loss": logits.logsumexp(1), "size": x.shape}


WAYS = [penalty, of_an_earlier_value, hessian, vectorized_jacobian, batched, functional_gradient]


@pytest.mark.parametrize("way", WAYS)
def test_values_are_eagers(way: Callable[..., Any], caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model, (_, x, y) = Smooth().eval(), images()
    accelerated, state = gradprune.accelerate(model), ModelState.of(model)
    expected = way(copy.deepcopy(model), x, y % 5)
    for _ in range(2):
        torch.testing.assert_close(way(accelerated, x, y % 5), expected)
    state.assert_untouched(model)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said
    assert len(set(said)) == len(said)
    assert all("not compiled, runs eagerly" in one for one in said)


def test_plain_gradients_stay_compiled(caplog: pytest.LogCaptureFixture):
    model, (_, x, y) = network(), images()
    accelerated = gradprune.accelerate(model)
    expected = input_gradient(copy.deepcopy(model), x, y)
    torch.testing.assert_close(input_gradient(accelerated, x, y), expected)
    penalty(accelerated, x, y)
    torch.testing.assert_close(input_gradient(accelerated, x, y), expected)
    assert sum("create_graph=True" in record.getMessage() for record in caplog.records) == 1
    assert any("create_graph=True" in reason for report in gradprune.reports(accelerated) for reason in report.left_out)


def test_outputs_that_are_not_used():
    torch.manual_seed(0)
    model, (_, x, y) = Twice().eval(), images()

    def chosen(twice: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda one: twice(one)["logits"]

    accelerated = gradprune.accelerate(model)
    torch.testing.assert_close(
        penalty(chosen(accelerated), x, y % 5),  # type: ignore[arg-type]
        penalty(chosen(model), x, y % 5),  # type: ignore[arg-type]
    )
    assert accelerated(x)["size"] == x.shape


def test_marked_perturbation():
    """A patch is a parameter of the model, and its gradient is differentiated."""

    class Patched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Smooth()
            self.patch = nn.Parameter(torch.rand(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x + self.patch)

    torch.manual_seed(0)
    model = Patched().eval()
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])

    def second(patched: nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(F.cross_entropy(patched(x), y), model.patch, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), model.patch)[0]

    expected = second(model)
    gradprune.perturbation(model.patch)
    torch.testing.assert_close(second(gradprune.accelerate(model)), expected)


def refuses(model: nn.Module) -> None:
    with pytest.raises(gradprune.DoubleBackwardError, match="Compile the whole step"):
        penalty(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))


def test_random_numbers_are_refused():
    torch.manual_seed(0)
    refuses(
        gradprune.accelerate(nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Dropout(), nn.Linear(64, 5)))
    )


def test_statistics_are_not_updated_twice():
    model = Smooth().train()
    refuses(gradprune.accelerate(model))
    assert int(model.norm.num_batches_tracked) == 1


def test_a_source_that_nobody_sees_is_refused():
    """The second run cannot pass a gradient to what is no input, nor a parameter."""

    class Holds(Smooth):
        delta = torch.zeros(3, 8, 8, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.delta)

    refuses(gradprune.accelerate(Holds().eval()))


def test_weights_changed_in_between_are_refused():
    model = Smooth().eval()
    accelerated = gradprune.accelerate(model)
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    loss = accelerated(x).square().sum()
    with torch.no_grad():
        model.last.weight.mul_(2)
    with pytest.raises(gradprune.DoubleBackwardError):
        torch.autograd.grad(loss, x, create_graph=True)
