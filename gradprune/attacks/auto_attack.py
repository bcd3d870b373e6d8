"""AutoAttack: the ensemble by which robust accuracy is reported.

Source: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", section 5; for L1 Croce & Hein 2021, "Mind the box", section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradprune.errors import AttackError, OptionError
from gradprune.runtime import Query

from .apgd import APGD, TargetedAPGD
from .base import Attack, check_finite
from .fab import FAB
from .norms import NormName, get_norm
from .square import Square


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """APGD on cross entropy, targeted APGD, FAB-T and Square, each on what those before it have not fooled.

    The standard ensemble with its standard settings: 100 steps, 9 target classes, 5000 queries. Misclassified samples
    are returned as they came.

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius of the ball.
        steps: Of the gradient attacks; 100 is standard.
        queries: Of Square; 5000 is standard.
        targets: Classes that the targeted attacks aim at; 9 is standard. Fewer if the model has fewer classes.
    """

    norm: NormName = "linf"
    eps: float = 8 / 255
    steps: int = 100
    queries: int = 5000
    targets: int = 9

    can_be_targeted = False
    keeps_all: ClassVar[bool] = False
    """Whether every part is given all samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm)
        if self.bounds is None:
            raise OptionError("AutoAttack needs bounds: pass the smallest and the largest input")
        _ = self.parts  # whose checks are this one's

    @property
    def parts(self) -> tuple[Attack, ...]:
        """The attacks in their order."""
        ball = {"norm": self.norm, "eps": self.eps, "bounds": self.bounds}
        large = {"large_eps": self.norm == "l1"}
        return (
            APGD(steps=self.steps, **ball, **large),  # type: ignore[arg-type]
            TargetedAPGD(steps=self.steps, targets=self.targets, **ball, **large),  # type: ignore[arg-type]
            FAB(steps=self.steps, targets=self.targets, stop_at_success=True, **ball),  # type: ignore[arg-type]
            Square(queries=self.queries, **ball),  # type: ignore[arg-type]
        )

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        if x.ndim != 4:  # found now rather than after hours of the parts before Square
            raise AttackError(
                f"AutoAttack is for images (N, C, H, W), not inputs of shape {tuple(x.shape)}: use its parts"
            )
        logits = query.logits(x)
        check_finite(logits)
        result, is_open = x.clone(), ~self.is_fooled(logits, labels)

        def attacked(part: Attack, rows: Tensor) -> tuple[Tensor, Tensor]:
            found = part.run(query, x[rows], labels[rows], generator)
            return found, self.is_fooled(query.logits(found), labels[rows])

        for _ in self.in_parts(query.watch(self.usable_parts(query.classes), self.name), result, is_open, attacked):
            pass
        return result

    def in_parts(
        self,
        parts: Iterable[Attack],
        result: Tensor,
        is_open: Tensor,
        attacked: Callable[[Attack, Tensor], tuple[Tensor, Tensor]],
    ) -> Iterator[None]:
        """Run one part after the other, each on the samples that none before it has fooled.

        Args:
            parts: The parts.
            result: Adversarial examples so far ``(N, C, H, W)``; written to.
            is_open: Which samples are not fooled yet ``(N,)``; written to.
            attacked: From a part and the rows that it attacks, what it found and which of these are fooled.

        Yields:
            After every part.
        """
        for part in parts:
            rows = (is_open | self.keeps_all).nonzero().squeeze(1)
            if not len(rows):
                break
            found, fooled = attacked(part, rows)
            fooled = fooled & is_open[rows]
            result[rows[fooled]] = found[fooled]
            is_open[rows[fooled]] = False
            yield

    def usable_parts(self, classes: int) -> list[Attack]:
        """The parts that make sense for a number of classes: the targeted DLR loss needs four."""
        return [part for part in self.parts if classes >= 4 or not isinstance(part, TargetedAPGD)]
