"""Balls: projections are the closest points, random starts are uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attack_testing import norm_in_float64
from scipy.optimize import Bounds, LinearConstraint, minimize
from torch import Tensor

from gradprune.attacks import APGD, NORMS
from gradprune.attacks.apgd import project_l1

NAMES = list(NORMS)
DIMENSIONS = 6


def some_deltas(scale: float, rows: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    deltas = scale * torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64)
    deltas[0] = 0
    deltas[1, 0] = 0
    deltas[2] = deltas[2].sign()  # ties
    return deltas


def closest_in_l1(delta: np.ndarray, eps: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The closest point in the L1 ball with coordinates from ``low`` to ``high``, found by an optimiser."""
    size = len(delta)
    # A coordinate is the difference of two that are not negative, whose sum bounds its magnitude.
    difference = np.hstack([np.eye(size), -np.eye(size)])
    found = minimize(
        lambda parts: ((difference @ parts - delta) ** 2).sum(),
        np.zeros(2 * size),
        jac=lambda parts: 2 * difference.T @ (difference @ parts - delta),
        bounds=Bounds(0, np.inf),
        constraints=[LinearConstraint(np.ones(2 * size), 0, eps), LinearConstraint(difference, low, high)],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return difference @ found.x


@pytest.mark.parametrize("norm", NAMES)
def test_norms_are_those_of_plain_formulas(norm: str) -> None:
    deltas = some_deltas(1.0)
    torch.testing.assert_close(NORMS[norm].of(deltas), norm_in_float64(deltas, norm))


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("norm", NAMES)
def test_projections_are_in_the_ball_and_leave_what_is_inside(norm: str, scale: float) -> None:
    deltas, eps = some_deltas(scale), 1.5
    projected = NORMS[norm].project(deltas, eps)
    assert norm_in_float64(projected, norm).max() <= eps + 1e-12
    inside = norm_in_float64(deltas, norm) <= eps
    torch.testing.assert_close(projected[inside], deltas[inside], rtol=1e-14, atol=0)
    outside = norm_in_float64(projected[~inside], norm)
    torch.testing.assert_close(outside, torch.full_like(outside, eps))


@pytest.mark.parametrize("norm", NAMES)
def test_no_point_of_the_ball_is_closer_than_the_projection(norm: str) -> None:
    """For a convex set that is so exactly if no other point of it lies in front: <delta - p, z - p> <= 0 for all z."""
    deltas, eps = some_deltas(2.0), 1.5
    projected = NORMS[norm].project(deltas, eps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = NORMS[norm].project(5 * NORMS[norm].random(deltas, eps, generator), eps)
        ahead = ((deltas - projected) * (other - projected)).flatten(1).sum(1)
        assert ahead.max() <= 1e-12


@pytest.mark.parametrize("eps", [0.3, 1.5, 6.0])
def test_the_l1_projection_is_that_of_an_optimiser(eps: float) -> None:
    deltas = some_deltas(1.0)
    everywhere = np.full(DIMENSIONS, 10.0)
    for delta, projected in zip(deltas, NORMS["l1"].project(deltas, eps), strict=True):
        expected = closest_in_l1(delta.flatten().numpy(), eps, -everywhere, everywhere)
        np.testing.assert_allclose(projected.flatten().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("eps", [0.1, 0.8, 1.6, 6.0])
def test_the_l1_projection_within_bounds_is_that_of_an_optimiser(eps: float) -> None:
    deltas = some_deltas(1.0, rows=20)
    generator = torch.Generator().manual_seed(5)
    x = (1.4 * torch.rand(deltas.shape, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)
    projected = project_l1(x, deltas, eps, (0.0, 1.0))
    assert (x + projected).min() >= -1e-12
    assert (x + projected).max() <= 1 + 1e-12
    assert norm_in_float64(projected, "l1").max() <= eps + 1e-12
    for clean, delta, ours in zip(x, deltas, projected, strict=True):
        low = -clean.flatten().numpy()
        expected = closest_in_l1(delta.flatten().numpy(), eps, low, 1 + low)
        np.testing.assert_allclose(ours.flatten().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("norm", NAMES)
def test_large_float32_perturbations_end_in_the_ball(norm: str) -> None:
    """Far outside of the ball, numbers are rounded by more than its radius is."""
    generator = torch.Generator().manual_seed(0)
    deltas = 30 * torch.randn(20, 3, 32, 32, generator=generator)
    eps = {"linf": 0.03, "l2": 3.0, "l1": 2.0}[norm]
    assert norm_in_float64(NORMS[norm].project(deltas, eps), norm).max() <= eps * (1 + 1e-6)
    if norm == "l1":
        x = torch.rand(20, 3, 32, 32, generator=generator)
        assert norm_in_float64(project_l1(x, deltas / 30, eps, (0.0, 1.0)), norm).max() <= eps * (1 + 1e-6)


@pytest.mark.parametrize("norm", NAMES)
def test_random_perturbations_are_uniform_in_the_ball(norm: str) -> None:
    count, eps = 20_000, 0.7
    generator = torch.Generator().manual_seed(6)
    like = torch.empty(count, 2, 3, dtype=torch.float64)
    deltas = NORMS[norm].random(like, eps, generator)
    radius = norm_in_float64(deltas, norm) / eps
    assert radius.max() <= 1 + 1e-12
    # In a uniform ball the radius to the power of the dimension is uniform in [0, 1]: mean 1/2, variance 1/12.
    volume = radius**DIMENSIONS
    error = 5 / count**0.5  # five standard errors of anything that varies by 1
    assert abs(volume.mean() - 1 / 2) < error * 12**-0.5
    assert abs(volume.square().mean() - 1 / 3) < error * 0.3
    flat = deltas.flatten(1) / eps
    assert flat.mean(0).abs().max() < error
    # Second moments of a coordinate: of the cube, of the ball, and of the cross polytope.
    second = {"linf": 1 / 3, "l2": 1 / (DIMENSIONS + 2), "l1": 2 / ((DIMENSIONS + 1) * (DIMENSIONS + 2))}[norm]
    assert (flat.square().mean(0) - second).abs().max() < error * 3 * second
    products = (flat.T @ flat / count).fill_diagonal_(0)
    assert products.abs().max() < error


@pytest.mark.parametrize("norm", NAMES)
def test_a_step_has_length_one_and_goes_uphill(norm: str) -> None:
    gradients = some_deltas(3.0)
    steps = NORMS[norm].normalize(gradients)
    lengths = norm_in_float64(steps, norm)
    assert lengths[0] == 0  # there is no way up from a gradient of zero
    torch.testing.assert_close(lengths[1:], torch.ones_like(lengths[1:]))
    assert ((steps * gradients).flatten(1).sum(1)[1:] > 0).all()


@pytest.mark.parametrize("norm", NAMES)
def test_apgd_starts_on_the_boundary(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.full((50, 1, 4, 4), 0.5, dtype=torch.float64)
    start = APGD(norm=norm, eps=0.3).start(x, generator)
    torch.testing.assert_close(norm_in_float64(start - x, norm), torch.full((50,), 0.3, dtype=torch.float64))
    corner = APGD(norm=norm, eps=0.3).start(torch.zeros_like(x), generator)
    assert corner.min() >= 0
    assert norm_in_float64(corner, norm).max() <= 0.3 + 1e-12
