"""Attacks that are made to transfer to other models: momentum, look-ahead, scales, variance, input diversity.

They are parts of one attack, and its subclasses differ in their defaults, so that the parts can be combined at will.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprune.errors import OptionError
from gradprune.runtime import Query
from gradprune.runtime.functions import Answer

from .base import per_sample
from .pgd import BIM


@dataclass(frozen=True, kw_only=True)
class TransferAttack(BIM):
    """The iterative method with any of the means by which examples are made to transfer.

    Attributes:
        decay: Weight of the momentum (Dong et al. 2018, "Boosting Adversarial Attacks with Momentum", algorithm 1).
        nesterov: Take the gradient where the momentum leads (Lin et al. 2020, "Nesterov Accelerated Gradient and Scale
            Invariance for Adversarial Attacks", equation 6).
        scales: Average the gradient over the input divided by 1, 2, 4, ... (the same, equation 8).
        neighbors: Points around ``x_adv`` whose mean gradient tunes the variance; 0 for none (Wang & He 2021,
            "Enhancing the Transferability of Adversarial Attacks through Variance Tuning", algorithm 1).
        neighborhood: Radius of these, in ``eps``.
        diversity: Probability of showing the model a resized and padded image (Xie et al. 2019, "Improving
            Transferability of Adversarial Examples with Input Diversity").
        resize: Smallest size of these, relative to the image.
        kernel: Size of the Gaussian kernel that smooths the gradient of images; 0 for none (Dong et al. 2019, "Evading
            Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks").
    """

    decay: float = 0.0
    nesterov: bool = False
    scales: int = 1
    neighbors: int = 0
    neighborhood: float = 1.5
    diversity: float = 0.0
    resize: float = 0.9
    kernel: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("scales")
        self._check_counts("neighbors", "kernel", least=0)
        self._check_positive("decay", "neighborhood", or_zero=True)
        if not (0 <= self.diversity <= 1 and 0 < self.resize <= 1):
            raise OptionError(f"diversity and resize are shares, not {self.diversity} and {self.resize}")
        if self.kernel and self.kernel % 2 == 0:
            raise OptionError(f"kernel has to be odd, or 0 for none, not {self.kernel!r}")

    def memory(self, x: Tensor) -> Tensor | None:
        """Momentum and, below it, the variance."""
        return torch.zeros(2, *x.shape, dtype=x.dtype, device=x.device)

    def ascent(
        self,
        query: Query,
        x_adv: Tensor,
        x: Tensor,
        against: Tensor,
        generator: torch.Generator,
        memory: Tensor | None,
        rows: Tensor | slice,
    ) -> Answer:
        """See ``PGD.ascent``."""
        assert memory is not None
        momentum, variance = memory[0][rows], memory[1][rows]
        point = x_adv + self.decay * self.step_length * momentum if self.nesterov else x_adv
        losses, logits, gradient = self.smoothed(query, point, against, generator)
        if (self.nesterov or self.diversity) and (self.keep == "best" or self.stop_at_success):
            losses, logits = self.losses(query, x_adv, against)  # those above are of another point
        tuned = gradient + variance if self.neighbors else gradient
        momentum = self.decay * momentum + tuned / per_sample(_mean_magnitude(tuned), tuned)
        memory[0][rows] = momentum
        if self.neighbors:
            total = torch.zeros_like(gradient)
            for _ in range(self.neighbors):
                # Drawn for all runs, so that no run depends on which others are left.
                offset = torch.empty_like(memory[0]).uniform_(-1, 1, generator=generator)[rows]
                near = x_adv + self.neighborhood * self.eps * offset
                total += self.smoothed(query, near, against, generator)[2]
            memory[1][rows] = total / self.neighbors - gradient
        return losses, logits, momentum

    def smoothed(self, query: Query, point: Tensor, against: Tensor, generator: torch.Generator) -> Answer:
        """Losses and logits at a point, and its gradient averaged over scales and smoothed."""
        losses, logits, gradient = self.diverse(query, point, against, generator)
        for i in range(1, self.scales):
            gradient = gradient + self.diverse(query, point / 2**i, against, generator)[2] / 2**i
        gradient = gradient / self.scales
        return losses, logits, _smooth(gradient, self.kernel) if self.kernel else gradient

    def diverse(self, query: Query, point: Tensor, against: Tensor, generator: torch.Generator) -> Answer:
        """Losses, logits and gradient at a point, or at an image made of it."""
        if not self.diversity or _draw(generator) >= self.diversity:
            return self.gradient(query, point, against)
        # The compiled gradient is that of the transformed image; the way back is a few operations of autograd.
        leaf = point.detach().requires_grad_(True)
        shown = _resized(leaf, self.resize, generator)
        losses, logits, gradient = self.gradient(query, shown.detach(), against)
        (gradient,) = torch.autograd.grad(shown, leaf, gradient)
        return losses, logits, gradient


def _draw(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))


def _mean_magnitude(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).abs().mean(1).clamp(min=torch.finfo(gradient.dtype).tiny)


def _resized(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)`` shrunk to a random size and put anywhere on black ones of the same size."""
    if images.ndim != 4:
        raise OptionError(f"input diversity is for images (N, C, H, W), not inputs of shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    scale = smallest + (1 - smallest) * _draw(generator)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = int((height - rows + 1) * _draw(generator)), int((width - columns + 1) * _draw(generator))
    small = F.interpolate(images, (rows, columns), mode="bilinear", align_corners=False)
    return F.pad(small, (left, width - columns - left, top, height - rows - top))


def _smooth(gradient: Tensor, size: int) -> Tensor:
    """Convolve every channel with a Gaussian whose window of ``size`` ends at three standard deviations."""
    if gradient.ndim != 4:
        raise OptionError(f"the kernel is for images (N, C, H, W), not inputs of shape {tuple(gradient.shape)}")
    line = torch.linspace(-3, 3, size, dtype=gradient.dtype, device=gradient.device) if size > 1 else None
    if line is None:
        return gradient
    weights = torch.exp(-(line**2) / 2) / math.sqrt(2 * math.pi)
    weights = torch.outer(weights, weights)
    channels = gradient.shape[1]
    kernel = (weights / weights.sum()).expand(channels, 1, size, size)
    return F.conv2d(gradient, kernel, padding=size // 2, groups=channels)


@dataclass(frozen=True, kw_only=True)
class MIFGSM(TransferAttack):
    """The iterative method with momentum."""

    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class NIFGSM(MIFGSM):
    """MI-FGSM with Nesterov's look-ahead."""

    nesterov: bool = True


@dataclass(frozen=True, kw_only=True)
class SINIFGSM(NIFGSM):
    """NI-FGSM over five scales of the input."""

    scales: int = 5


@dataclass(frozen=True, kw_only=True)
class VMIFGSM(MIFGSM):
    """MI-FGSM with variance tuning."""

    neighbors: int = 5


@dataclass(frozen=True, kw_only=True)
class VNIFGSM(VMIFGSM):
    """NI-FGSM with variance tuning."""

    nesterov: bool = True


@dataclass(frozen=True, kw_only=True)
class DIFGSM(MIFGSM):
    """MI-FGSM with input diversity."""

    diversity: float = 0.5


@dataclass(frozen=True, kw_only=True)
class TIFGSM(DIFGSM):
    """MI-FGSM with input diversity and translation invariance."""

    kernel: int = 15
