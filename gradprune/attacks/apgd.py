"""Auto-PGD: projected gradient ascent that finds its step size by itself.

Sources: Croce & Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", algorithm 1 (Linf, L2); Croce & Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image
classifiers" (L1).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gradprune.errors import OptionError, unknown
from gradprune.runtime import Query
from gradprune.runtime.functions import Answer
from gradprune.runtime.losses import Loss

from .base import TWO_SIDED, Attack, check_finite, check_start, per_sample
from .norms import Norm, NormName, get_norm

MOMENTUM = 0.75
FIRST_PERIOD, SHORTEST_PERIOD, PERIOD_DECREASE = 0.22, 0.06, 0.03
"""Checkpoints of Linf and L2, in shares of the steps."""
L1_PERIOD = 0.04
L1_SPARSITY = 0.2
L1_SPARSER = 1.5
L1_CHANGE = 0.95
L1_STEP_DECREASE, L1_STEP_RANGE = 1.5, 10.0
ONE_STAGE = ((1.0, 1.0),)
LARGE_EPS_STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""Balls to climb in: radius in ``eps`` and share of the steps."""


@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD.

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius of the ball.
        steps: How many steps; nothing else has to be chosen.
        restarts: Independent runs, each on the samples that no earlier one has fooled.
        loss: ``"ce"``, ``"dlr"``, ``"dlr-targeted"`` (against ``targeted``), ``"margin"``, or a function from logits
            and labels ``(N,)`` to losses ``(N,)``.
        rho: Share of steps that have to increase the loss for the step size to stay.
        eot: Gradients to average at every step.
        large_eps: Begin in balls three and two times as large; as AutoAttack does for L1.
        stop_at_success: A sample that is fooled leaves the batch. What is returned for samples that are not fooled is
            the same.
    """

    norm: NormName = "linf"
    eps: float = 8 / 255
    steps: int = 100
    restarts: int = 1
    loss: str | Loss = "ce"
    rho: float = 0.75
    eot: int = 1
    large_eps: bool = False
    stop_at_success: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm)
        self._check_positive("eps", "rho")
        self._check_counts("steps", "restarts", "eot")
        self._check_loss(self.loss)
        if self.norm == "l1" and self.bounds is None:
            raise OptionError("APGD in the L1 ball projects onto its intersection with the bounds, which are missing")

    @property
    def ball(self) -> Norm:
        """The norm with its functions."""
        return get_norm(self.norm)

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        result = x.clone()
        losses = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.restarts):
            rows = (~fooled).nonzero().squeeze(1)
            if not len(rows):
                break
            start = self.start(x, generator)[rows]  # drawn for all: a sample's start does not depend on the others
            found = self.maximize(query, x[rows], labels[rows], start)
            better = found.fooled | (found.best_loss > losses[rows])
            result[rows] = torch.where(per_sample(better, start), found.result(), result[rows])
            losses[rows] = torch.where(better, found.best_loss, losses[rows])
            fooled[rows] = found.fooled
        return result

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random point on the boundary of the ball; of the L1 ball, within the bounds."""
        if self.norm == "linf":
            noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
        else:
            noise = torch.empty_like(x).normal_(generator=generator)
        eps = self.eps * self._stages[0][0]
        if self.norm == "l1":
            return self._into(x, x + noise, eps)
        tiny = torch.finfo(x.dtype).tiny
        return self.clip(x + eps * noise / per_sample(self.ball.of(noise).clamp(min=tiny), x))

    def maximize(self, query: Query, x: Tensor, labels: Tensor, start: Tensor) -> _State:
        """One run from ``start``, through larger balls first if ``large_eps``."""
        left = self.steps
        *larger, _ = self._stages
        for factor, share in larger:
            eps, steps = factor * self.eps, int(share * self.steps)
            if steps:
                start = self._climb(query, x, labels, self._into(x, start, eps), eps, steps, leave=False).best
                left -= steps
        if larger:
            start = self._into(x, start, self.eps)
        return self._climb(query, x, labels, start, self.eps, left, leave=True)

    @property
    def _stages(self) -> tuple[tuple[float, float], ...]:
        return LARGE_EPS_STAGES if self.large_eps else ONE_STAGE

    def _climb(
        self, query: Query, x: Tensor, labels: Tensor, start: Tensor, eps: float, steps: int, *, leave: bool
    ) -> _State:
        """The algorithm itself, in a ball of radius ``eps``."""
        losses, logits, gradient = self._ask(query, start, labels)
        check_start(query, x, logits)
        state = _State.at(x, labels, start, losses, gradient, self.is_fooled(logits, labels))
        state.step_size = torch.full_like(losses, eps if self.norm == "l1" else 2 * eps)
        if self.large_eps:
            state.nonzero = _count_nonzero(start - x)
            state.density = state.nonzero / x[0].numel() / L1_SPARSER
        else:
            state.nonzero = torch.full_like(losses, x[0].numel())
            state.density = torch.full_like(losses, L1_SPARSITY)
        # In place of the initial losses there is zero, with which the published code compares the first step's: results
        # are to be those of the code that robust accuracies are reported with, if one of the paper and it has to give.
        state.history = losses.new_zeros(len(x), steps + 1)
        ended = _Ended(state)
        can_leave = leave and self.stop_at_success and query.separable and query.runtime.active_set
        period = max(int((L1_PERIOD if self.norm == "l1" else FIRST_PERIOD) * steps), 1)
        since = 0
        for step in query.steps(steps, self.name):
            if can_leave:
                state = ended.leave(state)
                if not len(state.x):
                    break
            moved = self._move(state, eps, first=step == 0)
            state.previous, state.point = state.point, moved
            losses, logits, state.gradient = self._ask(query, moved, state.labels)
            state.history[:, step + 1] = losses
            state.record(losses, self.is_fooled(logits, state.labels))
            since += 1
            if since == period:
                since = 0
                if self.norm == "l1":
                    self._check_l1(state, eps)
                else:
                    self._check(state, step + 1, period)
                    shorter = period - max(int(PERIOD_DECREASE * steps), 1)
                    period = max(shorter, int(SHORTEST_PERIOD * steps), 1)
        return ended.all(state)

    def _ask(self, query: Query, point: Tensor, labels: Tensor) -> Answer:
        return self.average(query, point, self.aimed(labels, self.loss), self.loss, self.eot)

    # --- One step, by norm --------------------------------------------------------------------------------------------

    def _move(self, state: _State, eps: float, *, first: bool) -> Tensor:
        x, point = state.x, state.point
        step_size = per_sample(state.step_size, x)
        if self.norm == "l1":
            sparse = _largest(state.gradient, state.density).sign()
            step = step_size * sparse / per_sample(sparse.abs().flatten(1).sum(1) + 1e-10, x)
            return self._into(x, point + step, eps)
        ahead = self._into(x, point + step_size * self.ball.normalize(state.gradient), eps)
        weight = 1.0 if first else MOMENTUM
        moved = point + weight * (ahead - point) + (1 - weight) * (point - state.previous)
        return self._into(x, moved, eps)

    def _into(self, x: Tensor, point: Tensor, eps: float) -> Tensor:
        """The closest point in the ball and within the bounds; for L2 first of the ball, then within the bounds."""
        if self.norm != "l1":
            return self.clip(x + self.ball.project(point - x, eps))
        assert self.bounds is not None
        return self.clip(x + project_l1(x, point - x, eps, self.bounds))

    def _check(self, state: _State, step: int, period: int) -> None:
        """Halve the step size and go back to the best point where the loss oscillates or has not improved."""
        recent = state.history[:, step - period : step + 1]
        increases = (recent[:, 1:] > recent[:, :-1]).sum(1)
        stuck = increases <= self.rho * period
        stuck |= ~state.was_reduced & (state.best_at_check >= state.best_loss)
        state.was_reduced = stuck
        state.best_at_check = state.best_loss.clone()
        state.step_size = torch.where(stuck, state.step_size / 2, state.step_size)
        state.go_back(stuck)

    def _check_l1(self, state: _State, eps: float) -> None:
        """Adapt the density of the steps to that of the best perturbation, and their size to whether that changes."""
        nonzero = _count_nonzero(state.best - state.x)
        sparser = nonzero < L1_CHANGE * state.nonzero
        state.density = nonzero / state.x[0].numel() / L1_SPARSER
        smaller = (state.step_size / L1_STEP_DECREASE).clamp(eps / L1_STEP_RANGE, eps)
        state.step_size = torch.where(sparser, torch.full_like(smaller, eps), smaller)
        state.nonzero = nonzero
        state.go_back(sparser)


