"""Projected gradient ascent and its relatives that differ in their defaults only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradprune.errors import OptionError, unknown
from gradprune.runtime import Query
from gradprune.runtime.functions import Answer
from gradprune.runtime.losses import LABEL_LOSSES, Loss

from .base import Attack, check_start, per_sample
from .norms import Norm, NormName, get_norm

Step = Callable[[Tensor, Tensor, float], Tensor]
"""From ``x_adv``, the direction to climb and ``step_size`` to where the step leads, before projection."""

Constraint = Callable[[Tensor, Tensor], Tensor]
"""From where a step led and the clean inputs to the closest point that is allowed."""


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent of the loss in a ball around the input.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius of the ball, in the units of the inputs.
        step_size: Length of a step, in the same norm.
        steps: How many steps.
        random_start: Start at a random point of the ball instead of at the input.
        restarts: Independent runs per sample, computed as one batch; the best is kept.
        loss: ``"ce"``, ``"margin"``, ``"dlr"``; ``"difference"`` and ``"dlr-targeted"``, which know label and target;
            ``"kl"``, the divergence from the clean probabilities; or a function from logits ``(N, classes)`` and labels
            ``(N,)`` to losses ``(N,)``. Maximised for the labels, or minimised for the targets.
        keep: ``"last"`` returns where a run ends, ``"best"`` the best point on the way: one that fools the model if
            there is one, and of these or else of all the one with the largest loss.
        stop_at_success: A sample that is fooled is done: it stays what it is and leaves the batch.
        eot: Gradients to average at every step, for models that are random (Athalye et al. 2018, expectation over
            transformation).
        step: In place of a step along the normalised direction.
        constraint: In place of the projection onto ball and bounds.
    """

    norm: NormName = "linf"
    eps: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    random_start: bool = True
    restarts: int = 1
    loss: str | Loss = "ce"
    keep: Literal["last", "best"] = "last"
    stop_at_success: bool = False
    eot: int = 1
    step: Step | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm)
        self._check_positive("eps", or_zero=True)
        self._check_step_size()
        self._check_counts("steps", "restarts", "eot")
        if self.keep not in ("last", "best"):
            raise OptionError(unknown("keep", self.keep, ["last", "best"]))
        self._check_loss(self.loss, [*LABEL_LOSSES, "kl"])
        if self.loss == "kl" and self.targeted is not None:
            raise OptionError("the loss 'kl' leads away from the clean probabilities, to no target: leave out targeted")

    @property
    def ball(self) -> Norm:
        """The norm with its functions."""
        return get_norm(self.norm)

    @property
    def step_length(self) -> float:
        """How long a step is."""
        return self.step_size

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        samples = len(x)
        against = query.logits(x).softmax(1) if self.loss == "kl" else self.aimed(labels, self.loss)
        # One start after the other: the first ones are the same however many restarts there are.
        x_adv = torch.cat([self.start(x, generator) for _ in range(self.restarts)])
        x = x.repeat(self.restarts, *[1] * (x.ndim - 1))
        labels, against = labels.repeat(self.restarts, 1), against.repeat(self.restarts, 1)
        memory = self.memory(x)
        runs = Runs(x_adv, samples)
        can_leave = self.stop_at_success and query.separable and query.runtime.active_set
        keeps_path = self.keep == "best" or self.stop_at_success
        rows: Tensor | slice = slice(None)
        for step in query.steps(self.steps, self.name):
            if can_leave:
                rows = runs.open_rows()
                if not len(rows):
                    break
            here = x_adv[rows]
            losses, logits, direction = self.ascent(query, here, x[rows], against[rows], generator, memory, rows)
            if step == 0:
                check_start(query, x, logits)
            if keeps_path:
                fooled = self.is_fooled(logits, labels[rows])
                if self.keep == "last":
                    losses = losses.masked_fill(~fooled, -torch.inf)  # no point on the way but one that ends the run
                runs.record(rows, here, losses, fooled)
            moved = self.advance(here, direction)
            moved = self.constraint(moved, x[rows]) if self.constraint else self.project(moved, x[rows])
            if self.stop_at_success:
                moved = torch.where(per_sample(runs.is_open()[rows], moved), moved, here)
            x_adv = x_adv.index_copy(0, rows, moved) if isinstance(rows, Tensor) else moved
        if not keeps_path and self.restarts == 1:
            return x_adv
        rows = runs.open_rows() if can_leave else slice(None)
        if not isinstance(rows, Tensor) or len(rows):
            losses, logits = self.losses(query, x_adv[rows], against[rows])
            runs.record(rows, x_adv[rows], losses, self.is_fooled(logits, labels[rows]))
        return runs.best()

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where a run starts."""
        if not self.random_start:
            return x.clone()
        return self.clip(x + self.ball.random(x, self.eps, generator))

    def memory(self, x: Tensor) -> Tensor | None:
        """What ``ascent`` remembers from step to step, shaped like ``x``; it may write to it."""
        return None

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
        """What to maximise and its logits at ``x_adv``, and the direction to climb in.

        Args:
            query: What to ask the model with.
            x_adv: Where the runs are that have not ended.
            x: Their clean inputs.
            against: What the loss takes beside their logits: labels as ``Attack.aimed`` returns them, or clean
                probabilities.
            generator: For whatever is random.
            memory: What ``self.memory`` returned, for all runs.
            rows: Which of these are asked for.
        """
        return self.gradient(query, x_adv, against)

    def gradient(self, query: Query, x_adv: Tensor, against: Tensor) -> Answer:
        """What to maximise, logits and gradient at ``x_adv``, averaged over ``eot`` evaluations."""
        return self.average(query, x_adv, against, self.loss, self.eot)

    def losses(self, query: Query, x_adv: Tensor, against: Tensor) -> tuple[Tensor, Tensor]:
        """What to maximise and logits at ``x_adv``, without a gradient."""
        losses, logits = query.losses(x_adv, against, self.loss)
        return self.sign(self.loss) * losses, logits

    def advance(self, x_adv: Tensor, direction: Tensor) -> Tensor:
        """Where a step leads, before projection."""
        if self.step:
            return self.step(x_adv, direction, self.step_length)
        return x_adv + self.step_length * self.ball.normalize(direction)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The closest point in the ball, then within the bounds."""
        return self.clip(x + self.ball.project(x_adv - x, self.eps))

    def _check_step_size(self) -> None:
        self._check_positive("step_size", or_zero=True)


