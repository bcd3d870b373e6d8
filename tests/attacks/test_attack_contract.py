"""What holds for every attack: the ball, the bounds, the seed, and that inputs are left alone."""

from __future__ import annotations

import pytest
import torch
from attack_testing import (
    BRIEF,
    CLASSES,
    EAGER,
    EVERY_NORM,
    KINDS,
    Network,
    brief,
    labels_of,
    norm_in_float64,
    options_of,
    samples,
)
from torch import Tensor
from torch.nn import functional as F

from gradprune.attacks import PGD

RANDOM = [
    "APGD",
    "AutoAttack",
    "DIFGSM",
    "PGD",
    "RSFGSM",
    "Square",
    "TargetedAPGD",
    "TIFGSM",
    "TransferAttack",
    "VMIFGSM",
    "VNIFGSM",
]
"""Attacks whose results depend on the seed. FAB is random from its second run on, which may find nothing better."""

TARGETED = [name for name, kind in KINDS.items() if kind.can_be_targeted]


def test_every_attack_is_tested() -> None:
    assert KINDS.keys() == BRIEF.keys()
    assert len(KINDS) == 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "norm"), EVERY_NORM)
def test_results_are_in_the_ball_and_the_bounds(name: str, norm: str | None, dtype: torch.dtype) -> None:
    model = Network()
    x, y = samples(model, dtype=dtype)
    attack = brief(name, **options_of(norm))
    x_adv = attack(model, x, y, runtime=EAGER)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert not x_adv.requires_grad
    assert x_adv.isfinite().all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if hasattr(attack, "eps"):
        assert norm_in_float64(x_adv.double() - x.double(), attack.norm).max() <= attack.eps + 1e-6
    assert (x_adv != x).flatten(1).any(1).sum() >= 3, "the attack does nothing"


@pytest.mark.parametrize(("name", "norm"), EVERY_NORM)
def test_bounds_and_radius_are_those_of_the_inputs(name: str, norm: str | None) -> None:
    """Inputs of another range, as normalised images have it, are attacked within that range."""
    bounds = (-2.0, 3.0)
    model = Network()
    x, y = samples(model)
    x = bounds[0] + (bounds[1] - bounds[0]) * x
    y[1:] = labels_of(model, x)[1:]
    options = options_of(norm)
    if name == "FAB":
        options["eps"] = 50.0
    attack = brief(name, bounds=bounds, **options)
    x_adv = attack(model, x, y, runtime=EAGER)
    assert x_adv.min() >= bounds[0]
    assert x_adv.max() <= bounds[1]
    assert (x_adv < 0).any(), "the attack keeps to the wrong bounds"
    assert (x_adv > 1).any(), "the attack keeps to the wrong bounds"
    if hasattr(attack, "eps"):
        # Inputs are rounded to some 1e-7 of their size, and in L1 the errors of 128 of them add up.
        distance = norm_in_float64(x_adv.double() - x.double(), attack.norm)
        assert distance.max() <= attack.eps * (1 + 1e-6) + 1e-6 * (5 if norm == "l1" else 1)


@pytest.mark.parametrize(("name", "norm"), EVERY_NORM)
def test_a_seed_decides_all_and_leaves_the_random_state_alone(name: str, norm: str | None) -> None:
    model = Network()
    x, y = samples(model)
    before, y_before = x.clone(), y.clone()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = brief(name, seed=3, **options_of(norm))(model, x, y, runtime=EAGER)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = brief(name, seed=3, **options_of(norm))(model, x, y, runtime=EAGER)
    assert torch.equal(again, first)
    assert torch.equal(x, before), "the inputs were written to"
    assert torch.equal(y, y_before), "the labels were written to"
    assert first.data_ptr() != x.data_ptr()
    if name in RANDOM:
        other = brief(name, seed=4, **options_of(norm))(model, x, y, runtime=EAGER)
        assert not torch.equal(other, first)


