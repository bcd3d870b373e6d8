"""Leave a model as it was found, whatever happens in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from gradprune.compiler.perturbations import is_perturbation

Mode = Literal["eval", "keep"]


@contextmanager
def unchanged(model: Any, mode: Mode) -> Iterator[None]:
    """Put a model into ``mode`` for the block.

    Restored at the end: the mode of every submodule; and with ``"keep"``, where the block may run batch norm in
    training mode, the buffers. Gradients and ``requires_grad`` are not touched by anything in the block.

    Args:
        model: The model; what is no ``nn.Module`` has no state to restore.
        mode: ``"eval"`` for evaluation mode throughout; ``"keep"`` to leave modules in the modes they are in.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    buffers = []
    if mode == "keep" and any(training for _, training in modes):
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        if mode == "eval":
            for module, training in modes:
                if training:
                    module.training = False
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, itself first. ``model.modules()`` takes several times as long, which every call pays."""
    found, pending = dict[int, nn.Module](), [model]
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending += [child for child in module._modules.values() if child is not None]
    return list(found.values())


_freezing = threading.Lock()
_frozen: dict[int, tuple[int, list[nn.Parameter]]] = {}
"""By the identity of a model: how many calls are running, and which parameters require gradients otherwise."""


@contextmanager
def frozen(modules: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> Iterator[list[nn.Parameter]]:
    """Have the parameters of a model require no gradient for the block, but for those that are perturbations.

    A parameter is one if it was marked as such, or if no input requires a gradient and other parameters require none
    either: then it is what the gradient is taken for.

    Args:
        modules: All modules of the model, as ``modules_of`` has them.
        inputs: The tensors it is called with.

    Yields:
        The parameters that require gradients otherwise.
    """
    model = modules[0]
    with _freezing:
        count, weights = _frozen.get(id(model), (0, []))
        if not count:
            parameters = [one for module in modules for one in module._parameters.values() if one is not None]
            weights = [one for one in parameters if one.requires_grad and not is_perturbation(one)]
            attacked = any(one.requires_grad for one in inputs) or any(map(is_perturbation, parameters))
            if not attacked and len(weights) < len(parameters):
                weights = []
            for weight in weights:
                weight.requires_grad = False
        _frozen[id(model)] = count + 1, weights
    try:
        yield weights
    finally:
        with _freezing:
            count, weights = _frozen.pop(id(model))
            if count > 1:
                _frozen[id(model)] = count - 1, weights
            else:
                for weight in weights:
                    weight.requires_grad = True
