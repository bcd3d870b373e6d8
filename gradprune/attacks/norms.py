"""What distinguishes one threat model from another: three functions per norm.

All work on batches ``(N, ...)`` and treat every sample by itself; ``eps`` is the radius of the ball.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradprune.errors import OptionError, unknown

NormName = Literal["linf", "l2", "l1"]


@dataclass(frozen=True)
class Norm:
    """A norm and its ball around zero. The base class is the Linf norm's."""

    name: str = "linf"

    def of(self, delta: Tensor) -> Tensor:
        """Norms ``(N,)`` of perturbations ``(N, ...)``."""
        return delta.flatten(1).abs().amax(1)

    def random(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        """Perturbations uniformly distributed in the ball, shaped like ``like``."""
        return eps * (2 * _uniform(like, generator) - 1)

    def normalize(self, gradient: Tensor) -> Tensor:
        """The step of length 1 along which a linear function with this gradient grows fastest; for L1 see there."""
        return gradient.sign()

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """The closest point of the ball, in the Euclidean sense."""
        return delta.clamp(-eps, eps)


@dataclass(frozen=True)
class _L2(Norm):
    name: str = "l2"

    def of(self, delta: Tensor) -> Tensor:
        norms: Tensor = delta.flatten(1).norm(dim=1)
        return norms

    def random(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        direction = torch.empty_like(like).normal_(generator=generator)
        radius = _uniform(like[:, :1].flatten(1)[:, :1], generator) ** (1 / like[0].numel())
        return direction * _per_sample(eps * radius.squeeze(1) / _not_zero(self.of(direction)), like)

    def normalize(self, gradient: Tensor) -> Tensor:
        return gradient / _per_sample(_not_zero(self.of(gradient)), gradient)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        return delta * _per_sample((eps / _not_zero(self.of(delta))).clamp(max=1), delta)


@dataclass(frozen=True)
class _L1(Norm):
    name: str = "l1"

    def of(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(1)

    def random(self, like: Tensor, eps: float, generator: torch.Generator) -> Tensor:
        # Exponential variables divided by their sum, one more of them than there are coordinates, are uniform in the
        # simplex (Devroye 1986, "Non-Uniform Random Variate Generation", chapter XI).
        magnitude = torch.empty_like(like).exponential_(generator=generator)
        more = torch.empty(len(like), dtype=like.dtype, device=like.device).exponential_(generator=generator)
        sign = (_uniform(like, generator) - 0.5).sign()
        return sign * magnitude * _per_sample(eps / (self.of(magnitude) + more), like)

    def normalize(self, gradient: Tensor) -> Tensor:
        """The gradient with L1 norm 1: it spreads the step, where steepest ascent would change a single pixel."""
        return gradient / _per_sample(_not_zero(self.of(gradient)), gradient)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        # Duchi et al. 2008, "Efficient Projections onto the l1-Ball for Learning in High Dimensions", figure 1.
        magnitude = delta.flatten(1).abs()
        ordered = magnitude.sort(dim=1, descending=True).values
        counts = torch.arange(1, ordered.shape[1] + 1, device=delta.device, dtype=delta.dtype)
        thresholds = (ordered.cumsum(1) - eps) / counts
        last = (ordered > thresholds).sum(1, keepdim=True).clamp(min=1) - 1
        threshold = thresholds.gather(1, last).clamp(min=0)
        projected = delta.sign() * (magnitude - threshold).clamp(min=0).view_as(delta)
        # Far outside of the ball, rounding errors of the threshold may be more than the radius allows.
        return projected * _per_sample((eps / _not_zero(self.of(projected))).clamp(max=1), delta)


NORMS: dict[str, Norm] = {norm.name: norm for norm in (Norm(), _L2(), _L1())}


def get_norm(name: str) -> Norm:
    """The norm called ``name``.

    Raises:
        OptionError: There is none.
    """
    if name not in NORMS:
        raise OptionError(unknown("norm", name, list(NORMS)))
    return NORMS[name]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like).uniform_(generator=generator)


def _per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """``(N,)`` with as many dimensions as ``like``."""
    return factor.view(-1, *[1] * (like.ndim - 1))


def _not_zero(norms: Tensor) -> Tensor:
    """Norms to divide by: of a zero vector, something that leaves it zero."""
    return norms.clamp(min=math.sqrt(torch.finfo(norms.dtype).tiny))
