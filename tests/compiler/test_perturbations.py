"""Where a perturbation may live: in a buffer, a parameter, an embedding, a variable that is written in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import images, network
from torch import Tensor, nn

import gradprune
from gradprune.compiler.perturbations import is_perturbation

pytestmark = pytest.mark.usefixtures("no_code")

Step = Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]


class Holder(nn.Module):
    """What an attack changes, as state of a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("delta", torch.rand(2, 3, 4, 4) / 10)
        self.patch = nn.Parameter(torch.rand(3, 4, 4) / 10)


def compiled(step: Step, model: nn.Module, holder: nn.Module) -> Callable[[Tensor, Tensor], Any]:
    return torch.compile(lambda x, y: step(model, holder, x, y), backend="gradprune", options={"strict": True})


def of_a_detached_buffer(model: nn.Module, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    delta = holder.delta.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + delta), y), delta)
    return holder.delta + 0.01 * gradient.sign()


def of_a_slice_of_a_buffer(model: nn.Module, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    delta = holder.delta[:1].detach().requires_grad_(True)
    F.cross_entropy(model(x + delta), y).backward()
    assert delta.grad is not None
    return delta.grad


def of_a_copied_parameter(model: nn.Module, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    patch = holder.patch.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x + patch), y), patch)
    return gradient


@pytest.mark.parametrize("step", [of_a_detached_buffer, of_a_slice_of_a_buffer, of_a_copied_parameter])
def test_a_leaf_made_of_module_state_is_a_perturbation(step: Step):
    model, holder, (_, x, y) = network(), Holder(), images()
    attacked = compiled(step, model, holder)
    for _ in range(2):
        torch.testing.assert_close(attacked(x, y), step(network(), holder, x, y), rtol=1e-5, atol=1e-6)
        with torch.no_grad():  # it changes from step to step
            holder.delta.add_(0.1)
            holder.patch.add_(0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert gradprune.reports(attacked)[0].flops["after"]["weight_grad"] == 0


def by_backward(model: nn.Module, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x + holder.patch), y)
    loss.backward()
    return loss.detach()


