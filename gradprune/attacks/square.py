"""Square: random search with square-shaped changes, which asks for logits only.

Source: Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial attack via random search",
algorithms 1 to 3; the L1 variant is that of Croce & Hein 2021, "Mind the box", section 5.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradprune.errors import AttackError, OptionError
from gradprune.runtime import Query

from .apgd import project_l1
from .base import Attack, check_finite, per_sample
from .norms import Norm, NormName, get_norm

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After how many of 10,000 queries the changed share of the image is halved."""


@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square attack on images ``(N, C, H, W)``. Samples leave as soon as they are misclassified.

    Attributes:
        norm: ``"linf"``, ``"l2"`` or ``"l1"``.
        eps: Radius of the ball.
        queries: Forward passes per sample, at most, besides the first.
        restarts: Independent runs, each on the samples that no earlier one has fooled.
        share: Share of the pixels that the first changes cover (p in the paper).
    """

    norm: NormName = "linf"
    eps: float = 8 / 255
    queries: int = 5000
    restarts: int = 1
    share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        get_norm(self.norm)
        if self.bounds is None:
            raise OptionError("Square needs bounds: pass the smallest and the largest input")
        self._check_positive("eps", "share")
        if self.share > 1:
            raise OptionError(f"share is one of the pixels, at most 1, not {self.share}")
        self._check_counts("queries", "restarts")

    @property
    def ball(self) -> Norm:
        """The norm with its functions."""
        return get_norm(self.norm)

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """See ``Attack.run``."""
        if x.ndim != 4:
            raise AttackError(f"Square changes squares of images (N, C, H, W), not inputs of shape {tuple(x.shape)}")
        logits = query.logits(x)
        check_finite(logits)
        result = x.clone()
        open_rows = (~self.is_fooled(logits, labels)).nonzero().squeeze(1)
        # Places are drawn on the CPU, where reading them does not wait for a device.
        places = torch.Generator().manual_seed(generator.initial_seed())
        for _ in range(self.restarts):
            if not len(open_rows):
                break
            points, fooled = self._search(query, x, labels, open_rows, generator, places)
            result[open_rows] = points
            open_rows = open_rows[~fooled]
        return result

    def _search(
        self,
        query: Query,
        x: Tensor,
        labels: Tensor,
        chosen: Tensor,
        generator: torch.Generator,
        places: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """One run on the ``chosen`` samples: the points reached, and whether they fool the model.

        What is random is drawn for all samples, so that no sample's search depends on which others are left.
        """
        sign, point = self.sign("margin"), self._start(x, generator, places)[chosen]
        rows, labels = chosen, labels[chosen]
        aimed = self.aimed(labels, "margin")
        margins, logits = query.losses(point, aimed, "margin")
        best, fooled = sign * margins, self.is_fooled(logits, labels)
        result, is_fooled = point.clone(), fooled.clone()
        left = torch.arange(len(chosen), device=x.device)  # what follows is of these, and copied when one leaves
        propose = self._propose_linf if self.norm == "linf" else self._propose
        for step in query.steps(self.queries, self.name):
            if bool(fooled.any()):
                result[left], is_fooled[left] = point, fooled
                stay = (~fooled).nonzero().squeeze(1)
                left, rows, labels, aimed = left[stay], rows[stay], labels[stay], aimed[stay]
                point, best, fooled = point[stay], best[stay], fooled[stay]
            if not len(left):
                break
            moved = propose(x, point, rows, self.share_at(step), generator, places)
            margins, logits = query.losses(moved, aimed, "margin")
            margins, succeeds = sign * margins, self.is_fooled(logits, labels)
            better = (succeeds | (margins > best)).nonzero().squeeze(1)
            if len(better):  # of most queries, nothing is
                point[better], best[better], fooled = moved[better], margins[better], succeeds
        result[left], is_fooled[left] = point, fooled
        return result, is_fooled

    def share_at(self, step: int) -> float:
        """Share of the pixels to change at a step.

        It falls with the share of the queries that are spent, as in the paper. The published AutoAttack has the steps
        of 10,000 queries for its 5000, so that squares never get as small; more samples then stay robust.
        """
        return self.share / 2.0 ** bisect_left(HALVINGS, int(step / self.queries * 10_000))

    def _start(self, x: Tensor, generator: torch.Generator, places: torch.Generator) -> Tensor:
        samples, channels, height, width = x.shape
        if self.norm == "linf":
            return self.clip(x + self.eps * _signs((samples, channels, 1, width), x, generator))
        size = max(height // 5, 1)
        delta = torch.zeros_like(x)
        top, left = (height - size * (height // size)) // 2, (width - size * (width // size)) // 2
        for row in range(height // size):
            for column in range(width // size):
                window = _window(top + row * size, left + column * size, size, size)
                delta[window] += self._bump(size, x, places) * _signs((samples, channels, 1, 1), x, generator)
        return self._within(x, delta)

    def _propose_linf(
        self, x: Tensor, point: Tensor, rows: Tensor, share: float, generator: torch.Generator, places: torch.Generator
    ) -> Tensor:
        """Shift a square by ``2 * eps`` in a random direction for each channel: to that end of the ball."""
        channels, height, width = x.shape[1:]
        size = min(max(round((share * height * width) ** 0.5), 1), height, width)
        window = _window(_place(height - size, places), _place(width - size, places), size, size)
        moved = point.clone()
        moved[window] = self.clip(x[window][rows] + self.eps * _signs((channels, 1, 1), x, generator))
        return moved

    def _propose(
        self, x: Tensor, point: Tensor, rows: Tensor, share: float, generator: torch.Generator, places: torch.Generator
    ) -> Tensor:
        """Move the norm of one window to another, in the shape of a bump."""
        samples, channels, height, width = x.shape
        size = max(round((share * height * width) ** 0.5), 3)
        size = min(size + (size + 1) % 2, height, width)
        there = _window(_place(height - size, places), _place(width - size, places), size, size)
        from_ = _window(_place(height - size, places), _place(width - size, places), size, size)
        signs = _signs((samples, channels, 1, 1), x, generator)[rows]
        clean, power = x[rows], 2 if self.norm == "l2" else 1

        def size_of(part: Tensor) -> Tensor:
            """Norms of each channel of each sample."""
            return part.abs().pow(power).sum((2, 3), keepdim=True).pow(1 / power)

        delta = point - clean
        is_moved = torch.zeros_like(delta[:1])
        is_moved[there] = is_moved[from_] = 1
        unused = (self.eps**power - self.ball.of(delta).pow(power)).clamp(min=0) / channels
        budget = (per_sample(unused, x) + size_of(delta * is_moved).pow(power)).pow(1 / power)
        bump = self._bump(size, x, places) * signs + delta[there] / (size_of(delta[there]) + 1e-12)
        delta = delta.clone()
        delta[from_] = 0
        delta[there] = bump / (size_of(bump) + 1e-12) * budget
        return self._within(clean, delta)

    def _within(self, x: Tensor, delta: Tensor) -> Tensor:
        """``x + delta``, with ``delta`` scaled to the radius and brought within the bounds."""
        norms = self.ball.of(delta).clamp(min=1e-12)
        delta = delta * per_sample(self.eps / norms, x)
        if self.norm == "l1":
            assert self.bounds is not None
            delta = project_l1(x, delta, self.eps, self.bounds)
        return self.clip(x + delta)

    def _bump(self, size: int, like: Tensor, places: torch.Generator) -> Tensor:
        """A square of two opposed hills, side by side or one above the other, of norm 1 (algorithm 3)."""
        bump = _hills(size, self.norm, torch.get_default_dtype())
        return (bump.T if _place(1, places) else bump).to(like)


@cache
def _hills(size: int, norm: NormName, dtype: torch.dtype) -> Tensor:
    """Two opposed hills, one above the other; of few sizes, each asked for in many queries."""
    half = size // 2
    bump = torch.zeros(size, size, dtype=dtype)
    bump[:half] = _hill(half, size, norm, dtype)
    bump[half:] = -_hill(size - half, size, norm, dtype)
    return bump / _norm(bump, norm).clamp(min=1e-12)


def _hill(height: int, width: int, norm: NormName, dtype: torch.dtype) -> Tensor:
    """Rectangles around the middle, the smaller the higher."""
    hill = torch.zeros(height, width, dtype=dtype)
    middle = height // 2 + 1, width // 2 + 1
    for ring in range(max(middle)):
        top, left = middle[0] - 1 - ring, middle[1] - 1 - ring
        hill[max(top, 0) : top + 2 * ring + 1, max(left, 0) : left + 2 * ring + 1] += 1 / (ring + 1) ** 2
    return hill / _norm(hill, norm).clamp(min=1e-12)


def _norm(values: Tensor, name: NormName) -> Tensor:
    return values.abs().sum() if name == "l1" else values.norm()


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator, device=like.device).to(like.dtype) - 1


def _place(most: int, places: torch.Generator) -> int:
    """A whole number from 0 to ``most``."""
    return int(torch.randint(most + 1, (), generator=places))


def _window(top: int, left: int, height: int, width: int) -> tuple[slice, slice, slice, slice]:
    return slice(None), slice(None), slice(top, top + height), slice(left, left + width)
