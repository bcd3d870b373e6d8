"""What is compiled, called as Dynamo expects it; misuses that would end in an obscure error or in silence are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradprune.errors import DoubleBackwardError, TrainingStepError, WeightGradientError
from gradprune.torch_compat import aot

from .capture import Capture
from .dropped import note_dropped

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
        return _WithoutWeightGradients.apply(output, anchor)
    if output.grad_fn is not None:
        output.grad_fn.register_hook(_refuse_double_backward)
        output.grad_fn.register_prehook(_note_gradient)
    return output


def without_weight_gradients(output: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """An output that requires a gradient as that of the original would, where none of its weights receives one."""
    if not (output.is_floating_point() or output.is_complex()):
        return output
    return _WithoutWeightGradients.apply(output, *weights)  # type: ignore[no-any-return]


class _WithoutWeightGradients(torch.autograd.Function):
    """Identity of an output; to autograd, a function of the weights as well, which receive nothing."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        return output.detach()  # returned as it is, it could not be written to

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        reached = ctx.needs_input_grad[0]
        weights = ctx.weights
        if isinstance(weights[0], nn.Parameter) and aot.requests_weight_gradient([False, *[True] * len(weights)]):
            raise WeightGradientError(_NO_WEIGHT_GRADIENT)
        if reached:
            note_dropped((("", weight) for weight in weights), "a model")
        _note_gradient(reached=reached)
        return (grads[0] if reached else None, *[None] * len(weights))


_pending: dict[int, bool] = {}
"""By the number of a running backward pass: whether it has reached something that is attacked."""


# Autograd may call these while Dynamo looks for frames to compile.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _note_gradient(*_: Any, reached: bool = True) -> None:
    """A gradient arrived at an output that depends on something that is attacked.

    Or, unless ``reached``, at one that depends on weights alone, which is fine if it is not the only one.
    """
    task = aot.current_graph_task()
    if task not in _pending:
        aot.at_end_of_backward(lambda: _end(task))
    _pending[task] = _pending.get(task, False) or reached


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end(task: int) -> None:
    if not _pending.pop(task, True):
        raise TrainingStepError(
            "backward() was called on a model compiled with gradprune, and no input of the model requires grad: the "
            "only gradients would be those of weights, which gradprune does not compute. To attack, call "
            "x_adv.requires_grad_(True) before the forward pass, or, if what is attacked is a parameter or the output "
            "of a layer such as an embedding, gradprune.perturbation(parameter_or_module); to train, use the model "
            "that was not compiled, or compile it with torch.compile's default backend"
        )


_NO_WEIGHT_GRADIENT = (
    "the gradient of a weight was asked for explicitly from a model compiled with gradprune, which computes gradients "
    "of inputs only. Take it from the model that was not compiled, or from one compiled with torch.compile's default "
    "backend, which share the weights; or, if the attack changes this weight, mark it: gradprune.perturbation(weight)"
)


def like_eager(compiled: Callback, weights: list[bool], strides: Sequence[Sequence[Any] | None] | None) -> Callback:
    """A compiled backward pass that raises when a weight gradient is asked for.

    Args:
        compiled: The backward pass.
        weights: For every tensor the model was applied to, whether it is a weight.
        strides: Of every gradient in eager mode, ``None`` where nothing is returned, or if none are known. Inductor may
            choose others, and attacks call ``gradient.view``.
    """

    def backward(args: list[Any]) -> Any:
        if aot.requests_weight_gradient(weights):
            raise WeightGradientError(_NO_WEIGHT_GRADIENT)
        gradients = compiled(args)
        if strides is None:
            return gradients
        return [
            _in_strides(value, wanted) if isinstance(value, torch.Tensor) and wanted is not None else value
            for value, wanted in zip(gradients, strides, strict=True)
        ]

    backward._boxed_call = True  # type: ignore[attr-defined]
    return backward


def _in_strides(value: torch.Tensor, strides: Sequence[Any]) -> torch.Tensor:
    if any(not isinstance(stride, int) for stride in strides):  # they depend on symbolic sizes
        return value.contiguous()
    if value.stride() == tuple(strides):
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_double_backward(
    grad_inputs: Sequence[torch.Tensor | None], grad_outputs: Sequence[torch.Tensor | None]
) -> tuple[None, ...] | None:
    """Hook on the backward of a compiled model: with ``create_graph=True`` its results must not be differentiated.

    Where no gradient came in, it returns none, which zeros computed by the compiled backward would be otherwise.
    """
    if all(gradient is None for gradient in grad_outputs):
        return (None,) * len(grad_inputs)
    if not torch.is_grad_enabled():
        return None
    for gradient in grad_inputs:
        if gradient is not None and gradient.grad_fn is not None:
            gradient.grad_fn.register_prehook(_raise_double_backward)
    return None


def _raise_double_backward(grad_outputs: Sequence[torch.Tensor]) -> None:
    raise DoubleBackwardError(DOUBLE_BACKWARD)


DOUBLE_BACKWARD = (
    "the input gradient of a model compiled with gradprune was differentiated (double backward), which a separately "
    "compiled backward cannot do. Compile the whole step instead, with both gradient calls inside: "
    'torch.compile(attack_step, backend="gradprune")'
)