def project_l1(x: Tensor, delta: Tensor, eps: float, bounds: tuple[float, float]) -> Tensor:
    """The point closest to ``delta`` in the L1 ball for which ``x + delta`` is within the bounds.

    Every coordinate becomes ``min(max(|delta| - threshold, 0), room)`` (Croce & Hein 2021, proposition 2.1); the sum of
    these falls with the threshold, linearly between kinks, among which the right one is found by bisection.
    """
    low, high = bounds
    magnitude, sign = delta.flatten(1).abs(), delta.flatten(1).sign()
    flat = x.flatten(1)
    room = torch.where(sign > 0, high - flat, flat - low).clamp(min=0)

    def total(threshold: Tensor) -> Tensor:
        return torch.minimum((magnitude - threshold).clamp(min=0), room).sum(1, keepdim=True)

    zero = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
    kinks = torch.cat([zero, magnitude, (magnitude - room).clamp(min=0)], dim=1).sort(dim=1).values
    first = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    last = torch.full_like(first, kinks.shape[1] - 1)  # where the total is zero
    for _ in range(kinks.shape[1].bit_length()):
        middle = (first + last) // 2
        is_within = total(kinks.gather(1, middle)) <= eps
        first, last = torch.where(is_within, first, middle), torch.where(is_within, middle, last)
    # The total is within eps at ``last`` and, unless that is the very first kink, above it at the one before.
    right, left = kinks.gather(1, last), kinks.gather(1, (last - 1).clamp(min=0))
    above, below = total(left), total(right)
    tiny = torch.finfo(x.dtype).tiny
    threshold = torch.where(above > eps, left + (right - left) * (above - eps) / (above - below).clamp(min=tiny), right)
    length = torch.minimum((magnitude - threshold).clamp(min=0), room)
    return (sign * length).view_as(delta)


