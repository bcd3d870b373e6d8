"""More work never means a smaller loss or fewer samples fooled, and a verdict does not depend on how it is reached."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_testing import EAGER, EPS, Network, brief, labels_of, norms_of, options_of, samples
from torch import Tensor

from gradprune.attacks import APGD, PGD, Attack, AutoAttack, Runtime
from gradprune.runtime.losses import LABEL_LOSSES

PATH_FAMILY = ["PGD", "MIFGSM", "NIFGSM", "VMIFGSM", "DIFGSM", "TransferAttack"]
LEAVING = [*PATH_FAMILY, "APGD", "TargetedAPGD", "FAB", "AutoAttack"]
"""Attacks in which samples leave the batch when they are fooled, with ``stop_at_success`` where it is an option."""

WEAKER = 0.3
"""Share of the radii at which a good part of the samples holds out in double precision."""


def attacked(attack: Attack, runtime: Runtime = EAGER) -> tuple[Tensor, Tensor, Tensor]:
    """Examples, whether each fools the model, and their margins; of many samples in float64, where nothing is close."""
    model = Network()
    x, y = samples(model, 40, torch.float64)
    x_adv = attack(model, x, y, runtime=runtime)
    with torch.no_grad():
        margins = LABEL_LOSSES["margin"][0](model(x_adv), torch.stack([y, y], 1))
    return x_adv, labels_of(model, x_adv) != y, margins


def weak(name: str, **options: object) -> Attack:
    norm = str(options.get("norm", "linf"))
    return brief(name, **{"eps": WEAKER * EPS[norm], **options})


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", PATH_FAMILY)
def test_the_best_point_is_never_worse_than_the_last(name: str, norm: str) -> None:
    options = {"norm": norm, "loss": "margin", "steps": 6, "step_size": EPS[norm], "restarts": 1}
    _, _, best = attacked(weak(name, keep="best", **options))
    _, _, last = attacked(weak(name, keep="last", **options))
    assert (best >= last).all()
    assert (best > last).any(), "the steps are too small for this test"


@pytest.mark.parametrize(
    ("name", "norm"), [(name, norm) for name in ("PGD", "APGD", "Square", "FAB", "RSFGSM") for norm in norms_of(name)]
)
def test_more_restarts_fool_no_fewer(name: str, norm: str) -> None:
    options = {**options_of(norm), **({"loss": "margin"} if name in ("PGD", "RSFGSM", "APGD") else {})}
    _, once, margin = attacked(weak(name, restarts=1, **options))
    _, often, best_margin = attacked(weak(name, restarts=4, **options))
    assert (often | ~once).all()
    assert not once.all()
    assert once.any()
    if "loss" in options:
        held = ~often if name == "APGD" else slice(None)  # of samples that are fooled it looks for no larger loss
        assert (best_margin >= margin)[held].all()
        assert (best_margin > margin)[held].any()


@pytest.mark.parametrize("name", LEAVING)
def test_samples_that_leave_change_no_verdict(name: str) -> None:
    attack = weak(name)
    if any(field.name == "stop_at_success" for field in dataclasses.fields(attack)):
        attack = dataclasses.replace(attack, stop_at_success=True)
    _, fooled, _ = attacked(attack)
    assert 0.1 < fooled.double().mean() < 0.9, "the radius is unfit for this test"
    for runtime in (Runtime(compile=False, active_set=False), Runtime(compile=False, batch_size=7)):
        _, again, _ = attacked(attack, runtime)
        assert torch.equal(again, fooled)


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "VMIFGSM"])
def test_samples_that_hold_out_are_what_they_are_without_leaving(name: str, keep: str) -> None:
    # Steps so long that the last point is not the best.
    options = {"keep": keep, "steps": 6, "step_size": EPS["linf"], "restarts": 1}
    stopping, fooled, _ = attacked(weak(name, stop_at_success=True, **options))
    running, _, _ = attacked(weak(name, **options))
    torch.testing.assert_close(stopping[~fooled], running[~fooled], atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_that_stops_at_success_fools_the_same(norm: str) -> None:
    stopping, fooled, _ = attacked(weak("APGD", norm=norm, restarts=1))
    running, again, _ = attacked(weak("APGD", norm=norm, restarts=1, stop_at_success=False))
    assert torch.equal(fooled, again)
    torch.testing.assert_close(stopping[~fooled], running[~fooled], atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_autoattack_fools_all_that_any_of_its_parts_does(norm: str) -> None:
    attack = AutoAttack(norm=norm, eps=WEAKER * EPS[norm], steps=10, queries=30, targets=3, seed=0)
    _, fooled, _ = attacked(attack)
    # What is random in the first part is drawn alike; the later ones see fewer samples and draw otherwise.
    _, by_first, _ = attacked(dataclasses.replace(attack.parts[0], seed=0))
    assert (fooled | ~by_first).all()
    for part in attack.parts:
        _, by_part, _ = attacked(dataclasses.replace(part, seed=0))
        assert by_part.sum() <= fooled.sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_reaches_a_larger_loss_than_pgd(norm: str) -> None:
    """As it is made for: with as many steps, and none of them chosen."""
    _, _, of_apgd = attacked(APGD(norm=norm, eps=EPS[norm], steps=30, stop_at_success=False, seed=0))
    steps = {"norm": norm, "eps": EPS[norm], "steps": 30, "step_size": EPS[norm] / 4}
    _, _, of_pgd = attacked(PGD(**steps, seed=0))
    assert of_apgd.mean() >= of_pgd.mean() - 0.01


def test_compiled_attacks_give_the_verdicts_of_eager_ones() -> None:
    """All of these share one compilation of gradients and one of logits, for two sizes of batch each."""
    model = Network()
    x, y = samples(model, 40)
    for name in ("PGD", "MIFGSM", "APGD", "TargetedAPGD", "FAB", "Square", "CW", "DeepFool", "AutoAttack"):
        options = {} if name in ("CW", "DeepFool") else {"eps": WEAKER * EPS["linf"]}
        attack = brief(name, **options, **({"stop_at_success": True} if name in ("PGD", "MIFGSM", "FAB") else {}))
        verdicts = [labels_of(model, attack(model, x, y, runtime=runtime)) != y for runtime in (EAGER, Runtime())]
        # In float32 a sample on the boundary may fall on either side.
        assert (verdicts[0] != verdicts[1]).sum() <= 1, name
