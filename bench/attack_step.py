"""The attack that every candidate runs: PGD in the Linf ball, without a random start so that all start alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], Tensor]

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x_adv, x, y) -> (next x_adv, gradient at x_adv)``."""


def pgd_step(model: Model, x_adv: Tensor, x: Tensor, y: Tensor, eps: float, step_size: float) -> tuple[Tensor, Tensor]:
    """One step of projected gradient ascent (Madry et al. 2018, "Towards Deep Learning Models Resistant to
    Adversarial Attacks").

    It is written as attack libraries write it: ``loss.backward()``, then the gradient of the images is read and
    whatever else was computed is ignored.

    Args:
        model: From images to logits.
        x_adv: Where the attack stands, ``(N, C, H, W)`` in [0, 1].
        x: The clean images.
        y: True labels ``(N,)``.
        eps: Radius of the Linf ball around ``x``.
        step_size: Length of the step, in the Linf norm.

    Returns:
        The next ``x_adv``, inside the ball and in [0, 1], and the gradient of the loss at the ``x_adv`` given.
    """
    x_adv = x_adv.detach().requires_grad_(True)
    loss = F.cross_entropy(model(x_adv), y)
    loss.backward()
    gradient = x_adv.grad
    assert gradient is not None
    moved = x_adv.detach() + step_size * gradient.sign()
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1), gradient


def step_of(model: Model, eps: float, step_size: float) -> Step:
    """``pgd_step`` of one model and one ball."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return pgd_step(model, x_adv, x, y, eps, step_size)

    return step


def attack(step: Step, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Take ``steps`` steps from the clean images.

    Args:
        step: One step.
        x: Clean images ``(N, C, H, W)`` in [0, 1].
        y: True labels ``(N,)``.
        steps: How many steps.

    Returns:
        Adversarial examples, shaped like ``x``.
    """
    # A copy: given one tensor as both arguments, a compiler may take them to be the same one for good.
    x_adv = x.clone()
    for _ in range(steps):
        x_adv, _ = step(x_adv, x, y)
    return x_adv