class Runs:
    """The best point of every run so far, a sample's runs being ``samples`` rows apart.

    A point that fools the model is better than any that does not; then the larger loss decides, and of equal ones the
    earlier.
    """

    def __init__(self, x_adv: Tensor, samples: int) -> None:
        self._samples = samples
        self._points = x_adv.clone()
        self._losses = torch.full((len(x_adv),), -torch.inf, dtype=x_adv.dtype, device=x_adv.device)
        self._fooled = torch.zeros(len(x_adv), dtype=torch.bool, device=x_adv.device)

    def record(self, rows: Tensor | slice, points: Tensor, losses: Tensor, fooled: Tensor) -> None:
        """Take note of one point of each of some runs."""
        was_fooled, largest = self._fooled[rows], self._losses[rows]
        better = (fooled & ~was_fooled) | ((fooled == was_fooled) & (losses > largest))
        self._points[rows] = torch.where(per_sample(better, points), points, self._points[rows])
        self._losses[rows] = torch.where(better, losses.to(largest.dtype), largest)
        self._fooled[rows] = fooled | was_fooled

    def is_open(self) -> Tensor:
        """Which runs are of a sample that no run has fooled the model with."""
        return ~self._fooled.view(-1, self._samples).any(0).repeat(len(self._fooled) // self._samples)

    def open_rows(self) -> Tensor:
        """The same as indices."""
        return self.is_open().nonzero().squeeze(1)

    def best(self) -> Tensor:
        """The best point of every sample."""
        losses, fooled = self._losses.view(-1, self._samples), self._fooled.view(-1, self._samples)
        # Runs that fool the model compete among themselves, if there are any.
        losses = losses.masked_fill(fooled.any(0) & ~fooled, -torch.inf)
        chosen = losses.argmax(0)
        return self._points[chosen * self._samples + torch.arange(self._samples, device=chosen.device)]


@dataclass(frozen=True, kw_only=True)
class BIM(PGD):
    """The basic iterative method: PGD from the input itself.

    Source: Kurakin et al. 2017, "Adversarial Examples in the Physical World".
    """

    random_start: bool = False


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """The fast gradient sign method: one step of length ``eps`` from the input.

    Source: Goodfellow et al. 2015, "Explaining and Harnessing Adversarial Examples". With another norm, the fast
    gradient method.

    Attributes:
        step_size: ``None`` for ``eps``.
    """

    step_size: float | None = None  # type: ignore[assignment]
    steps: int = 1
    random_start: bool = False

    @property
    def step_length(self) -> float:
        """How long a step is."""
        return self.eps if self.step_size is None else self.step_size

    def _check_step_size(self) -> None:
        if self.step_size is not None:
            super()._check_step_size()


@dataclass(frozen=True, kw_only=True)
class RSFGSM(FGSM):
    """FGSM from a random start, with a step of 1.25 ``eps``.

    Source: Wong et al. 2020, "Fast is better than free: Revisiting adversarial training".

    Attributes:
        step_size: ``None`` for 1.25 ``eps``.
    """

    random_start: bool = True

    @property
    def step_length(self) -> float:
        """How long a step is."""
        return 1.25 * self.eps if self.step_size is None else self.step_size
