"""From the options of the command line to attacks."""

from __future__ import annotations

import argparse

import pytest

from gradprune.attacks import CW, FGSM, PGD, AutoAttack
from gradprune.attacks.registry import ATTACKS, AttackOptions, StepSize, build_attacks, label_of
from gradprune.cli.options import parse_number, parse_setting, parse_step_size
from gradprune.errors import OptionError
from gradprune.support.arguments import parse_whole


def built(*names: str, **options: object) -> list:
    return [attack for _, attack in build_attacks(AttackOptions(**{"names": names, "eps": [0.1], **options}))]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_can_be_asked_for_by_name(name: str) -> None:
    (attack,) = built(name)
    assert type(attack) is ATTACKS[name]
    assert attack.seed == 0
    assert getattr(attack, "eps", 0.1) == 0.1


def test_a_grid_has_every_combination_once() -> None:
    attacks = built("pgd", "fgsm", "autoattack", "cw", eps=[0, 0.1, 0.2, 0.1], steps=[5, 10])
    assert [(type(a), getattr(a, "eps", None), a.steps) for a in attacks] == [
        (PGD, 0.1, 5),
        (PGD, 0.2, 5),
        (PGD, 0.1, 10),
        (PGD, 0.2, 10),
        (FGSM, 0.1, 1),
        (FGSM, 0.2, 1),
        (AutoAttack, 0.1, 100),
        (AutoAttack, 0.2, 100),
        (CW, None, 5),
        (CW, None, 10),
    ]


def test_step_sizes_follow_eps() -> None:
    assert [a.step_size for a in built("pgd", eps=[0.1, 0.2])] == [0.025, 0.05]
    assert [a.step_size for a in built("pgd", eps=[0.1, 0.2], step_size=StepSize(0.1, True))] == [
        pytest.approx(0.01),
        pytest.approx(0.02),
    ]
    assert [a.step_size for a in built("pgd", eps=[0.1, 0.2], step_size=StepSize(0.03, False))] == [0.03, 0.03]
    assert [a.step_length for a in built("fgsm", "rs-fgsm")] == [0.1, 0.125]


def test_settings_go_to_the_attacks_that_have_them() -> None:
    pgd, square = built("pgd", "square", settings={"restarts": 3, "queries": 7, "random_start": False})
    assert (pgd.restarts, pgd.random_start) == (3, False)
    assert (square.restarts, square.queries) == (3, 7)
    assert built("fab", settings={"overshoot": 1})[0].overshoot == 1


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (["pgdd"], {}, "'pgd'"),
        (["pgd"], {"settings": {"restart": 3}}, "'restarts'"),
        (["pgd"], {"settings": {"restarts": 1.5}}, "expected int, got 1.5"),
        (["pgd"], {"settings": {"restarts": True}}, "expected int, got True"),
        (["pgd"], {"settings": {"random_start": 1}}, "expected bool, got 1"),
        (["pgd"], {"settings": {"loss": 1}}, "expected str, got 1"),
        (["pgd"], {"settings": {"step": "x"}}, "step"),
        (["pgd"], {"settings": {"step_size": 0.1}}, "pass --step-size"),
        (["pgd"], {"settings": {"loss": "cee"}}, "'ce'"),
        (["autoattack"], {"targeted": "random"}, "cannot be targeted"),
        (["apgd-t"], {"targeted": "random"}, "cannot be targeted"),
        (["pgd", "cw"], {"norm": "linf"}, "leave out --norm linf"),
        (["deepfool"], {"norm": "l1"}, "l1"),
    ],
)
def test_what_does_not_exist_is_named(names: list[str], options: dict, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        built(*names, **options)


def test_labels_say_what_is_unusual() -> None:
    (plain,) = build_attacks(AttackOptions(names=["pgd"], eps=[0.3], steps=[7], norm="l2"))
    assert label_of(*plain) == "pgd"
    options = AttackOptions(
        names=["bim"],
        eps=[0.3],
        targeted="least-likely",
        step_size=StepSize(0.1, is_relative=True),
        settings={"restarts": 2, "keep": "best"},
    )
    assert label_of(*build_attacks(options)[0]) == "bim, least-likely, step eps/10, restarts 2, keep best"
    assert [label_of(*one) for one in build_attacks(AttackOptions(names=["fgsm", "ti-fgsm", "cw"], eps=[0.3]))] == [
        "fgsm",
        "ti-fgsm",
        "cw",
    ]


def test_numbers_are_also_fractions() -> None:
    assert parse_number("8/255") == 8 / 255
    assert parse_number(".05") == 0.05
    for text in ("-0.1", "8/0", "8/", "many", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="8/255"):
            parse_number(text)


def test_step_sizes_are_numbers_or_parts_of_eps() -> None:
    assert parse_step_size("2/255") == StepSize(2 / 255, is_relative=False)
    assert parse_step_size("eps/10").of(0.5) == 0.05
    assert parse_step_size("eps").of(0.5) == 0.5
    for text in ("eps/0", "eps/", "big"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_step_size(text)


def test_settings_have_types() -> None:
    assert [parse_setting(text) for text in ("a=1", "b-c=.5", "d=true", "e=False", "f=dlr")] == [
        ("a", 1),
        ("b_c", 0.5),
        ("d", True),
        ("e", False),
        ("f", "dlr"),
    ]
    for text in ("a", "=1", "a="):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=VALUE"):
            parse_setting(text)


def test_whole_numbers() -> None:
    assert parse_whole("3") == 3
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 1 on"):
            parse_whole(text)
