"""What is measured of a candidate: operations, saved bytes, and distance from float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attack_step import Ball, Step, pgd_step


def float64_gradient(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the loss at ``x_adv``, computed in float64 by eager autograd, shaped like ``x_adv``."""
    exact = copy.deepcopy(model).double().requires_grad_(False)
    _, gradient = pgd_step(exact, Ball(0.0, 0.0))(x_adv.double(), x.double(), y)
    return gradient


def relative_errors(gradient: Tensor, exact: Tensor) -> tuple[float, float]:
    """How far a gradient is from the exact one.

    Returns:
        The largest difference relative to the largest exact value, and the Euclidean norm of the difference relative
        to that of the exact gradient.
    """
    difference = gradient.double() - exact
    return float(difference.abs().max() / exact.abs().max()), float(difference.norm() / exact.norm())


def flops(step: Step, x_adv: Tensor, x: Tensor, y: Tensor) -> int:
    """FLOPs of the convolutions and matrix products of one eager step; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        step(x_adv, x, y)
    return int(counter.get_total_flops())


def saved_bytes(step: Step, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps alive from the forward to the backward pass of one step.

    Storages are counted once each. The model's parameters and buffers and the image batch itself are left out: they
    are alive anyway.

    Args:
        step: A step whose backward pass autograd runs: eager, or eager around a compiled model.
        model: The model the step attacks.
        x_adv: Where the attack stands.
        x: The clean images.
        y: The labels.
    """
    alive = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), x_adv, x, y)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in alive:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(x_adv, x, y)
    return sum(found.values())


def differing_share(first: Tensor, second: Tensor, tolerance: float = 1e-6) -> float:
    """Share of the values that differ by more than ``tolerance``, from 0 to 1."""
    return float(((first - second).abs() > tolerance).double().mean())


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that ``model`` classifies as labelled, from 0 to 1."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())
