"""Every network of the zoo, attacked in every way: the gradient is eager's, and nothing else about the model changes.

In float64 the compiled graphs are run operator by operator, so that what is compared with eager autograd, to 1e-12, is
what the passes made of them. In float32 they go through Inductor, and are held against the float64 gradient: eager
float32 is no reference, since it is wrong by as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import (
    ModelState,
    Step,
    eager_flops,
    interpreted,
    relative_error,
    step_by_autograd_grad,
    step_by_backward,
    step_by_func_grad,
    update,
)
from torch import nn
from zoo import ZOO, Network

import gradprune


@dataclass(frozen=True)
class Way:
    """A way to take the gradient.

    Attributes:
        name: What the user writes.
        make_step: Makes the step from a model and a loss.
        compiles: What gradprune compiles: the step, or the model with an eager step around it.
        computes_weight_gradients: Eager autograd would compute the gradients of weights as well.
    """

    name: str
    make_step: Callable[..., Step]
    compiles: str
    computes_weight_gradients: bool = False

    def __str__(self) -> str:
        return self.name

    def compile(self, network: Network, model: nn.Module, **options: Any) -> tuple[Step, Any]:
        """The step to call, and what has the reports."""
        if self.compiles == "step":
            step = gradprune.compile(self.make_step(model, network.loss), fullgraph=True, **options)
            return step, step
        accelerated = gradprune.accelerate(model, **options)
        return self.make_step(accelerated, network.loss), accelerated


AUTOGRAD_GRAD = Way("autograd.grad", step_by_autograd_grad, "step")
BACKWARD = Way("backward", step_by_backward, "step", computes_weight_gradients=True)
FUNC_GRAD = Way("func.grad", step_by_func_grad, "step")
ACCELERATE = Way("accelerate", step_by_backward, "model")
"""Its weights require no gradient while it runs, so that there are no weight gradients to begin with."""

ALL_WAYS = (AUTOGRAD_GRAD, BACKWARD, FUNC_GRAD, ACCELERATE)

EAGER_REFUSES = {
    ("custom_function", FUNC_GRAD): "must override the setup_context staticmethod",
    ("batch_norm_in_training", FUNC_GRAD): "would mutate a captured Tensor",
}
"""What eager PyTorch itself cannot do, and the error that says so."""

EVERY_NETWORK_IN_EVERY_WAY = pytest.mark.parametrize(
    ("network", "way"),
    [(network, way) for network in ZOO.values() for way in ALL_WAYS if (network.name, way) not in EAGER_REFUSES],
    ids=str,
)


def written_by_forward(network: Network, model: nn.Module) -> list[str]:
    """Names of the buffers that a forward pass writes."""
    return [name for name, _ in model.named_buffers()] if network.training else []


def fill_grads(model: nn.Module) -> None:
    """Give every parameter a gradient, as a training loop around the attack would."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


def check_calls(network: Network, model: nn.Module, reference: nn.Module, step: Step, tolerance: float) -> None:
    """Call a step at two iterates; check what it returns, and that it changes nothing.

    Args:
        network: The network.
        model: The model that the step attacks.
        reference: The same model in float64, called as often as ``model`` so far.
        step: The step.
        tolerance: Largest relative error of the gradient.
    """
    x, y, context = network.inputs(dtype=next(model.parameters()).dtype)
    inputs = [x, y, *context]
    values = [tensor.clone() for tensor in inputs]
    state, written = ModelState.of(model), written_by_forward(network, model)
    reference_step = step_by_autograd_grad(reference, network.loss)
    x_adv = x.clone()
    for _ in range(2):
        x_adv_value = x_adv.clone()
        x_next, grad = step(x_adv, x, y, *context)
        _, reference_grad = reference_step(x_adv.double(), x.double(), y, *(tensor.double() for tensor in context))
        assert relative_error(grad, reference_grad) < tolerance
        torch.testing.assert_close(x_next, update(x_adv, x, grad))
        assert torch.equal(x_adv, x_adv_value)
        assert x_adv.grad is None
        x_adv = x_next
    assert all(torch.equal(tensor, value) for tensor, value in zip(inputs, values, strict=True))
    state.assert_untouched(model, written)
    for name in written:
        torch.testing.assert_close(model.get_buffer(name).double(), reference.get_buffer(name).double())