def beside_an_input(model: nn.Module, holder: Any, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    F.cross_entropy(model(x + holder.patch), y).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("step", [by_backward, beside_an_input])
@pytest.mark.parametrize("marked", ["parameter", "module"])
def test_a_marked_parameter_gets_its_gradient(step: Step, marked: str):
    model, holder, (_, x, y) = network(), Holder(), images()
    other = copy.deepcopy(holder)
    target = holder if marked == "module" else holder.patch
    assert gradprune.perturbation(target) is target
    attacked = compiled(step, model, holder)
    for _ in range(2):
        torch.testing.assert_close(attacked(x, y), step(network(), other, x, y), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(holder.patch.grad, other.patch.grad, rtol=1e-5, atol=1e-6)  # it adds up, as in eager
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_frozen_beside_frozen_weights_is_a_perturbation():
    model, holder, (_, x, y) = network().requires_grad_(False), Holder(), images()
    other = copy.deepcopy(holder)
    torch.testing.assert_close(
        compiled(by_backward, model, holder)(x, y), by_backward(network(), other, x, y), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(holder.patch.grad, other.patch.grad, rtol=1e-5, atol=1e-6)


def test_an_unmarked_parameter_is_refused_by_the_call_to_make():
    model, holder, (_, x, y) = network(), Holder(), images()
    with pytest.raises(gradprune.TrainingStepError, match=r"gradprune\.perturbation\(parameter_or_module\)"):
        compiled(by_backward, model, holder)(x, y)
    assert holder.patch.grad is None


def test_marking_compiles_again():
    model, holder, (_, x, y) = network(), Holder(), images()
    attacked = compiled(beside_an_input, model, holder)
    attacked(x, y)
    assert holder.patch.grad is None
    gradprune.perturbation(holder.patch)
    attacked(x, y)
    assert holder.patch.grad is not None


def test_only_tensors_and_modules_are_marked():
    with pytest.raises(TypeError, match="not str"):
        gradprune.perturbation("patch")  # type: ignore[type-var]
    model = network()
    gradprune.perturbation(model[0].weight)
    assert [is_perturbation(parameter) for parameter in model.parameters()][:2] == [True, False]


# --- Text -------------------------------------------------------------------------------------------------------------


class Text(nn.Module):
    """A model of integer ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.linear = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.layer(self.embedding(ids)).tanh().mean(1))


IDS, LABELS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([0, 1])


def at_the_weight(text: Text, model: nn.Module) -> Tensor:
    F.cross_entropy(model(IDS), LABELS).backward()
    assert text.embedding.weight.grad is not None
    return text.embedding.weight.grad


def at_the_output(text: Text, model: nn.Module) -> Tensor:
    kept: list[Tensor] = []
    text.embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    return torch.autograd.grad(F.cross_entropy(model(IDS), LABELS), kept[0])[0]


def at_a_retained_output(text: Text, model: nn.Module) -> Tensor:
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    text.embedding.register_forward_hook(keep)
    F.cross_entropy(model(IDS), LABELS).backward()
    assert kept[0].grad is not None
    return kept[0].grad


TEXT = [at_the_weight, at_the_output, at_a_retained_output]


@pytest.mark.parametrize("attack", TEXT)
def test_gradients_of_an_embedding(attack: Callable[[Text, nn.Module], Tensor]):
    eager, text = Text().eval(), Text().eval()
    gradprune.perturbation(text.embedding)
    expected, actual = attack(eager, eager), attack(text, gradprune.accelerate(text))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    others = [parameter for name, parameter in text.named_parameters() if "embedding" not in name]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in others)


@pytest.mark.parametrize("attack", [at_the_weight, at_a_retained_output])
def test_an_unmarked_embedding_is_refused_by_the_call_to_make(attack: Callable[[Text, nn.Module], Tensor]):
    text = Text().eval()
    with pytest.raises(gradprune.TrainingStepError, match=r"gradprune\.perturbation\("):
        attack(text, gradprune.accelerate(text))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in text.parameters())


# --- Variables that are written in place ------------------------------------------------------------------------------


def added_in_place(model: nn.Module, delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    F.cross_entropy(model(x + delta), y).backward()
    with torch.no_grad():
        delta.add_(0.01 * delta.grad.sign())  # type: ignore[union-attr]
    delta.grad.zero_()  # type: ignore[union-attr]
    return delta


def zeroed_behind(model: nn.Module, delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    F.cross_entropy(model(x + delta), y).backward()
    with torch.no_grad():
        delta += 0.01 * delta.grad.sign()  # type: ignore[union-attr]
    if delta.grad is not None:
        delta.grad.zero_()
    return delta


def forgotten_behind(model: nn.Module, delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    F.cross_entropy(model(x + delta), y).backward()
    with torch.no_grad():
        delta -= 0.01 * delta.grad.sign()  # type: ignore[union-attr]
    if delta.grad is not None:
        delta.grad = None
    return delta


def test_a_method_in_place_is_right():
    model, (_, x, y) = network(), images()
    one, other = torch.zeros_like(x, requires_grad=True), torch.zeros_like(x, requires_grad=True)
    step = torch.compile(added_in_place, backend="gradprune")
    for _ in range(3):
        step(model, one, x, y), added_in_place(network(), other, x, y)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("step", [zeroed_behind, forgotten_behind])
def test_a_gradient_that_dynamo_would_lose_is_refused(step: Callable[..., Tensor]):
    model, (_, x, y) = network(), images()
    delta = torch.zeros_like(x, requires_grad=True)
    with pytest.raises(gradprune.CompileError, match=r"Write delta\.add_\(\.\.\.\)"):
        torch.compile(step, backend="gradprune")(model, delta, x, y)
    assert not delta.any()
    assert delta.grad is None
