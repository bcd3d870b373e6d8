"""APGD takes the steps of the published code, as shipped in Torchattacks, from the same start."""

from __future__ import annotations

import pytest
import torch
from attack_testing import EAGER, assert_close_for_most
from digit_networks import DigitNetworks, classified
from references import torchattacks
from torch import Tensor, nn

from gradprune.attacks import APGD, TargetedAPGD
from gradprune.attacks.apgd import project_l1
from gradprune.workloads.digits import Digits

EPS = {"linf": 0.1, "l2": 0.6}
THEIR_NORM = {"linf": "Linf", "l2": "L2"}

pytestmark = pytest.mark.usefixtures("double")


def start_of(x: Tensor, norm: str, eps: float, seed: int) -> Tensor:
    """Where the published code starts with a seed."""
    torch.manual_seed(seed)
    noise = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
    size = noise.flatten(1).abs().amax(1) if norm == "linf" else noise.flatten(1).norm(dim=1) + 1e-12
    return (x + eps * noise / size[:, None, None, None]).clamp(0, 1)


def assert_same(
    ours: APGD, theirs: torchattacks.attack.Attack, model: nn.Module, x: Tensor, labels: Tensor, start: Tensor
) -> int:
    """Run both from ``start``; returns how many samples are fooled."""
    torch.manual_seed(0)
    best, correct, best_loss, fooling = theirs.attack_single_run(x, labels[:, 0])
    with EAGER.attack(model, x) as query:
        found = ours.maximize(query, x, labels, start)
    assert (found.fooled == ~correct).double().mean() >= 0.95
    # The ratio is 1 wherever the label's logit is the third, and has a pole where it is behind: from there on rounding
    # decides where a run goes.
    same = best_loss < 1 - 1e-6 if ours.loss == "dlr" else torch.ones_like(correct)
    assert same.double().mean() > 0.8
    assert_close_for_most(found.best_loss[same], best_loss.detach()[same], atol=1e-8)
    assert_close_for_most(found.best[same], best.detach()[same], atol=1e-8)
    same &= found.fooled & ~correct
    if same.any():
        assert_close_for_most(found.fooling[same], fooling.detach()[same], atol=1e-8)
    return int(found.fooled.sum())


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_takes_the_published_steps(
    norm: str, loss: str, steps: int, digits: Digits, networks: DigitNetworks
) -> None:
    model = networks.double().fgsm
    x, y = classified(model, digits, 60, torch.float64)
    ours = APGD(norm=norm, eps=EPS[norm], steps=steps, loss=loss, stop_at_success=False)
    theirs = torchattacks.APGD(model, norm=THEIR_NORM[norm], eps=EPS[norm], steps=steps, loss=loss)
    labels = torch.stack([y, y], dim=1)
    fooled = assert_same(ours, theirs, model, x, labels, start_of(x, norm, EPS[norm], 0))
    assert fooled < len(x)
    assert steps == 1 or fooled > 0


@pytest.mark.parametrize("place", [2, 4])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_apgd_takes_the_published_steps(
    norm: str, place: int, digits: Digits, networks: DigitNetworks
) -> None:
    model = networks.double().fgsm
    # In L2 the shipped code takes the first sample's step size for all, so it is asked one sample at a time.
    x, y = classified(model, digits, 60 if norm == "linf" else 8, torch.float64)
    ours = TargetedAPGD(norm=norm, eps=EPS[norm], steps=30, stop_at_success=False)
    theirs = torchattacks.APGDT(model, norm=THEIR_NORM[norm], eps=EPS[norm], steps=30)
    theirs.target_class = place
    with torch.no_grad():
        target = model(x).argsort(dim=1)[:, -place]
    labels = torch.stack([y, target], dim=1)
    for rows in torch.arange(len(x)).split(60 if norm == "linf" else 1):
        start = start_of(x[rows], norm, EPS[norm], 0)
        assert_same(ours, theirs, model, x[rows], labels[rows], start)


# --- L1, which Torchattacks does not have -----------------------------------------------------------------------------


def follow_l1(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, steps: int, *, continued: bool
) -> Tensor:
    """The losses on the way of one sample, by Croce & Hein 2021, algorithm 2, in the plainest form there is."""
    features = x.numel()

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        leaf = point.clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(leaf), y)
        return loss.item(), torch.autograd.grad(loss, leaf)[0]

    point = start
    loss, gradient = evaluate(point)
    losses, best_loss, best, best_gradient = [loss], loss, point, gradient
    nonzero = int((start != x).sum()) if continued else features
    density = nonzero / features / 1.5 if continued else 0.2
    step_size = eps
    for step in range(1, steps + 1):
        magnitudes = gradient.abs().flatten()
        threshold = magnitudes.sort().values[min(max(int((1 - density) * features), 0), features - 1)]
        sparse = torch.where(gradient.abs() >= threshold, gradient, torch.zeros_like(gradient)).sign()
        moved = point + step_size * sparse / (sparse.abs().sum() + 1e-10)
        point = x + project_l1(x, moved - x, eps, (0.0, 1.0))
        loss, gradient = evaluate(point)
        losses.append(loss)
        if loss > best_loss:
            best_loss, best, best_gradient = loss, point, gradient
        if step % max(int(0.04 * steps), 1) == 0:
            now = int((best != x).sum())
            if now < 0.95 * nonzero:
                step_size, point, gradient = eps, best, best_gradient
            else:
                step_size = max(step_size / 1.5, eps / 10)
            density, nonzero = now / features / 1.5, now
    return torch.tensor(losses)


@pytest.mark.parametrize("continued", [False, True], ids=["fresh", "continued"])
def test_apgd_in_l1_takes_the_steps_of_the_paper(continued: bool, digits: Digits, networks: DigitNetworks) -> None:
    model = networks.double().pgd
    x, y = classified(model, digits, 10, torch.float64)
    ours = APGD(norm="l1", eps=3.0, steps=50, large_eps=continued, stop_at_success=False)
    start = ours.start(x, torch.Generator().manual_seed(0))
    labels = torch.stack([y, y], dim=1)
    with EAGER.attack(model, x) as query:
        found = ours._climb(query, x, labels, start, 3.0, 50, leave=False)
    losses = torch.stack(
        [
            follow_l1(model, *(value[[i]] for value in (x, y, start)), 3.0, 50, continued=continued)
            for i in range(len(x))
        ]
    )
    assert_close_for_most(found.history[:, 1:], losses[:, 1:], atol=1e-8, share=0.9)
    assert_close_for_most(found.best_loss, losses.amax(1), atol=1e-8, share=0.9)


@pytest.mark.parametrize("steps", [1, 3, 10, 60])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_larger_balls_come_first_and_the_result_is_in_the_last(
    norm: str, steps: int, digits: Digits, networks: DigitNetworks
) -> None:
    model = networks.double().pgd
    x, y = classified(model, digits, 20, torch.float64)
    eps = {**EPS, "l1": 3.0}[norm]
    attack = APGD(norm=norm, eps=eps, steps=steps, large_eps=True, seed=0)
    start = attack.start(x, torch.Generator().manual_seed(0))
    assert attack.ball.of(start - x).max() > 1.5 * eps
    x_adv = attack(model, x, y, runtime=EAGER)
    assert attack.ball.of(x_adv - x).max() <= eps + 1e-9
