"""Gradients of gradients of an accelerated model, and batches of them: taken from the original, which runs again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gradprune.compiler.misuse import DOUBLE_BACKWARD
from gradprune.errors import DoubleBackwardError
from gradprune.torch_compat import aot

_SAME = 1e-2
"""Relative error below which two runs in the same precision, bfloat16 included, computed the same."""


class WithDoubleBackward(torch.autograd.Function):
    """Identity of the outputs of a compiled model, whose backward pass can be differentiated or batched.

    A compiled backward pass can neither. Where one of them is asked for, the model runs once more, eagerly, on the
    inputs it had, and the gradient is that of the second run. ``apply`` takes ``again``, which computes the outputs
    from inputs; the number of outputs; the outputs; the inputs that require gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, again: Callable[..., list[torch.Tensor]], count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        ctx.again, ctx.outputs = again, [one.detach() for one in tensors[:count]]
        ctx.cast = _autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors[count:])
        return tuple(one.detach() for one in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of the outputs as they came, for the compiled backward pass; or those of the inputs."""
        inputs = len(ctx.needs_input_grad) - 2 - len(grads)
        if not torch.is_grad_enabled() and not any(map(aot.is_batched, grads)):
            return (None, None, *grads, *[None] * inputs)
        saved = ctx.saved_tensors
        with torch.enable_grad(), ctx.cast:
            results = ctx.again(saved)
        if not _same(results, ctx.outputs) or _has_other_sources(results, saved):
            raise DoubleBackwardError(DOUBLE_BACKWARD)
        asked = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
        found = torch.autograd.grad(
            [result for result, _ in asked],
            saved,
            [grad for _, grad in asked],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return (None, None, *[None] * len(grads), *found)


def may_run_again(modules: Sequence[nn.Module]) -> bool:
    """Whether no module of a model keeps statistics of what it is called with."""
    return not any(module.training and hasattr(module, "running_mean") for module in modules)


def _autocast(device: str) -> AbstractContextManager[object]:
    """Casts as they are done now; torch does none where a backward pass runs."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device))


def _same(results: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> bool:
    """Whether the model did the same again: no random numbers, no weights that were changed in between."""
    if [(one.shape, one.dtype) for one in results] != [(one.shape, one.dtype) for one in outputs]:
        return False
    return all(
        bool((one.detach() - other).norm() <= _SAME * other.norm())
        for one, other in zip(results, outputs, strict=True)
        if bool(other.isfinite().all())
    )


def _has_other_sources(results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
    """Whether something else than ``inputs`` awaits a gradient: a tensor the model keeps where nobody looks for it."""
    ends = {torch.autograd.graph.get_gradient_edge(one).node for one in inputs}
    pending, seen = [one.grad_fn for one in results], set(ends)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return True
        pending += [before for before, _ in node.next_functions]
    return False
