"""FAB: the closest point of another class, between projections onto linearised boundaries and steps back to the input.

Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", algorithm 1
and section 3.5; against one class at a time as in AutoAttack (FAB-T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprune.errors import OptionError
from gradprune.runtime import Query

from .base import Attack, check_finite, per_sample
from .norms import Norm, NormName, get_norm

FARTHEST = 1e10
"""Stands for no perturbation found yet."""

SMALLEST = 1e-8


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """FAB-T. Returned is the smallest perturbation found, if it is within ``eps``; else the input as it came.

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius within which a perturbation counts; restarts begin within it. ``None`` for any.
        steps: Steps against each class.
        restarts: Runs against each class; the first starts from the input itself.
        targets: How many classes: those with the largest clean logits besides the label.
        alpha_max: Largest weight of the way back to the input (alpha_max in the paper).
        overshoot: How far to go beyond the boundary (eta in the paper).
        backward: Share of the way that is kept after a success (beta in the paper).
        stop_at_success: A sample for which a perturbation within ``eps`` was found is done, so that what is returned
            is not the smallest. For evaluations.
    """

    norm: NormName = "linf"
    eps: float | None = 8 / 255
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    overshoot: float = 1.05
    backward: float = 0.9
    stop_at_success: bool = False

    can_be_targeted = False

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm)
        self._check_counts("steps", "restarts", "targets")
        self._check_positive("alpha_max", "overshoot", "backward", *(() if self.eps is None else ("eps",)))
        if self.eps is None and (self.restarts > 1 or self.stop_at_success):
            raise OptionError("restarts and stop_at_success need eps: restarts begin within it, and success is there")

    @property
    def ball(self) -> Norm:
        """The norm with its functions."""
        return get_norm(self.norm)

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        logits = query.logits(x)
        check_finite(logits)
        order = logits.scatter(1, labels[:, :1], -torch.inf).argsort(dim=1, descending=True)
        result = x.clone()
        distance = torch.where(self.is_fooled(logits, labels), 0.0, torch.full_like(logits[:, 0], FARTHEST))
        for restart in range(self.restarts):
            for place in range(min(self.targets, query.classes - 1)):
                noise = self.ball.random(x, 1.0, generator) if restart else None
                done = distance == 0
                if self.stop_at_success and self.eps is not None:
                    done |= distance <= self.eps
                rows = (~done).nonzero().squeeze(1)
                if not len(rows):
                    break
                pair = torch.stack([labels[:, 0], order[:, place]], dim=1)[rows]
                start = x[rows]
                if noise is not None:
                    assert self.eps is not None
                    length = distance[rows].clamp(max=self.eps) / self.ball.of(noise[rows]).clamp(min=SMALLEST) / 2
                    start = self.clip(start + per_sample(length, x) * noise[rows])
                points, distances = self._approach(query, x[rows], pair, start, distance[rows])
                result[rows] = torch.where(per_sample(distances < distance[rows], x), points, result[rows])
                distance[rows] = torch.minimum(distances, distance[rows])
        if self.eps is None:
            return result
        return torch.where(per_sample(distance <= self.eps, x), result, x)

    def _approach(self, query: Query, x: Tensor, pair: Tensor, start: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """One run against one class; the closest point of another class than the label, and its distance ``(N,)``."""
        result, distance = x.clone(), known.clone()
        point = start
        open_rows = torch.arange(len(x), device=x.device)
        leaves = self.stop_at_success and query.separable and query.runtime.active_set
        for _ in query.steps(self.steps, self.name):
            if leaves:
                stay = (distance[open_rows] > (self.eps or 0)).nonzero().squeeze(1)
                if len(stay) < len(open_rows):
                    open_rows, point = open_rows[stay], point[stay]
                if not len(open_rows):
                    break
            clean, labels = x[open_rows], pair[open_rows]
            gap, _, normal = query.gradient(point, labels, "difference")
            offset = (normal * point).flatten(1).sum(1) - gap
            # Both the point and the input itself go to the boundary as it looks from the point.
            steps = self.to_plane(torch.cat([point, clean]), normal.repeat(2, *[1] * (x.ndim - 1)), offset.repeat(2))
            step, direct = steps.chunk(2)
            length, direct_length = (self.ball.of(one).clamp(min=SMALLEST) for one in (step, direct))
            weight = per_sample((length / (length + direct_length)).clamp(0, self.alpha_max), x)
            point = (point + self.overshoot * step) * (1 - weight) + (clean + self.overshoot * direct) * weight
            point = self.clip(point)
            fooled = self.is_fooled(query.logits(point), labels)
            length = self.ball.of(point - clean)
            closer = fooled & (length < distance[open_rows])
            result[open_rows] = torch.where(per_sample(closer, x), point, result[open_rows])
            distance[open_rows] = torch.where(closer, length, distance[open_rows])
            point = torch.where(per_sample(fooled, x), clean + (point - clean) * self.backward, point)
        return result, distance

    def to_plane(self, point: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
        """The shortest step, in the attack's norm, from each point to its hyperplane ``<normal, z> = offset``.

        Within the bounds; where the plane does not cross them, the step that comes closest to it.

        Args:
            point: ``(N, ...)``.
            normal: Shaped like ``point``.
            offset: ``(N,)``.
        """
        flat, w = point.flatten(1), normal.flatten(1)
        # Only the plane matters, not the length of its normal, of which squares may be too small for a number.
        scale = w.abs().amax(1).clamp(min=torch.finfo(w.dtype).tiny)
        w, offset = w / scale[:, None], offset / scale
        missing = offset - (w * flat).sum(1)
        direction = w.sign() * missing.sign()[:, None]
        if self.bounds is None:
            room = torch.full_like(flat, torch.inf)
        else:
            room = torch.where(direction > 0, self.bounds[1] - flat, flat - self.bounds[0]).clamp(min=0)
        slope = w.abs()
        missing = missing.abs()
        if self.norm == "linf":
            # Every coordinate moves by the same length, as far as there is room.
            level = _water_level(slope, room, missing)
            length = torch.minimum(level[:, None], room)
        elif self.norm == "l2":
            # Every coordinate moves in proportion to its slope, as far as there is room.
            level = _water_level(slope.square(), room / slope.clamp(min=torch.finfo(w.dtype).tiny), missing)
            length = torch.minimum(level[:, None] * slope, room)
        else:
            # The steepest coordinate moves as far as there is room, then the next.
            steepest = slope.argsort(dim=1, descending=True)
            ordered = slope.gather(1, steepest)
            gained = (ordered * room.gather(1, steepest)).nan_to_num(nan=0.0)
            before = F.pad(gained.cumsum(1)[:, :-1], (1, 0))
            share = (missing[:, None] - before).clamp(min=0) / ordered.clamp(min=torch.finfo(w.dtype).tiny)
            length = torch.zeros_like(room).scatter(1, steepest, torch.minimum(share, room.gather(1, steepest)))
        length = torch.where(slope > 0, length, torch.zeros_like(length))
        return (direction * length).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).view_as(point)


def _water_level(weight: Tensor, limit: Tensor, total: Tensor) -> Tensor:
    """The level ``(N,)`` at which the sum of ``weight * min(level, limit)`` over each row reaches ``total``.

    If it never does, the largest finite limit.
    """
    ordered, order = limit.sort(dim=1)
    weight = weight.gather(1, order)
    finite = ordered.isfinite()
    filled = (weight * torch.where(finite, ordered, torch.zeros_like(ordered))).cumsum(1)
    # The weight of what still rises above each limit; summed from the end, for a difference would cancel.
    rising = weight.flip(1).cumsum(1).flip(1) - weight
    at_limit = torch.where(finite, filled + rising * torch.where(finite, ordered, torch.zeros_like(ordered)), torch.inf)
    place = (at_limit < total[:, None]).sum(1, keepdim=True).clamp(max=limit.shape[1] - 1)
    below = torch.where(place > 0, filled.gather(1, (place - 1).clamp(min=0)), torch.zeros_like(total[:, None]))
    slope = (rising + weight).gather(1, place).clamp(min=torch.finfo(limit.dtype).tiny)
    level = (total[:, None] - below) / slope
    highest = torch.where(finite, ordered, torch.zeros_like(ordered)).amax(1, keepdim=True)
    bounded = finite.all(1, keepdim=True)
    return torch.where(bounded, torch.minimum(level, highest), level).squeeze(1)
