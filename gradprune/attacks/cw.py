"""The attack of Carlini and Wagner: the smallest L2 perturbation, by gradient descent on it and on a margin.

Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section VI.A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradprune.errors import OptionError
from gradprune.runtime import Query

from .base import Attack, check_finite, per_sample

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam (Kingma & Ba 2015)."""

INSIDE = 0.999999
"""How close to the bounds the descent may start, in halves of the range, for at the bounds tanh has no inverse."""


@dataclass(frozen=True, kw_only=True)
class CW(Attack):
    """Carlini & Wagner's L2 attack. What it does not succeed for is returned as it came.

    Attributes:
        constant: Weight of the margin beside the squared distance, to begin with.
        searches: Values of it to try for each sample, by bisection.
        steps: Steps of Adam for each.
        learning_rate: Of Adam.
        confidence: Margin to reach, in logits.
    """

    constant: float = 1.0
    searches: int = 1
    steps: int = 50
    learning_rate: float = 0.01
    confidence: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bounds is None:
            raise OptionError("CW writes inputs as tanh, which needs bounds: pass the smallest and the largest input")
        self._check_counts("searches", "steps")
        self._check_positive("constant", "learning_rate")
        self._check_positive("confidence", or_zero=True)

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        result, distance = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        constant = torch.full_like(distance, self.constant)
        lower, upper = torch.zeros_like(distance), torch.full_like(distance, torch.inf)
        for _ in query.steps(self.searches, f"{self.name}, constants"):
            points, distances = self._descend(query, x, labels, constant)
            found, better = distances.isfinite(), distances < distance
            result = torch.where(per_sample(better, x), points, result)
            distance = torch.minimum(distance, distances)
            upper, lower = torch.where(found, constant, upper), torch.where(found, lower, constant)
            constant = torch.where(upper.isfinite(), (lower + upper) / 2, constant * 10)
        return result

    def _descend(self, query: Query, x: Tensor, labels: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        """One run: the closest points that succeed, and their distances ``(N,)``, infinite where there is none."""
        assert self.bounds is not None
        middle, half = sum(self.bounds) / 2, (self.bounds[1] - self.bounds[0]) / 2
        result, distance = x.clone(), torch.full_like(constant, torch.inf)
        # The loss that is differentiated is the margin of the label; of the target, where there is one.
        aimed, sign = self.aimed(labels, "margin"), self.sign("margin")
        w = ((x - middle) / half).clamp(-INSIDE, INSIDE).atanh()
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, self.steps + 2):
            tanh = w.tanh()
            point = middle + half * tanh
            if step > self.steps:  # where the last step led
                margins, logits = query.losses(point, aimed, "margin")
                gradient = point
            else:
                margins, logits, gradient = query.gradient(point, aimed, "margin")
            if step == 1:
                check_finite(logits)
            margins = sign * margins
            squared = (point - x).flatten(1).square().sum(1)
            better = self.is_fooled(logits, labels) & (margins >= self.confidence) & (squared.sqrt() < distance)
            result = torch.where(per_sample(better, x), point, result)
            distance = torch.where(better, squared.sqrt(), distance)
            if step > self.steps:
                break
            pushes = (margins < self.confidence).to(x.dtype) * constant
            slope = 2 * (point - x) - per_sample(sign * pushes, x) * gradient
            slope = slope * half * (1 - tanh.square())
            mean = BETAS[0] * mean + (1 - BETAS[0]) * slope
            square = BETAS[1] * square + (1 - BETAS[1]) * slope.square()
            scaled = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            w = w - self.learning_rate * mean / (1 - BETAS[0] ** step) / scaled
        return result, distance
