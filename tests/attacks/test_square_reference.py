"""Square makes the moves of the published code (as shipped in Torchattacks) from the same draws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_testing import EAGER, labels_of
from digit_networks import DigitNetworks, classified
from references import torchattacks
from torch import Tensor
from torch.nn import functional as F

from gradprune.attacks import Square, square
from gradprune.workloads.digits import Digits

EPS = {"linf": 0.15, "l2": 1.0}
THEIR_NORM = {"linf": "Linf", "l2": "L2"}
QUERIES = 120


class Draws:
    """Places and signs by their number, the same for both libraries."""

    def __init__(self) -> None:
        self._places = self._signs = 0

    def restart(self) -> None:
        """Begin again."""
        self._places = self._signs = 0

    def share(self) -> float:
        """A number from 0 to 1."""
        self._places += 1
        return float(torch.rand((), generator=torch.Generator().manual_seed(self._places)))

    def signs(self, shape: tuple[int, ...]) -> Tensor:
        """Numbers that are 1 or -1."""
        self._signs += 1
        return 2.0 * torch.randint(2, shape, generator=torch.Generator().manual_seed(self._signs)) - 1


@pytest.fixture
def draws(double: None, monkeypatch: pytest.MonkeyPatch) -> Draws:
    shared = Draws()

    bump = Square._bump

    def bump_of_shared_draws(self: Square, size: int, like: Tensor, places: torch.Generator) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(square, "_place", lambda most, places: int(shared.share() > 0.5))
            return bump(self, size, like, places)

    monkeypatch.setattr(Square, "_bump", bump_of_shared_draws)
    # The published code never places a square at the last row or column, which the paper allows.
    monkeypatch.setattr(square, "_place", lambda most, places: int(shared.share() * most))
    monkeypatch.setattr(square, "_signs", lambda shape, like, generator: shared.signs(shape))
    Theirs = torchattacks.Square
    monkeypatch.setattr(
        Theirs, "random_int", lambda self, low=0, high=1, shape=(1,): torch.tensor([int(shared.share() * high)])
    )
    monkeypatch.setattr(Theirs, "random_choice", lambda self, shape: shared.signs(tuple(shape)))
    random = torch.rand

    def rand(*shape: object, **options: object) -> Tensor:
        """The one draw that is neither of these is which way a bump lies."""
        return torch.tensor([shared.share()]) if shape == ([1],) else random(*shape, **options)

    monkeypatch.setattr(torch, "rand", rand)
    return shared


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_moves_are_those_of_the_published_code(
    norm: str, targeted: bool, draws: Draws, digits: Digits, networks: DigitNetworks
) -> None:
    plain = networks.double().plain

    def model(images: Tensor) -> Tensor:
        return plain(images[..., 1:-1, 1:-1])

    class Padded(torch.nn.Module):
        """With a margin, for of images smaller than ten the published code starts from tiles that reach outside."""

        weight = next(plain.parameters())

        def parameters(self, recurse: bool = True):
            yield self.weight

        def forward(self, images: Tensor) -> Tensor:
            return model(images)

    x, y = classified(plain, digits, 6, torch.float64)
    x = F.pad(x, (1, 1, 1, 1))
    if targeted:
        y = (y + 1) % 10
    theirs = torchattacks.Square(Padded(), norm=THEIR_NORM[norm], eps=EPS[norm], n_queries=QUERIES)
    if targeted:
        theirs.set_mode_targeted_by_function(lambda images, labels: labels)
    ours = Square(norm=norm, eps=EPS[norm], queries=QUERIES, targeted="given" if targeted else None)
    fooled = 0
    for rows in torch.arange(len(x)).split(1):  # what either draws for a batch depends on which samples are left
        theirs.init_hyperparam(x[rows])
        draws.restart()
        _, expected = theirs.attack_single_run(x[rows], y[rows])
        draws.restart()
        x_adv = ours(model, x[rows], y[rows], runtime=EAGER)
        # In L2, moves take the root of what is left of the radius, which may be nothing but rounding errors. Another
        # move would change pixels by a tenth.
        torch.testing.assert_close(x_adv, expected, atol=1e-8 if norm == "linf" else 2e-3, rtol=0)
        fooled += int((labels_of(model, x_adv) == y[rows]) == targeted)
    assert fooled > 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_fewer_samples_are_fooled_than_by_the_published_code(
    norm: str, digits: Digits, networks: DigitNetworks
) -> None:
    model = networks.pgd
    x, y = classified(model, digits, 300, torch.float32)
    theirs = torchattacks.Square(model, norm=THEIR_NORM[norm], eps=EPS[norm], n_queries=200, seed=0)
    ours = Square(norm=norm, eps=EPS[norm], queries=200, seed=0)
    results = theirs(x, y), ours(model, x, y, runtime=EAGER)
    rates = [float((labels_of(model, x_adv) != y).float().mean()) for x_adv in results]
    assert 0.05 < rates[0] < 0.95
    # The published code leaves out the last row and column, which is much of images that are so small.
    assert rates[1] > rates[0] - 0.03


def test_the_changed_share_falls_as_in_the_paper() -> None:
    theirs: Callable[[int], float] = torchattacks.Square(torch.nn.Linear(1, 1), n_queries=5000).p_selection
    ours = Square(queries=5000)
    assert [ours.share_at(step) for step in range(5000)] == [theirs(step) for step in range(5000)]