def _count_nonzero(delta: Tensor) -> Tensor:
    return delta.flatten(1).ne(0).sum(1).to(delta.dtype)


def _largest(gradient: Tensor, density: Tensor) -> Tensor:
    """The gradient where it is among the largest, everywhere else zero."""
    flat = gradient.flatten(1)
    features = flat.shape[1]
    index = ((1 - density) * features).long().clamp(0, features - 1)
    threshold = flat.abs().sort(dim=1).values.gather(1, index[:, None])
    return (flat * (flat.abs() >= threshold)).view_as(gradient)


@dataclass
class _State:
    """Where each run is. All tensors have a row for each."""

    x: Tensor
    labels: Tensor
    point: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    fooling: Tensor
    fooled: Tensor
    best_at_check: Tensor
    was_reduced: Tensor
    step_size: Tensor
    density: Tensor
    nonzero: Tensor
    history: Tensor

    @staticmethod
    def at(x: Tensor, labels: Tensor, start: Tensor, losses: Tensor, gradient: Tensor, fooled: Tensor) -> _State:
        """All runs at their start."""
        return _State(
            x=x,
            labels=labels,
            point=start,
            previous=start,
            gradient=gradient,
            best=start.clone(),
            best_gradient=gradient.clone(),
            best_loss=losses.clone(),
            fooling=start.clone(),
            fooled=fooled,
            best_at_check=losses.clone(),
            was_reduced=torch.ones_like(fooled),
            step_size=losses,
            density=losses,
            nonzero=torch.zeros_like(losses),
            history=losses[:, None],
        )

    def record(self, losses: Tensor, fooled: Tensor) -> None:
        """Take note of the point where every run is now."""
        better = losses > self.best_loss
        self.best = torch.where(per_sample(better, self.best), self.point, self.best)
        self.best_gradient = torch.where(per_sample(better, self.best), self.gradient, self.best_gradient)
        self.best_loss = torch.where(better, losses, self.best_loss)
        self.fooling = torch.where(per_sample(fooled, self.best), self.point, self.fooling)
        self.fooled = self.fooled | fooled

    def go_back(self, rows: Tensor) -> None:
        """Return some runs to their best point."""
        self.point = torch.where(per_sample(rows, self.point), self.best, self.point)
        self.gradient = torch.where(per_sample(rows, self.point), self.best_gradient, self.gradient)

    def result(self) -> Tensor:
        """A point that fools the model where one was found, else that of the largest loss."""
        return torch.where(per_sample(self.fooled, self.best), self.fooling, self.best)

    def take(self, rows: Tensor) -> _State:
        """Some of the runs."""
        return _State(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class _Ended:
    """Runs that have left, and where they were among all."""

    def __init__(self, state: _State) -> None:
        self._all = state.take(torch.arange(len(state.x), device=state.x.device))
        self._rows = torch.arange(len(state.x), device=state.x.device)

    def leave(self, state: _State) -> _State:
        """Put runs aside that have fooled the model; returns the others."""
        if not bool(state.fooled.any()):
            return state
        self._store(state)
        rows = (~state.fooled).nonzero().squeeze(1)
        self._rows = self._rows[rows]
        return state.take(rows)

    def all(self, state: _State) -> _State:
        """All runs, given those that have not left."""
        self._store(state)
        return self._all

    def _store(self, state: _State) -> None:
        for field in fields(state):
            getattr(self._all, field.name)[self._rows] = getattr(state, field.name)


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(APGD):
    """APGD with the targeted DLR loss against several classes in turn.

    Source: Croce & Hein 2020, section 4.2.

    Attributes:
        loss: ``"dlr-targeted"``, which needs four classes, or ``"difference"``.
        targets: How many classes: those with the largest clean logits besides the label.
    """

    loss: str | Loss = "dlr-targeted"
    targets: int = 9

    can_be_targeted = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_counts("targets")

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        logits = query.logits(x)
        check_finite(logits)
        order = logits.scatter(1, labels[:, :1], -torch.inf).argsort(dim=1, descending=True)
        result = x.clone()
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.restarts):
            for place in range(min(self.targets, query.classes - 1)):
                start = self.start(x, generator)
                rows = (~fooled).nonzero().squeeze(1)
                if not len(rows):
                    return result
                aimed = torch.stack([labels[:, 0], order[:, place]], dim=1)[rows]
                found = self.maximize(query, x[rows], aimed, start[rows])
                result[rows] = found.result()
                fooled[rows] = found.fooled
        return result

    def _check_loss(self, loss: str | Loss, names: Collection[str] = TWO_SIDED) -> None:
        if loss not in names:
            raise OptionError(unknown("loss of label and target", loss, names))
