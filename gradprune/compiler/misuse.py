"""What is compiled, called as Dynamo expects it; misuses that would end in an obscure error or in silence are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradprune.errors import DoubleBackwardError, TrainingStepError, WeightGradientError
from gradprune.torch_compat import aot

from .capture import Capture

Callback = Callable[..., Any]


def with_calling_convention(compiled: Callback, capture: Capture) -> Callback:
    """A callable that takes and returns what Dynamo expects, and that names misuses."""
    if capture.form == "step":

        def step(*args: Any) -> Sequence[Any]:
            return compiled(*args)[: capture.visible_outputs]  # type: ignore[no-any-return]

        return step

    def model(*args: Any) -> list[Any]:
        outputs = [_guard(output, capture.training_only) for output in compiled(*args)]
        return outputs

    return model


def _guard(output: Any, training_only: bool) -> Any:
    if not isinstance(output, torch.Tensor):
        return output
    if training_only and output.is_floating_point() and torch.is_grad_enabled():
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        return _NoWeightGradient.apply(output, anchor)
    if output.grad_fn is not None:
        output.grad_fn.register_hook(_refuse_double_backward)
    return output


class _NoWeightGradient(torch.autograd.Function):
    """Identity whose backward says that only weights could receive a gradient here.

    The anchor is a leaf that requires grad, without which the result would not.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise TrainingStepError(
            "backward() was called on a model compiled with gradprune, and no input of the model requires grad: the "
            "only gradients would be those of weights, which gradprune does not compute. To attack, call "
            "x_adv.requires_grad_(True) before the forward pass; to train, use the model that was not compiled, "
            "or compile it with torch.compile's default backend"
        )


def refuse_weight_gradients(compiled: Callback, weights: list[bool]) -> Callback:
    """A compiled backward pass that raises when a weight gradient is asked for."""

    def backward(args: list[Any]) -> Any:
        if aot.requests_weight_gradient(weights):
            raise WeightGradientError(
                "the gradient of a weight was asked for explicitly from a model compiled with gradprune, which "
                "computes gradients of inputs only. Take it from the model that was not compiled, or from one "
                "compiled with torch.compile's default backend; both share the weights"
            )
        return compiled(args)

    backward._boxed_call = True  # type: ignore[attr-defined]
    return backward


def _refuse_double_backward(grad_inputs: Sequence[torch.Tensor | None], grad_outputs: object) -> None:
    """Hook on the backward of a compiled model: with ``create_graph=True`` its results must not be differentiated."""
    if not torch.is_grad_enabled():
        return
    for gradient in grad_inputs:
        if gradient is not None and gradient.grad_fn is not None:
            gradient.grad_fn.register_prehook(_raise_double_backward)


def _raise_double_backward(grad_outputs: Sequence[torch.Tensor]) -> None:
    raise DoubleBackwardError(
        "the input gradient of a model compiled with gradprune was differentiated (double backward), which a "
        "separately compiled backward cannot do. Compile the whole step instead, with both gradient calls inside: "
        'torch.compile(attack_step, backend="gradprune")'
    )
