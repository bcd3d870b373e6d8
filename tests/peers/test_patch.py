"""``gradprune.patch`` on attacks, models and functions of other libraries: the rest of what they do stays."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peer_testing import CLASSES, EPS, STEPS, Attack, Peers, network
from torch import Tensor, nn

import gradprune
from gradprune.compiler.hoisted_step import HoistedStep

Patch = Callable[[Any], Any]
BALL = {"eps": EPS, "steps": STEPS}


def of_torchattacks(name: str, **settings: Any) -> Callable[[Patch], Attack]:
    def make(patch: Patch) -> Attack:
        attacks = pytest.importorskip("torchattacks")
        return lambda model, x, y: patch(getattr(attacks, name)(model, **settings))(x, y)

    return make


def of_torchattack(patch: Patch) -> Attack:
    attacks = pytest.importorskip("torchattack")
    return lambda model, x, y: patch(attacks.VMIFGSM(model, device=torch.device("cpu"), **BALL))(x, y)


def foolbox_attack(patch: Patch) -> Attack:
    foolbox = pytest.importorskip("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu").transform_bounds((-1, 1))
        descent = patch(foolbox.attacks.LinfPGD(steps=STEPS))
        return (descent(wrapped, 2 * x - 1, y, epsilons=2 * EPS)[0] + 1) / 2  # type: ignore[no-any-return]

    return attack


def foolbox_model(patch: Patch) -> Attack:
    foolbox = pytest.importorskip("foolbox")

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        wrapped = patch(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"))
        return foolbox.attacks.DDNAttack(steps=STEPS)(wrapped, x, y, epsilons=None)[0]  # type: ignore[no-any-return]

    return attack


def art_attack(patch: Patch) -> Attack:
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        preprocessing = {"clip_values": (0.0, 1.0), "preprocessing": (0.1, 1.1), "device_type": "cpu"}
        classifier = estimators.PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 8, 8), CLASSES, **preprocessing)
        descent = evasion.ProjectedGradientDescent(classifier, eps=EPS, eps_step=0.03, max_iter=STEPS, verbose=False)
        return torch.from_numpy(patch(descent).generate(x.numpy(), y.numpy()))

    return attack


def adv_lib(patch: Patch) -> Attack:
    sys.modules.setdefault("visdom", ModuleType("visdom"))  # which it plots with if asked to
    attacks = pytest.importorskip("adv_lib.attacks")
    return lambda model, x, y: patch(functools.partial(attacks.ddn, steps=STEPS))(model, x, y)


def cleverhans(patch: Patch) -> Attack:
    pytest.importorskip("cleverhans")
    descent = importlib.import_module("cleverhans.torch.attacks.projected_gradient_descent").projected_gradient_descent

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        settings = {"eps": EPS, "eps_iter": 0.03, "nb_iter": STEPS, "norm": float("inf"), "sanity_checks": False}
        return patch(descent)(x=x, model_fn=model, y=y, **settings)  # type: ignore[no-any-return]

    return attack


MAKERS: dict[str, Callable[[Patch], Attack]] = {
    "Torchattacks PGD": of_torchattacks("PGD", **BALL),
    "Torchattacks CW": of_torchattacks("CW", steps=STEPS, lr=0.05, c=10),
    "Torchattacks AutoAttack": of_torchattacks("AutoAttack", eps=0.5, n_classes=CLASSES, seed=0),
    "torchattack": of_torchattack,
    "Foolbox attack": foolbox_attack,
    "Foolbox model": foolbox_model,
    "ART": art_attack,
    "adv-lib": adv_lib,
    "CleverHans": cleverhans,
}


@pytest.mark.parametrize("name", MAKERS)
def test_examples_are_those_of_the_library(peers: Peers, name: str) -> None:
    """Patched, the attack compiles the model that it is given; here it is given a compiled one, which it keeps."""
    patched: list[Any] = []

    def patch(attack: Any) -> Any:
        patched.append(gradprune.patch(attack))
        return patched[-1]

    unchanged, changed = MAKERS[name](lambda attack: attack), MAKERS[name](patch)
    peers.check(lambda model, x, y: (unchanged if model is peers.eager else changed)(model, x, y))
    reports = gradprune.reports(patched[0])
    assert reports == gradprune.reports(peers.fast)


def pgd(model: nn.Module) -> Any:
    return pytest.importorskip("torchattacks").PGD(model, **BALL, random_start=False)


def test_unpatched_it_is_as_it_was(peers: Peers) -> None:
    foolbox = pytest.importorskip("foolbox")
    estimators = pytest.importorskip("art.estimators.classification")
    model = network()
    classifier = estimators.PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 8, 8), CLASSES, device_type="cpu")
    wrapped, attack = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), pgd(model)
    before = dict(vars(wrapped)), dict(vars(attack))
    for one in (classifier, wrapped, attack, foolbox.attacks.LinfPGD()):
        attributes = dict(vars(one))
        assert gradprune.patch(one) is one
        assert vars(one) != attributes
        assert gradprune.patch(one) is one
        assert gradprune.unpatch(one) is one
        assert vars(one) == attributes
        with pytest.raises(gradprune.GradpruneError, match="was not patched"):
            gradprune.unpatch(one)
    assert classifier.model is model
    assert (vars(wrapped), vars(attack)) == before

    def function(model: nn.Module, x: Tensor) -> Tensor:
        return x

    assert gradprune.unpatch(gradprune.patch(gradprune.patch(function))) is function


def test_weights_are_looked_at_when_an_attack_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not at every pass; a change between two attacks is never missed."""
    looked: list[bool] = []
    looks = HoistedStep._equal_copies

    def equal_copies(step: HoistedStep, weights: Any) -> Any:
        looked.append(True)
        return looks(step, weights)

    monkeypatch.setattr(HoistedStep, "_equal_copies", equal_copies)
    model = network()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    attack = gradprune.patch(pgd(model))
    attack(x, y)
    for factor in (1.0, -1.0):
        with torch.no_grad():
            for weight in model.parameters():
                weight.data.mul_(factor)
        looked.clear()
        found = attack(x, y)
        assert len(looked) == 1
        torch.testing.assert_close(found, pgd(model)(x, y))


@pytest.mark.parametrize("value", [None, 3, nn.Linear(2, 2), nn.CrossEntropyLoss(), "attack"], ids=repr)
def test_what_cannot_be_patched_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="patch does not know how .* uses its model: give it gradprune.accelerate"):
        gradprune.patch(value)


def test_a_patched_function_needs_a_model(peers: Peers) -> None:
    attack = gradprune.patch(lambda model, x: model(x))
    with pytest.raises(TypeError, match="takes an nn.Module or a PyTorchModel of Foolbox, not function"):
        attack(lambda x: x, peers.x)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(gradprune.OptionError, match="no_such_option"):
        gradprune.patch(pgd(network()), no_such_option=True)
    with pytest.raises(gradprune.OptionError, match="no_such_option"):
        gradprune.patch(lambda model, x: x, no_such_option=True)
