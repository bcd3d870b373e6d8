"""The losses that attacks maximise, against plain formulas, one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attack_testing import CLASSES, EAGER, Network, samples
from torch import Tensor
from torch.nn import functional as F

from gradprune.attacks import PGD
from gradprune.runtime.losses import LABEL_LOSSES, kl, label_losses

Formula = Callable[[list[float], int, int], float]


def plain_cross_entropy(z: list[float], label: int, target: int) -> float:
    return math.log(sum(math.exp(value) for value in z)) - z[label]


def plain_margin(z: list[float], label: int, target: int) -> float:
    return max(value for index, value in enumerate(z) if index != label) - z[label]


def plain_dlr(z: list[float], label: int, target: int) -> float:
    ordered = sorted(z, reverse=True)
    return plain_margin(z, label, target) / (ordered[0] - ordered[2] + 1e-12)


def plain_dlr_targeted(z: list[float], label: int, target: int) -> float:
    ordered = sorted(z, reverse=True)
    return -(z[label] - z[target]) / (ordered[0] - 0.5 * (ordered[2] + ordered[3]) + 1e-12)


FORMULAS: dict[str, Formula] = {
    "ce": plain_cross_entropy,
    "margin": plain_margin,
    "difference": lambda z, label, target: z[target] - z[label],
    "dlr": plain_dlr,
    "dlr-targeted": plain_dlr_targeted,
}


def some_logits(classes: int = 7, rows: int = 50) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are sometimes the largest, with targets that are sometimes the label."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows, 2), generator=generator)
    labels[::3, 0] = logits[::3].argmax(1)
    labels[-1] = 0
    return logits, labels


def test_every_loss_has_a_formula() -> None:
    assert LABEL_LOSSES.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", FORMULAS)
def test_values_are_those_of_the_formula(name: str) -> None:
    logits, labels = some_logits()
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    expected = torch.tensor([FORMULAS[name](z, *pair) for z, pair in rows], dtype=torch.float64)
    torch.testing.assert_close(LABEL_LOSSES[name][0](logits, labels), expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_differences(name: str) -> None:
    logits, labels = some_logits(rows=8)
    loss = LABEL_LOSSES[name][0]
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_(True))


@pytest.mark.parametrize("name", FORMULAS)
def test_one_graph_for_all_losses_computes_each(name: str) -> None:
    logits, labels = some_logits()
    chosen = torch.tensor(list(LABEL_LOSSES).index(name))
    own, shared = (logits.clone().requires_grad_(True) for _ in range(2))
    values, of_all = LABEL_LOSSES[name][0](own, labels), label_losses(shared, labels, chosen)
    assert torch.equal(values, of_all)
    values.sum().backward()
    of_all.sum().backward()
    assert torch.equal(own.grad, shared.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["ce", "margin", "difference"])
def test_ties_of_logits_do_not_spoil_the_other_losses(name: str, dtype: torch.dtype) -> None:
    """Equal logits divide the ratio losses by next to nothing, which must not reach a loss that was not asked for."""
    logits = torch.zeros(4, CLASSES, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[0, 1], [1, 2], [2, 2], [5, 0]])
    values = label_losses(logits, labels, torch.tensor(list(LABEL_LOSSES).index(name)))
    assert torch.equal(values, torch.full((4,), math.log(CLASSES) if name == "ce" else 0.0, dtype=dtype))
    values.sum().backward()
    own, target = (F.one_hot(labels[:, place], CLASSES).to(dtype) for place in (0, 1))
    others = {"ce": torch.full_like(own, 1 / CLASSES), "margin": (1 - own) / (CLASSES - 1), "difference": target}
    torch.testing.assert_close(logits.grad, others[name] - own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dlr", "dlr-targeted"])
def test_ratios_of_tied_logits_are_finite(name: str, dtype: torch.dtype) -> None:
    for values in ([0.0] * CLASSES, [2.0, 2.0, 2.0, 2.0, 1.0, 0.0], [3.0, 2.0, 2.0, 2.0, 2.0, 2.0]):
        logits = torch.tensor([values], dtype=dtype, requires_grad=True)
        loss = LABEL_LOSSES[name][0](logits, torch.tensor([[0, 1]]))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logits.grad.isfinite().all()


def test_the_subgradient_of_a_tied_margin_is_shared_among_the_tied() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    LABEL_LOSSES["margin"][0](logits, torch.tensor([[0, 0]])).sum().backward()
    assert logits.grad.tolist() == [[-1.0, 0.5, 0.5, 0.0]]


def test_losses_that_need_more_classes_are_zero_and_harmless() -> None:
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 1], [1, 0], [1, 1]])
    for index, (loss, classes) in enumerate(LABEL_LOSSES.values()):
        values = label_losses(logits, labels, torch.tensor(index))
        assert torch.equal(values, loss(logits, labels) if classes <= 2 else torch.zeros(3, dtype=torch.float64))


def test_the_divergence_is_that_of_probabilities() -> None:
    logits, _ = some_logits()
    clean, _ = some_logits()
    p, q = clean.flip(0).softmax(1), logits.softmax(1)
    torch.testing.assert_close(kl(logits, p), (p * (p / q).log()).sum(1))
    assert torch.autograd.gradcheck(lambda z: kl(z, p[:4]), logits[:4].clone().requires_grad_(True))


def test_pgd_maximises_the_divergence_from_clean_probabilities() -> None:
    model = Network()
    x, y = samples(model)
    attack = PGD(loss="kl", eps=0.1, step_size=0.02, steps=8, restarts=2, keep="best", seed=0)
    x_adv = attack(model, x, y, runtime=EAGER)
    with torch.no_grad():
        clean = model(x).softmax(1)
        start = PGD(loss="kl", eps=0.1, step_size=0.0, steps=1, seed=0)(model, x, y, runtime=EAGER)
        assert (kl(model(x_adv), clean) > kl(model(start), clean)).all()
