"""Which tensors of a module are no weights but what an attack changes, because the user says so."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from gradprune.torch_compat.dynamo import recompile

T = TypeVar("T", torch.Tensor, nn.Module)

_MARK = "_gradprune_perturbation"


def perturbation(target: T) -> T:
    """Mark a parameter, or all parameters and buffers of a module, as a perturbation: something that is attacked.

    An adversarial patch, a universal perturbation or a prompt may live in a module, and the gradient of a text model is
    that of its embedding. gradprune takes what lives in a module for a weight, whose gradient nobody reads. What is
    marked gets its gradient, in its ``.grad`` too, and nothing that depends on it is computed ahead.

    Args:
        target: The tensor or the module. What was compiled before is compiled again.

    Returns:
        The same.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(target, nn.Module):
        tensors = [*target.parameters(), *target.buffers()]
    elif isinstance(target, torch.Tensor):
        tensors = [target]
    else:
        raise TypeError(f"perturbation takes a tensor or an nn.Module, not {type(target).__name__}")
    if not all(map(is_perturbation, tensors)):
        for tensor in tensors:
            setattr(tensor, _MARK, True)
        recompile()
    return target


def is_perturbation(tensor: Any) -> bool:
    """Whether a tensor was marked."""
    return bool(getattr(tensor, _MARK, False))
