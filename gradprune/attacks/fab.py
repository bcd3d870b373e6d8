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
        # Of the runs that are not over; copied anew only when one is.
        rows = torch.arange(len(x), device=x.device)
        clean, labels, point, closest, shortest = x, pair, start, result, distance
        leaves = self.stop_at_success and query.separable and query.runtime.active_set
        for _ in query.steps(self.steps, self.name):
            if leaves:
                stay = (shortest > (self.eps or 0)).nonzero().squeeze(1)
                if len(stay) < len(rows):
                    result[rows], distance[rows] = closest, shortest
                    rows, clean, labels, point = rows[stay], clean[stay], labels[stay], point[stay]
                    closest, shortest = closest[stay], shortest[stay]
                if not len(rows):
                    break
            gap, _, normal = query.gradient(point, labels, "difference")
            offset = torch.linalg.vecdot(normal.flatten(1), point.flatten(1)) - gap
            # Both the point and the input itself go to the boundary as it looks from the point.
            step, direct = self.to_plane(torch.cat([point, clean]), normal, offset).chunk(2)
            length, direct_length = (self.ball.of(one).clamp(min=SMALLEST) for one in (step, direct))
            weight = per_sample((length / (length + direct_length)).clamp(0, self.alpha_max), x)
            point = (point + self.overshoot * step) * (1 - weight) + (clean + self.overshoot * direct) * weight
            point = self.clip(point)
            fooled = self.is_fooled(query.logits(point), labels)
            length = self.ball.of(point - clean)
            closer = fooled & (length < shortest)
            closest = torch.where(per_sample(closer, x), point, closest)
            shortest = torch.where(closer, length, shortest)
            point = torch.where(per_sample(fooled, x), clean + (point - clean) * self.backward, point)
        result[rows], distance[rows] = closest, shortest
        return result, distance

    def to_plane(self, point: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
        """The shortest step, in the attack's norm, from each point to its hyperplane ``<normal, z> = offset``.

        Within the bounds; where the plane does not cross them, the step that comes closest to it.

        Args:
            point: ``(N, ...)``, or several of them for each plane, ``(times * N, ...)``.
            normal: ``(N, ...)``.
            offset: ``(N,)``.
        """
        w = normal.flatten(1)
        flat = point.reshape(-1, *w.shape)
        tiny = torch.finfo(w.dtype).tiny
        # Only the plane matters, not the length of its normal, of which squares may be too small for a number.
        scale = w.abs().amax(1).clamp(min=tiny)
        w, offset = w / scale[:, None], offset / scale
        missing: Tensor = offset - torch.linalg.vecdot(w, flat)
        direction = w.sign() * missing.sign()[..., None]
        if self.bounds is None:
            room = torch.full_like(flat, torch.inf)
        else:
            low, high = (torch.tensor(bound, dtype=w.dtype, device=w.device) for bound in self.bounds)
            # Interpolation is exact at both ends, and here on a CPU several times as fast as a choice.
            room = ((torch.lerp(low, high, direction.clamp(min=0)) - flat) * direction).clamp(min=0)
        slope, missing = w.abs(), missing.abs()
        if self.norm == "linf":
            # Every coordinate moves by the same length, as far as there is room.
            length = torch.minimum(_water_level(slope, room, missing)[..., None], room)
        elif self.norm == "l2":
            # Every coordinate moves in proportion to its slope, as far as there is room.
            level = _water_level(slope.square(), room / slope.clamp(min=tiny), missing)
            length = torch.minimum(level[..., None] * slope, room)
        else:
            # The steepest coordinate moves as far as there is room, then the next.
            ordered, steepest = slope.sort(dim=1, descending=True)
            steepest = steepest.expand_as(flat)
            there = room.gather(2, steepest)
            gained = (ordered * there).nan_to_num(nan=0.0)
            before = F.pad(gained.cumsum(2)[..., :-1], (1, 0))
            share = (missing[..., None] - before).clamp(min=0) / ordered.clamp(min=tiny)
            length = torch.zeros_like(room).scatter(2, steepest, torch.minimum(share, there))
        # Where the normal is zero the direction is, and a length that is no number counts for nothing.
        return (direction * length).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).view_as(point)


def _water_level(weight: Tensor, limit: Tensor, total: Tensor) -> Tensor:
    """The level at which the sum of ``weight * min(level, limit)`` over the last dimension reaches ``total``.

    If it never does, some level that is at least the largest limit.

    The sum grows along a concave chain of lines, so the line at a level too low meets ``total`` at one that is higher
    and not too high: Newton's method climbs to the level and, as each step passes a limit or is the last, gets there.
    A few steps do, each a fraction of what sorting the limits would take.

    Args:
        weight: ``(N, features)``, not negative.
        limit: ``(..., N, features)``, not negative; infinite for none.
        total: ``(..., N)``, not negative.
    """
    tiny = torch.finfo(limit.dtype).tiny
    capacity = (weight * limit).nan_to_num(nan=0.0, posinf=0.0)
    level = total / weight.sum(-1).clamp(min=tiny)
    is_full = torch.empty_like(limit)
    while True:
        torch.le(limit, level[..., None], out=is_full)  # as numbers, which are multiplied faster than truth values
        rising = torch.linalg.vecdot(weight, 1 - is_full).clamp(min=tiny)
        higher = (total - torch.linalg.vecdot(capacity, is_full)) / rising
        if not bool((higher > level).any()):
            return level
        level = torch.maximum(level, higher)
