"""FAB's way to a hyperplane within the bounds, against linear programs and an optimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, linprog, minimize
from torch import Tensor

from gradprune.attacks import FAB

NORMS = ["linf", "l2", "l1"]
SIZE = 8


def problems(rows: int = 25) -> tuple[Tensor, Tensor, Tensor]:
    """Points of which some coordinates are at the bounds, normals with zeros among them, and planes within reach."""
    generator = torch.Generator().manual_seed(2)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    point = (1.5 * uniform(rows, 2, 2, 2) - 0.25).clamp(0, 1)
    normal = torch.randn(rows, 2, 2, 2, generator=generator, dtype=torch.float64)
    normal[::3, 0, 0] = 0
    there = uniform(rows, 2, 2, 2)
    return point, normal, (normal * there).flatten(1).sum(1)


def length(step: np.ndarray, norm: str) -> float:
    return float(np.linalg.norm(step, {"linf": np.inf, "l2": 2, "l1": 1}[norm]))


def shortest(point: np.ndarray, normal: np.ndarray, offset: float, norm: str, box: tuple[float, float]) -> float:
    """The length of the shortest step to the plane that ends within the box."""
    low, high = box[0] - point, box[1] - point
    missing, eye = offset - normal @ point, np.eye(SIZE)
    if norm == "l2":
        found = minimize(
            lambda step: step @ step,
            np.zeros(SIZE),
            jac=lambda step: 2 * step,
            bounds=list(zip(low, high, strict=True)),
            constraints=[LinearConstraint(normal, missing, missing)],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert found.success
        return length(found.x, norm)
    if norm == "linf":  # minimise t with -t <= step <= t
        one = np.ones((SIZE, 1))
        found = linprog(
            np.eye(SIZE + 1)[-1],
            A_ub=np.block([[eye, -one], [-eye, -one]]),
            b_ub=np.zeros(2 * SIZE),
            A_eq=[[*normal, 0]],
            b_eq=[missing],
            bounds=[*zip(low, high, strict=True), (0, None)],
        )
    else:  # minimise the sum of both parts of step = up - down
        found = linprog(
            np.ones(2 * SIZE),
            A_eq=[[*normal, *-normal]],
            b_eq=[missing],
            bounds=[(0, max(bound, 0)) for bound in high] + [(0, max(-bound, 0)) for bound in low],
        )
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 3.0), None])
@pytest.mark.parametrize("norm", NORMS)
def test_the_step_is_the_shortest_one_to_the_plane(norm: str, bounds: tuple[float, float] | None) -> None:
    point, normal, offset = problems()
    steps = FAB(norm=norm, bounds=bounds).to_plane(point, normal, offset)
    assert steps.shape == point.shape
    box = bounds or (-1e3, 1e3)
    for each in range(len(point)):
        x, w, step = (value[each].flatten().numpy() for value in (point, normal, steps))
        assert w @ (x + step) == pytest.approx(float(offset[each]), abs=1e-9)
        assert (x + step).min() >= box[0] - 1e-9
        assert (x + step).max() <= box[1] + 1e-9
        assert length(step, norm) == pytest.approx(shortest(x, w, float(offset[each]), norm, box), abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_outside_the_bounds_is_approached_as_far_as_they_go(norm: str) -> None:
    point, normal, _ = problems()
    for far in (100.0, -100.0):
        steps = FAB(norm=norm).to_plane(point, normal, torch.full((len(point),), far, dtype=torch.float64))
        corner = (normal * far > 0).to(point.dtype)
        expected = torch.where(normal == 0, torch.zeros_like(point), corner - point)
        torch.testing.assert_close(steps, expected)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("norm", NORMS)
def test_a_plane_without_a_normal_is_not_approached(norm: str, bounds: tuple[float, float] | None) -> None:
    point, _, _ = problems()
    attack = FAB(norm=norm, bounds=bounds)
    assert not attack.to_plane(point, torch.zeros_like(point), torch.ones(len(point), dtype=torch.float64)).any()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
@pytest.mark.parametrize("norm", NORMS)
def test_the_length_of_the_normal_does_not_matter(norm: str, scale: float) -> None:
    """Gradients of a saturated network are so small that float32 has no square of them."""
    point, normal, offset = (value.float() for value in problems())
    step = FAB(norm=norm).to_plane(point, normal, offset)
    torch.testing.assert_close(FAB(norm=norm).to_plane(point, scale * normal, scale * offset), step, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_of_the_plane_stays(norm: str) -> None:
    point, normal, _ = problems()
    steps = FAB(norm=norm).to_plane(point, normal, (normal * point).flatten(1).sum(1))
    torch.testing.assert_close(steps, torch.zeros_like(steps), atol=1e-12, rtol=0)
