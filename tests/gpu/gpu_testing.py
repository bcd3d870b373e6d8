"""What the tests of this folder share.

They are about what a GPU does. Without one every test is skipped, but they can be rehearsed on the CPU, so that a GPU
that is at hand for minutes is not spent on typos: the environment variable ``GRADPRUNE_GPU_REHEARSE`` set to ``1`` runs
graphs as they are where a test is not about kernels, and ``full`` compiles everything, which takes minutes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from helpers import Loss, Step, peak_allocated_bytes, update
from torch import Tensor, nn

import gradprune
from gradprune.compiler.hoisted_step import _steps

REHEARSAL = os.environ.get("GRADPRUNE_GPU_REHEARSE", "")
"""``""``, ``"1"`` or ``"full"``."""

STRICT = {"strict": True, "check": "never"}
"""A failing pass is an error, and no wrong step is replaced by eager before a test sees it."""

TOLERANCE = 1e-4
"""Of a float32 gradient in the Euclidean norm."""


class Network(nn.Module):
    """Convolution, batch norm, ReLU, max pool, a depthwise and a 1x1 convolution, a linear layer; images of 3 channels.

    Args:
        width: Channels of the convolutions.
        size: Height and width of the images, a multiple of 4.
    """

    def __init__(self, width: int = 8, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1, stride=2)
        self.head = nn.Linear(width * (size // 4) ** 2, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 5)`` of images ``(N, 3, size, size)``."""
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.head(F.relu(self.pointwise(F.relu(self.depthwise(x)))).flatten(1))


def without_buffers() -> nn.Sequential:
    """Two convolutions and a linear layer, for images of 3x8x8: nothing but parameters."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)).eval()


def images(device: torch.device, batch: int = 4, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The start of an attack, the clean images and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(batch, 3, size, size, generator=generator)
    start = x + 0.01 * torch.rand(x.shape, generator=generator)
    return start.to(device), x.to(device), torch.randint(5, (batch,), generator=generator).to(device)


def step_of(model: Callable[..., Tensor], loss: Loss = F.cross_entropy, autocast: torch.dtype | None = None) -> Step:
    """A step that takes its gradient by ``torch.autograd.grad``, with the model run in ``autocast``."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = x_adv.detach().requires_grad_(True)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            logits = model(x_adv, *context)
        (gradient,) = torch.autograd.grad(loss(logits.float(), y), x_adv)
        return update(x_adv.detach(), x, gradient), gradient

    return step


def traced_step_of(model: nn.Module) -> Step:
    """A step by ``torch.func.grad``, which every supported torch traces as one graph."""

    def step(x_adv: Tensor, x: Tensor, y: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        gradient = torch.func.grad(lambda value: F.cross_entropy(model(value), y))(x_adv)
        return update(x_adv, x, gradient), gradient

    return step


def error(gradient: Tensor, exact: Tensor) -> float:
    """Distance from an exact gradient in the Euclidean norm, relative to its own; NaN is no small one."""
    assert gradient.shape == exact.shape
    ours, exact = gradient.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).norm() / exact.norm())


class Subject:
    """A compiled step, and the eager step on the very same model to compare it with.

    Args:
        model: The model that both attack.
        make: Makes a step of a model.
        options: Of the compilation.
    """

    def __init__(self, model: nn.Module, make: Callable[[Any], Step] = step_of, **options: Any) -> None:
        self.model, self.eager = model, make(model)
        self.step = gradprune.compile(make(model), **{**STRICT, **options})

    def __call__(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Step, compare with eager, and return what the step returned."""
        expected = self.eager(x_adv, x, y)
        actual = self.step(x_adv, x, y)
        assert error(actual[1], expected[1]) < TOLERANCE, "the gradient is not that of the weights as they are"
        torch.testing.assert_close(actual[0], update(x_adv, x, actual[1]))
        return actual

    def report(self) -> dict[str, Any]:
        """What is known of the graph with the gradient; torch 2.11 compiles one of its own for what is before it."""
        reports = [report.to_dict() for report in gradprune.reports(self.step)]
        assert [report["fallback"] for report in reports] == [None] * len(reports)
        return max(reports, key=lambda report: sum(report["flops"]["after"].values()))


@contextlib.contextmanager
def new_steps() -> Iterator[list[Any]]:
    """Yield a list that has, behind the block, the hoisted steps that were compiled in it."""
    known, found = set(_steps), []
    yield found
    found.extend(set(_steps) - known)


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Another stream than the current one; on a CPU there is none."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, step: Step, x_adv: Tensor, x: Tensor, y: Tensor) -> int:
    """Most bytes that a step in mid-attack holds beyond what was held before it."""
    if device.type == "cpu":
        return peak_allocated_bytes(lambda: step(x_adv, x, y))
    for _ in range(2):
        x_adv = step(x_adv, x, y)[0]
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(x_adv, x, y)
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
