"""Nobody trains into the void: an optimizer that waits for a dropped gradient is told, or gets it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import images, network
from torch import Tensor, nn

import gradprune
from gradprune.compiler import dropped

pytestmark = pytest.mark.usefixtures("no_code")


@pytest.fixture(autouse=True)
def untold() -> Iterator[None]:
    dropped._told.clear()
    yield
    dropped._told.clear()


def states(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


# --- Optimizers inside of a step --------------------------------------------------------------------------------------


def free_step(model: nn.Module, optimizer: torch.optim.Optimizer, noise: Tensor) -> Tensor:
    """Free adversarial training (Shafahi et al. 2019): one backward pass for noise and weights."""
    _, x, y = images()
    n = noise.detach().requires_grad_(True)
    optimizer.zero_grad()
    F.cross_entropy(model(x + n), y).backward()
    optimizer.step()
    assert n.grad is not None
    return (noise + 0.1 * n.grad.sign()).clamp(-0.1, 0.1)


def free_step_that_zeroes_at_last(model: nn.Module, optimizer: torch.optim.Optimizer, noise: Tensor) -> Tensor:
    _, x, y = images()
    n = noise.detach().requires_grad_(True)
    loss = F.cross_entropy(model(x + n), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert n.grad is not None
    return (noise + 0.1 * n.grad.sign()).clamp(-0.1, 0.1)


class Trainer:
    """An optimizer that is an attribute."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, noise: Tensor) -> Tensor:
        _, x, y = images()
        n = noise.detach().requires_grad_(True)
        F.cross_entropy(self.model(x + n), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert n.grad is not None
        return noise + 0.1 * n.grad.sign()


Make = Callable[[nn.Module, torch.optim.Optimizer], Callable[[Tensor], Tensor]]
FREE: dict[str, Make] = {
    "argument": lambda model, optimizer: lambda noise: free_step(model, optimizer, noise),
    "zeroed at last": lambda model, optimizer: lambda noise: free_step_that_zeroes_at_last(model, optimizer, noise),
    "attribute": lambda model, optimizer: Trainer(model, optimizer).step,
}


@pytest.mark.parametrize("make", FREE)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_in_the_step_works(make: str, kind: Any):
    ran = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="gradprune")):
        model = network()
        step = wrap(FREE[make](model, kind(model.parameters(), lr=0.05)))
        noise = torch.zeros_like(images()[1])
        for _ in range(3):
            noise = step(noise)
        ran.append([noise, *states(model)])
    before = states(network())
    for expected, actual in zip(*ran, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(now, then) for now, then in zip(ran[1][1:], before, strict=True))


# --- Optimizers outside -----------------------------------------------------------------------------------------------


def through_a_step(model: nn.Module) -> None:
    def attack(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        assert x.grad is not None
        return x.grad

    _, x, y = images()
    torch.compile(attack, backend="gradprune")(x, y)


def through_an_accelerated_model(model: nn.Module) -> None:
    _, x, y = images()
    F.cross_entropy(gradprune.accelerate(model)(x.clone().requires_grad_(True)), y).backward()


@pytest.mark.parametrize("attack", [through_a_step, through_an_accelerated_model])
def test_an_optimizer_that_waits_for_a_dropped_gradient_is_told_once(attack: Callable[[nn.Module], None]):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attack(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1
    assert "its gradient is None" in str(caught[0].message)
    assert "gradprune.perturbation(" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("attack", [through_a_step, through_an_accelerated_model])
def test_training_beside_an_attack_is_not_warned_of(attack: Callable[[nn.Module], None]):
    model, (_, x, y) = network(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            attack(model)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


# --- Several passes ---------------------------------------------------------------------------------------------------


def trades(model: nn.Module, x: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(model(x + 0.01), 1), F.softmax(model(x.detach()), 1), reduction="batchmean")


def features(model: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(model(x.detach() * 0.5), model(x + 0.1))


def clean_first(model: nn.Module, x: Tensor) -> Tensor:
    clean = model(x.detach())
    return (model(x) * clean).sum() + clean.square().mean()


@pytest.mark.parametrize("loss", [trades, features, clean_first])
@pytest.mark.parametrize("wrap", [gradprune.accelerate, lambda model: torch.compile(model, backend="gradprune")])
def test_one_backward_over_passes_of_which_one_needs_no_gradient(loss: Any, wrap: Any):
    model, _, x = network(), *images()[:2]
    given, expected = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    loss(network(), expected).backward()
    loss(wrap(model), given).backward()
    torch.testing.assert_close(given.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [gradprune.accelerate, lambda model: torch.compile(model, backend="gradprune")])
def test_training_through_it_is_refused(wrap: Any):
    model, (_, x, y) = network(), images()
    for _ in range(2):
        with pytest.raises(gradprune.TrainingStepError, match="no input of the model requires grad"):
            F.cross_entropy(wrap(model)(x), y).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_of_a_weight_is_refused_by_an_accelerated_model():
    model, (_, x, y) = network(), images()
    loss = F.cross_entropy(gradprune.accelerate(model)(x.clone().requires_grad_(True)), y)
    with pytest.raises(gradprune.WeightGradientError, match="asked for explicitly"):
        torch.autograd.grad(loss, model[0].weight)
