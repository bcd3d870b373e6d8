"""The smallest networks and steps that show what the tests of this folder are about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import Step, step_by_autograd_grad, step_by_backward, step_by_func_grad
from torch import Tensor, nn

STEPS = {
    "autograd.grad": step_by_autograd_grad,
    "backward": step_by_backward,
    "func.grad": step_by_func_grad,
}
"""The three ways to take the gradient in a step."""


def network(training: bool = False) -> nn.Sequential:
    """A convolution, batch norm with statistics of its own, and a linear layer for 4x4 images in three channels."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    return model.train(training)


def images() -> tuple[Tensor, Tensor, Tensor]:
    """A perturbed image, the clean image and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 4, 4, generator=generator)
    return x + 0.01 * torch.rand(2, 3, 4, 4, generator=generator), x, torch.tensor([1, 3])


def backward_step(model: nn.Module) -> Step:
    """A step that calls ``loss.backward()``."""
    return step_by_backward(model, F.cross_entropy)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient as an attack library takes it from a model."""
    x = x.detach().requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    return x.grad


def train_step(model: nn.Module):
    """A training step: backward with no perturbation anywhere."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return step