def check_reports(compiled: Any) -> dict[str, Any]:
    """Check the reports of all that was compiled, and return the last one."""
    reports = [report.to_dict() for report in gradprune.reports(compiled)]
    for report in reports:
        assert report["fallback"] is None
        assert report["skipped"] == []
        assert report["flops"]["after"]["weight_grad"] == 0
    return reports[-1]


def check_flops(network: Network, way: Way, report: dict[str, Any]) -> None:
    """Hold the report's FLOPs against what torch counts in eager mode."""
    x, y, context = network.inputs(dtype=torch.float64)
    model = network.build(torch.float64)
    live = eager_flops(step_by_backward(model, network.loss), x, x, y, *context)
    frozen = eager_flops(step_by_backward(model.requires_grad_(False), network.loss), x, x, y, *context)
    pruned = sum(report["flops"]["after"].values())
    if network.reads_one_token:
        assert frozen / 2 < pruned < 0.9 * frozen
    else:
        assert pruned == pytest.approx(frozen, rel=0.01)
    # Of a grouped convolution torch counts too much, see below.
    if way.computes_weight_gradients and not network.grouped:
        assert sum(report["flops"]["before"].values()) == pytest.approx(live, rel=0.01)


@EVERY_NETWORK_IN_EVERY_WAY
def test_float64(network: Network, way: Way):
    model, reference = network.build(torch.float64), network.build(torch.float64)
    step, compiled = way.compile(network, model, verify=True, strict=True)
    with interpreted():
        check_calls(network, model, reference, step, tolerance=1e-12)
        fill_grads(model)
        check_calls(network, model, reference, step, tolerance=1e-12)
    check_flops(network, way, check_reports(compiled))


@EVERY_NETWORK_IN_EVERY_WAY
def test_float32(network: Network, way: Way):
    model, reference = network.build(), network.build(torch.float64)
    fill_grads(model)
    step, compiled = way.compile(network, model)
    check_calls(network, model, reference, step, tolerance=1e-4)
    check_reports(compiled)


@pytest.mark.parametrize("network", ZOO.values(), ids=str)
def test_eager_float32_is_accurate_on_these_inputs(network: Network):
    """Otherwise, with a tie in a ReLU or a max pool, the tolerance of float32 would say nothing."""
    model, reference = network.build(), network.build(torch.float64)
    check_calls(network, model, reference, step_by_autograd_grad(model, network.loss), tolerance=1e-6)


@pytest.mark.parametrize(("name", "way"), EAGER_REFUSES, ids=str)
def test_what_is_left_out_fails_in_eager(name: str, way: Way):
    network = ZOO[name]
    x, y, context = network.inputs()
    with pytest.raises(RuntimeError, match=EAGER_REFUSES[name, way]):
        way.make_step(network.build(), network.loss)(x, x, y, *context)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_first_call_with_the_clean_image_as_iterate(way: Way):
    """One tensor passed as two arguments must not become one input of all later calls."""
    network = ZOO["tied"]
    model = network.build(torch.float64)
    x, y, _ = network.inputs(dtype=torch.float64)
    step, _ = way.compile(network, model)
    reference = step_by_autograd_grad(network.build(torch.float64), network.loss)
    with interpreted():
        for x_adv in (x, x + 0.01, x):
            x_next, grad = step(x_adv, x, y)
            expected_next, expected = reference(x_adv, x, y)
            assert relative_error(grad, expected) < 1e-12
            torch.testing.assert_close(x_next, expected_next)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_convolution(groups: int):
    """Forward, input gradient and weight gradient cost the same; torch counts the last once for every group."""
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    x = torch.rand(2, 8, 6, 6, requires_grad=True)
    forward = eager_flops(conv, x)
    assert forward == 2 * 2 * 36 * conv.weight.numel()
    assert eager_flops(lambda: conv(x).sum().backward()) == forward * (2 + groups)
    flops = gradprune.explain(conv, x).flops
    assert flops["before"] == {"forward": forward, "input_grad": forward, "weight_grad": forward, "other": 0}
    assert flops["after"] == {"forward": forward, "input_grad": forward, "weight_grad": 0, "other": 0}
