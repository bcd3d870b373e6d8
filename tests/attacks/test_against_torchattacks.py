"""Attacks along the gradient return what those of Torchattacks do, from the same start and with the same noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attack_testing import CLASSES, EAGER, labels_of
from references import torchattacks
from torch import Tensor, nn

from gradprune.attacks import BIM, DIFGSM, FGSM, MIFGSM, NIFGSM, PGD, SINIFGSM, TIFGSM, VMIFGSM, VNIFGSM, Attack

EPS, STEP_SIZE, STEPS = 0.1, 0.03, 6
OURS = {"eps": EPS, "step_size": STEP_SIZE, "steps": STEPS}
THEIRS = {"eps": EPS, "alpha": STEP_SIZE, "steps": STEPS}

Theirs = Callable[[nn.Module], torchattacks.attack.Attack]


def _with_double_kernel(attack: torchattacks.TIFGSM) -> torchattacks.TIFGSM:
    attack.stacked_kernel = attack.stacked_kernel.double()
    return attack


PAIRS: dict[str, tuple[Attack, Theirs]] = {
    "FGSM": (FGSM(eps=EPS), lambda model: torchattacks.FGSM(model, eps=EPS)),
    "BIM": (BIM(**OURS), lambda model: torchattacks.BIM(model, **THEIRS)),
    "MIFGSM": (MIFGSM(**OURS), lambda model: torchattacks.MIFGSM(model, **THEIRS)),
    "NIFGSM": (NIFGSM(**OURS), lambda model: torchattacks.NIFGSM(model, **THEIRS)),
    "SINIFGSM": (SINIFGSM(**OURS), lambda model: torchattacks.SINIFGSM(model, **THEIRS)),
    "VMIFGSM": (VMIFGSM(**OURS, decay=0.7), lambda model: torchattacks.VMIFGSM(model, **THEIRS, decay=0.7)),
    "VNIFGSM": (VNIFGSM(**OURS), lambda model: torchattacks.VNIFGSM(model, **THEIRS)),
    "DIFGSM": (
        DIFGSM(**OURS, diversity=0, decay=0.5),
        lambda model: torchattacks.DIFGSM(model, **THEIRS, diversity_prob=0, decay=0.5),
    ),
    "TIFGSM": (
        TIFGSM(**OURS, diversity=0, kernel=7),
        lambda model: _with_double_kernel(
            torchattacks.TIFGSM(model, **THEIRS, diversity_prob=0, decay=1, len_kernel=7)
        ),
    ),
    "PGD": (PGD(**OURS), lambda model: torchattacks.PGD(model, **THEIRS)),
    "PGD in L2": (
        PGD(norm="l2", eps=0.8, step_size=0.3, steps=STEPS),
        lambda model: torchattacks.PGDL2(model, eps=0.8, alpha=0.3, steps=STEPS, eps_for_division=0),
    ),
}


@pytest.fixture
def model(double: None) -> nn.Module:
    """A network for images in three channels: the Gaussian kernel of Torchattacks has three."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(600, CLASSES)).eval()


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the n-th uniform noise the same in both libraries; called, it counts from the beginning again."""
    calls = 0

    def uniform(values: Tensor, low: float = 0, high: float = 1, *, generator: torch.Generator | None = None) -> Tensor:
        nonlocal calls
        calls += 1
        own = torch.Generator().manual_seed(calls)
        return values.copy_(low + (high - low) * torch.rand(values.shape, generator=own))

    def restart() -> None:
        nonlocal calls
        calls = 0

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    return restart


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("name", PAIRS)
def test_examples_are_those_of_torchattacks(
    name: str,
    targeted: bool,
    model: nn.Module,
    noise: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, make = PAIRS[name]
    theirs = make(model)
    x = (1.2 * torch.rand(8, 3, 10, 10, generator=torch.Generator().manual_seed(0)) - 0.1).clamp(0, 1)
    y = labels_of(model, x)
    if targeted:
        y = (y + 1) % CLASSES
        ours = ours.__class__(**{**vars(ours), "targeted": "given"})
        theirs.set_mode_targeted_by_function(lambda images, labels: labels)
    if name == "PGD in L2":
        # Torchattacks draws a radius and a direction that are not uniform in the ball together: it starts at the input.
        theirs.random_start = False
        ours = ours.__class__(**{**vars(ours), "random_start": False})
    noise()
    expected = theirs(x, y)
    noise()
    x_adv = ours(model, x, y, runtime=EAGER)
    torch.testing.assert_close(x_adv, expected, atol=1e-9, rtol=0)
    assert (x_adv - x).abs().max() > EPS / 2
