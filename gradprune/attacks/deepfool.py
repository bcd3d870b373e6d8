"""DeepFool: to the closest boundary of the linearised classifier, again and again.

Source: Moosavi-Dezfooli et al. 2016, "DeepFool: a simple and accurate method to fool deep neural networks",
algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradprune.errors import OptionError, unknown
from gradprune.runtime import Query

from .base import Attack, check_finite, per_sample

BEYOND = 1e-4
"""How much longer a step is than the way to the boundary, so as not to end on it; as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """DeepFool. Untargeted; samples leave as soon as they are misclassified. Returned is where the last step led.

    Attributes:
        norm: ``"l2"`` or ``"linf"``.
        steps: Linearisations, at most.
        overshoot: How much farther than the boundary to go, as a share of the perturbation.
        candidates: Classes to look at: those with the largest clean logits besides the label.
    """

    norm: Literal["l2", "linf"] = "l2"
    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 9

    can_be_targeted = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l2", "linf"):
            raise OptionError(unknown("norm", self.norm, ["l2", "linf"]))
        self._check_counts("steps", "candidates")
        self._check_positive("overshoot", or_zero=True)

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        logits = query.logits(x)
        check_finite(logits)
        order = logits.scatter(1, labels[:, :1], -torch.inf).argsort(dim=1, descending=True)
        result, total = x.clone(), torch.zeros_like(x)
        rows = (logits.argmax(1) == labels[:, 0]).nonzero().squeeze(1)
        for _ in query.steps(self.steps, self.name):
            if not len(rows):
                break
            step = self._closest_boundary(query, result[rows], labels[rows], order[rows])
            total[rows] += step
            result[rows] = self.clip(x[rows] + (1 + self.overshoot) * total[rows])
            rows = rows[~self.is_fooled(query.logits(result[rows]), labels[rows])]
        return result

    def _closest_boundary(self, query: Query, x_adv: Tensor, labels: Tensor, order: Tensor) -> Tensor:
        """The smallest step to where another class's linearised logit equals the label's."""
        smallest = torch.full((len(x_adv),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
        step = torch.zeros_like(x_adv)
        tiny = torch.finfo(x_adv.dtype).tiny
        for place in range(min(self.candidates, query.classes - 1)):
            pair = torch.stack([labels[:, 0], order[:, place]], dim=1)
            gap, _, gradient = query.gradient(x_adv, pair, "difference")
            if self.norm == "l2":
                length = gradient.flatten(1).norm(dim=1).clamp(min=tiny**0.5)
                direction = gradient / per_sample(length, gradient)
            else:
                length = gradient.flatten(1).abs().sum(1).clamp(min=tiny**0.5)
                direction = gradient.sign()
            distance = gap.abs() / length
            closer = distance < smallest
            smallest = torch.where(closer, distance, smallest)
            step = torch.where(per_sample(closer, step), per_sample(distance + BEYOND, step) * direction, step)
        return step
