"""The attack that every candidate runs: PGD in the Linf ball, without a random start so that all start alike."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Model = Callable[[Tensor], Tensor]

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x_adv, x, y) -> (next x_adv, gradient at x_adv)``."""


class InBall(Protocol):
    """Where an attack may go, and how far in a step."""

    @property
    def eps(self) -> float:
        """Radius of the Linf ball."""

    @property
    def step_size(self) -> float:
        """Length of a step."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest valid input; ``None`` for any."""


class Ball(NamedTuple):
    """A Linf ball of images."""

    eps: float
    step_size: float
    bounds: tuple[float, float] | None = (0.0, 1.0)


def move(ball: InBall, x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """The next ``x_adv``: a step along the sign of the gradient, into the ball around ``x`` and the bounds."""
    moved = x_adv + ball.step_size * gradient.sign()
    moved = torch.minimum(torch.maximum(moved, x - ball.eps), x + ball.eps)
    return moved if ball.bounds is None else moved.clamp(*ball.bounds)


def pgd_step(model: Model, ball: InBall, autocast: torch.dtype | None = None, *, backward: bool = False) -> Step:
    """One step of projected gradient ascent (Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial
    Attacks").

    Args:
        model: From inputs to logits.
        ball: Where the attack may go.
        autocast: Type to run the model in.
        backward: Take the gradient by ``loss.backward()``, as attack libraries do, not by ``torch.autograd.grad``.

    Returns:
        The step. Its code object is its own: Dynamo keeps what it compiles with the code, allows a few compilations
        for each, and would count those of all candidates together.
    """

    def step(x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        if autocast is None:
            loss = F.cross_entropy(model(x_adv), y)
        else:
            with torch.autocast(x.device.type, autocast):
                loss = F.cross_entropy(model(x_adv), y)
        if backward:
            loss.backward()
            gradient = x_adv.grad
            assert gradient is not None
        else:
            (gradient,) = torch.autograd.grad(loss, x_adv)
        return move(ball, x_adv.detach(), x, gradient), gradient

    return FunctionType(step.__code__.replace(), step.__globals__, "step", closure=step.__closure__)


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
