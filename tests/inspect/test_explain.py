"""``explain`` says what would happen and makes nothing happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState
from tiny import STEPS, backward_step, images, network
from torch import Tensor, nn

import gradprune


@pytest.mark.parametrize("way", STEPS)
def test_report_is_the_one_of_a_compilation(way: str, no_code: None):
    step = STEPS[way](network(), F.cross_entropy)
    explained = gradprune.explain(step, *images(), strict=True)
    compiled = gradprune.compile(step)
    compiled(*images())
    (report,) = gradprune.reports(compiled)
    assert explained.form == "step"
    assert (explained.ops, explained.flops, explained.saved_bytes) == (report.ops, report.flops, report.saved_bytes)
    assert [record.name for record in explained.passes] == [record.name for record in report.passes]


def test_model():
    report = gradprune.explain(network(), images()[0].requires_grad_(True))
    assert report.form == "model"
    assert report.flops["after"]["weight_grad"] == 0


def test_options_are_followed():
    report = gradprune.explain(backward_step(network()), *images(), exact_order=True, disable=["early-masks"])
    assert [record.name for record in report.passes] == [
        "select-outputs",
        "narrow-outputs",
        "shape-only-operands",
        "hoist-invariants",
    ]


@pytest.mark.parametrize("wrap", [gradprune.compile, gradprune.accelerate], ids=["compiled", "accelerated"])
def test_what_is_compiled_already(wrap: Callable[[nn.Module], Any]):
    report = gradprune.explain(wrap(network()), images()[0].requires_grad_(True))
    assert report.flops["before"]["weight_grad"] > report.flops["after"]["weight_grad"] == 0


def unchanged(*tensors: Tensor) -> Callable[[], None]:
    """A check that tensors have the values and the gradients that they have now."""
    values, gradients = [tensor.detach().clone() for tensor in tensors], [tensor.grad for tensor in tensors]

    def check() -> None:
        for tensor, value, gradient in zip(tensors, values, gradients, strict=True):
            assert torch.equal(tensor, value)
            assert tensor.grad is gradient

    return check


@pytest.mark.parametrize("form", ["step", "model"])
@pytest.mark.parametrize("existing", [False, True], ids=["no gradients", "existing gradients"])
def test_nothing_changes(form: str, existing: bool):
    """Batch norm in training mode would update its statistics, and dropout draw random numbers."""
    model, (x, clean, y) = nn.Sequential(nn.Dropout(), network(training=True)), images()
    leaf = x.clone().requires_grad_(True)
    if existing:
        for tensor in [leaf, *model.parameters()]:
            tensor.grad = torch.ones_like(tensor)
    state, arguments, random_state = ModelState.of(model), unchanged(leaf, clean), torch.get_rng_state()
    if form == "step":
        gradprune.explain(backward_step(model), leaf, clean, y)
    else:
        gradprune.explain(model, leaf)
    state.assert_untouched(model)
    arguments()
    assert torch.equal(torch.get_rng_state(), random_state)


def leaf_step(model: nn.Module, leaf: Tensor) -> Callable[..., Any]:
    """Leaves gradients behind in a tensor that is no argument, and reads a weight's."""

    def step(y: Tensor) -> Any:
        model.zero_grad()
        F.cross_entropy(model(leaf), y).backward()
        return [parameter.grad.norm() for parameter in model.parameters()]

    return step


@pytest.mark.parametrize("existing", [False, True], ids=["no gradients", "existing gradients"])
def test_gradients_that_the_step_would_store_are_not_stored(existing: bool):
    model, (x, _, y) = network(), images()
    leaf = x.clone().requires_grad_(True)
    if existing:
        for tensor in [leaf, *model.parameters()]:
            tensor.grad = torch.ones_like(tensor)
    state, captured = ModelState.of(model), unchanged(leaf)
    report = gradprune.explain(leaf_step(model, leaf), y)
    assert report.skipped
    state.assert_untouched(model)
    captured()


def test_no_kernel_runs():
    """Seen by an operator that counts how often it runs."""
    ran: list[str] = []

    @torch.library.custom_op("gradprune_tests::counted", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        ran.append("forward")
        return x * 2

    counted.register_fake(torch.empty_like)
    counted.register_autograd(lambda ctx, gradient: gradient * 2)

    model = network()

    def attack(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        F.cross_entropy(model(counted(x)), y).backward()
        return x.grad

    x, _, y = images()
    assert gradprune.explain(attack, x, y).ops["after"] > 0
    assert ran == []
    attack(x, y)
    assert ran == ["forward"]


def test_it_may_be_asked_any_number_of_times(no_code: None):
    """Neither it nor a later compilation meets Dynamo's limit of compilations for one function."""
    step = backward_step(network())
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert gradprune.explain(step, *images()).form == "step"
    compiled = gradprune.compile(step)
    compiled(*images())
    assert [report.form for report in gradprune.reports(compiled)] == ["step"]


def test_a_graph_break_shows_the_costliest_graph():
    model = network()

    def step(x: Tensor, y: Tensor) -> Tensor:
        small = x.detach().requires_grad_(True)
        (small * 2).sum().backward()
        print(end="")
        x = (x + small.grad).detach().requires_grad_(True)
        F.cross_entropy(model(x), y).backward()
        return x.grad

    report = gradprune.explain(step, images()[0], images()[2])
    assert report.flops["before"]["forward"] == 2 * 2 * (4 * 16 * 27 + 64 * 5)


def test_symbolic_sizes():
    step = backward_step(network())
    with torch._dynamo.config.patch(assume_static_by_default=False):
        report = gradprune.explain(step, *images())
    assert report.flops["after"] == gradprune.explain(step, *images()).flops["after"]
