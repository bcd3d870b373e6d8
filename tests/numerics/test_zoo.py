"""Every network of the zoo, attacked in every way: the gradient is eager's, and nothing else about the model changes.

In float64 the compiled graphs are run operator by operator, so that what is compared with eager autograd, to 1e-12, is
what the passes made of them. In float32 they go through Inductor, and are held against the float64 gradient: eager
float32 is no reference, since it is wrong by as much. With the inputs of the zoo eager float32 itself is within 1e-6.
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
ACCELERATE = Way("accelerate", step_by_backward, "model", computes_weight_gradients=True)

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


def written_by_training(network: Network) -> list[str]:
    """Buffers that a forward pass writes."""
    return [name for name, _ in network.build().named_buffers()] if network.training else []


def check_calls(network: Network, model: nn.Module, step: Step, tolerance: float, calls: int) -> None:
    """Call a step at ``calls`` iterates and compare each gradient with eager's in float64."""
    reference_model = network.build(torch.float64)
    reference_step = step_by_autograd_grad(reference_model, network.loss)
    dtype = next(model.parameters()).dtype
    x, y, context = network.inputs(dtype=dtype)
    before = [tensor.clone() for tensor in (x, y, *context)]
    state = ModelState.of(model)
    x_adv = x.clone()
    for _ in range(calls):
        current = x_adv.clone()
        x_next, grad = step(x_adv, x, y, *context)
        _, reference = reference_step(x_adv.double(), x.double(), y, *(tensor.double() for tensor in context))
        assert relative_error(grad, reference) < tolerance
        torch.testing.assert_close(x_next, update(x_adv, x, grad))
        assert torch.equal(x_adv, current)
        assert x_adv.grad is None
        x_adv = x_next.detach()
    assert all(torch.equal(now, then) for now, then in zip((x, y, *context), before, strict=True))
    state.assert_untouched(model, written_by_training(network))
    for name in written_by_training(network):
        torch.testing.assert_close(model.get_buffer(name).double(), reference_model.get_buffer(name).double())


def fill_grads(model: nn.Module) -> None:
    """Give every parameter a gradient, as a training loop around the attack would."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


def check_flops(network: Network, way: Way, report: dict[str, Any]) -> None:
    """Hold the report's FLOPs against what torch counts in eager mode."""
    x, y, context = network.inputs(dtype=torch.float64)
    model = network.build(torch.float64)
    live = eager_flops(step_by_backward(model, network.loss), x, x, y, *context)
    frozen = eager_flops(step_by_backward(model.requires_grad_(False), network.loss), x, x, y, *context)
    assert sum(report["flops"]["after"].values()) == pytest.approx(frozen, rel=0.01)
    # Torch counts the weight gradients of grouped convolutions too high, see test_grouped_convolution.
    if way.computes_weight_gradients and not network.grouped:
        assert sum(report["flops"]["before"].values()) == pytest.approx(live, rel=0.01)


def check_reports(compiled: Any) -> dict[str, Any]:
    """Check all reports of what was compiled, and return the last one."""
    reports = [report.to_dict() for report in gradprune.reports(compiled)]
    assert reports
    for report in reports:
        assert report["fallback"] is None
        assert report["flops"]["after"]["weight_grad"] == 0 or report["skipped"]
    return reports[-1]


@pytest.mark.parametrize(("name", "way"), EAGER_REFUSES, ids=str)
def test_what_is_left_out_fails_in_eager(name: str, way: Way):
    network = ZOO[name]
    x, y, context = network.inputs()
    with pytest.raises(RuntimeError, match=EAGER_REFUSES[name, way]):
        way.make_step(network.build(), network.loss)(x, x, y, *context)


@EVERY_NETWORK_IN_EVERY_WAY
def test_float64(network: Network, way: Way):
    model = network.build(torch.float64)
    step, compiled = way.compile(network, model, verify=True, strict=True)
    with interpreted():
        check_calls(network, model, step, 1e-12, calls=2)
        report = check_reports(compiled)
        check_flops(network, way, report)


@EVERY_NETWORK_IN_EVERY_WAY
def test_float32(network: Network, way: Way):
    model = network.build()
    fill_grads(model)
    step, compiled = way.compile(network, model)
    check_calls(network, model, step, 1e-4, calls=2)
    check_reports(compiled)