def test_without_a_seed_torchs_generator_decides() -> None:
    model = Network()
    x, y = samples(model)
    attack = PGD(eps=0.1, steps=1)
    torch.manual_seed(7)
    first, second = attack(model, x, y, runtime=EAGER), attack(model, x, y, runtime=EAGER)
    torch.manual_seed(7)
    assert torch.equal(attack(model, x, y, runtime=EAGER), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_returned_for_nothing(name: str) -> None:
    model = Network()
    empty = brief(name)(model, torch.rand(0, 2, 8, 8), torch.zeros(0, dtype=torch.int64), runtime=EAGER)
    assert empty.shape == (0, 2, 8, 8)


@pytest.mark.parametrize("name", KINDS)
def test_samples_that_are_misclassified_already_are_no_problem(name: str) -> None:
    model = Network()
    x, _ = samples(model, 4)
    wrong = (labels_of(model, x) + 1) % CLASSES
    x_adv = brief(name)(model, x, wrong, runtime=EAGER)
    assert x_adv.shape == x.shape
    if name in ("AutoAttack", "CW", "DeepFool", "FAB", "Square"):
        torch.testing.assert_close(x_adv, x, atol=1e-6, rtol=0)  # the smallest perturbation is none


@pytest.mark.parametrize("name", ["PGD", "APGD", "VMIFGSM", "FAB", "CW", "Square"])
def test_inference_tensors_and_modes_are_no_problem(name: str) -> None:
    model = Network()
    x, y = samples(model)
    expected = brief(name)(model, x, y, runtime=EAGER)
    with torch.inference_mode():
        inference = x.clone(), y.clone()
        assert torch.equal(brief(name)(model, *inference, runtime=EAGER), expected)
    assert torch.equal(brief(name)(model, *inference, runtime=EAGER), expected)
    with torch.no_grad():
        assert torch.equal(brief(name)(model, x, y, runtime=EAGER), expected)
    leaf = x.clone().requires_grad_(True)
    assert torch.equal(brief(name)(model, leaf, y, runtime=EAGER), expected)
    assert leaf.grad is None


@pytest.mark.parametrize("name", ["PGD", "APGD", "SINIFGSM", "FAB", "CW", "Square"])
def test_channels_last_images_are_attacked_as_well(name: str) -> None:
    model = Network()
    x, y = samples(model)
    images = x.to(memory_format=torch.channels_last)
    x_adv = brief(name)(model, images, y, runtime=EAGER)
    assert (labels_of(model, x_adv) != y).sum() > 1


@pytest.mark.parametrize("name", ["PGD", "APGD", "FAB", "CW", "DeepFool", "Square"])
def test_half_precision_is_attacked_in_float32_and_rounded(name: str) -> None:
    model = Network().bfloat16()
    x, y = samples(Network())
    x_adv = brief(name)(model, x.bfloat16(), y, runtime=EAGER)
    assert x_adv.dtype == torch.bfloat16
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (labels_of(model, x_adv) != labels_of(model, x.bfloat16())).any()
    if hasattr(brief(name), "eps"):
        # Numbers below 1 have 8 bits.
        assert (x_adv.double() - x.bfloat16().double()).abs().max() <= brief(name).eps + 2**-9


# --- Targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETED)
def test_a_targeted_attack_leads_to_its_target(name: str) -> None:
    model = Network()
    x, _ = samples(model, 12)
    target = (labels_of(model, x) + 1) % CLASSES
    attack = brief(name, targeted="given", **({} if name == "CW" else {"eps": 0.3}))
    x_adv = attack(model, x, target, runtime=EAGER)
    with torch.no_grad():
        before, after = (F.cross_entropy(model(one), target, reduction="none") for one in (x, x_adv))
    assert (after <= before + 1e-6).all()
    assert after.mean() < 0.9 * before.mean()
    assert (labels_of(model, x_adv) == target).any()


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "difference", "dlr-targeted", "own"])
@pytest.mark.parametrize("name", ["PGD", "APGD"])
def test_every_loss_leads_to_the_target(name: str, loss: str) -> None:
    model = Network()
    x, _ = samples(model, 12)
    target = (labels_of(model, x) + 1) % CLASSES
    chosen = (lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")) if loss == "own" else loss
    x_adv = brief(name, targeted="given", loss=chosen, eps=0.4, steps=12)(model, x, target, runtime=EAGER)
    reached = (labels_of(model, x_adv) == target).float().mean()
    assert reached > (0.1 if loss == "dlr" else 0.5)  # of a target, the ratio also falls where its denominator grows


@pytest.mark.parametrize("targeted", ["least-likely", "second-best"])
@pytest.mark.parametrize("name", TARGETED)
def test_targets_by_logits_are_those_classes(name: str, targeted: str) -> None:
    model = Network()
    x, y = samples(model)
    with torch.no_grad():
        order = model(x).argsort(1, descending=True).tolist()
    others = [[each for each in classes if each != label] for classes, label in zip(order, y.tolist(), strict=True)]
    target = torch.tensor([classes[-1 if targeted == "least-likely" else 0] for classes in others])
    given = brief(name, targeted="given")(model, x, target, runtime=EAGER)
    assert torch.equal(brief(name, targeted=targeted)(model, x, y, runtime=EAGER), given)


def test_random_targets_are_other_classes_and_any_of_them() -> None:
    model = Network()
    x, y = samples(model, 40)
    seen: list[Tensor] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return F.cross_entropy(logits, labels, reduction="none")

    for seed in (0, 0, 1):
        PGD(steps=1, loss=loss, targeted="random", seed=seed)(model, x, y, runtime=EAGER)
    first, again, other = seen
    assert (first != y).all()
    assert len(((first - y) % CLASSES).unique()) == CLASSES - 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", TARGETED)
def test_a_target_that_is_the_label_is_reached(name: str) -> None:
    """There is nothing to do; what comes back still is that class, and for the smallest perturbation the input."""
    model = Network()
    x, _ = samples(model)
    label = labels_of(model, x)
    x_adv = brief(name, targeted="given")(model, x, label, runtime=EAGER)
    assert torch.equal(labels_of(model, x_adv), label)
    if name in ("CW", "Square"):
        torch.testing.assert_close(x_adv, x, atol=1e-6, rtol=0)
