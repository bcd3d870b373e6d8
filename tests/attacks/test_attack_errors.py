"""Misuse of attacks: every error names the thing, and the model is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attack_testing import CLASSES, EAGER, KINDS, Network, brief, labels_of, samples
from helpers import ModelState
from torch import Tensor, nn

from gradprune.attacks import APGD, CW, FAB, PGD, AutoAttack, Square, TargetedAPGD
from gradprune.errors import AttackError, OptionError

# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if "norm" in KINDS[name].__dataclass_fields__])
def test_an_unknown_norm_is_named(name: str) -> None:
    with pytest.raises(OptionError, match="'l3'.*l2"):
        KINDS[name](norm="l3")


@pytest.mark.parametrize("name", KINDS)
def test_an_unknown_target_is_named_or_there_is_none(name: str) -> None:
    message = "'leastlikely'.*'least-likely'" if KINDS[name].can_be_targeted else f"{name} cannot be targeted"
    with pytest.raises(OptionError, match=message):
        KINDS[name](targeted="leastlikely")


@pytest.mark.parametrize("loss", ["cross-entropy", "kl", 3, None])
@pytest.mark.parametrize("name", ["APGD", "TargetedAPGD"])
def test_an_unknown_loss_is_named(name: str, loss: Any) -> None:
    with pytest.raises(OptionError, match=f"loss.*{loss}"):
        KINDS[name](loss=loss)


@pytest.mark.parametrize("loss", ["cross-entropy", 3, None])
def test_an_unknown_loss_of_pgd_is_named(loss: Any) -> None:
    with pytest.raises(OptionError, match=f"loss.*{loss}"):
        PGD(loss=loss)


@pytest.mark.parametrize("loss", ["difference", "dlr-targeted"])
@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "APGD"])
def test_losses_of_a_target_need_one(name: str, loss: str) -> None:
    with pytest.raises(OptionError, match="target"):
        KINDS[name](loss=loss)
    assert KINDS[name](loss=loss, targeted="given").loss == loss


def test_the_divergence_leads_to_no_target() -> None:
    with pytest.raises(OptionError, match="'kl'"):
        PGD(loss="kl", targeted="given")


COUNTS = ["steps", "restarts", "eot", "targets", "queries", "searches", "candidates", "scales"]
POSITIVE = ["eps", "step_size", "constant", "learning_rate", "share", "alpha_max", "overshoot", "backward", "rho"]
NOT_NEGATIVE = ["confidence", "decay", "neighborhood"]
BAD_NUMBERS = [
    *((name, option, value) for option in COUNTS for name in KINDS for value in (0, -1, 2.5, "3", None)),
    *((name, option, value) for option in [*POSITIVE, *NOT_NEGATIVE] for name in KINDS for value in (-1.0, math.nan)),
    *((name, option, value) for option in POSITIVE for name in KINDS for value in (math.inf, "0.1")),
    *((name, "neighbors", value) for name in KINDS for value in (-1, 1.5)),
    *((name, "kernel", value) for name in KINDS for value in (-1, 4, 3.0)),
    *((name, option, value) for option in ("diversity", "resize") for name in KINDS for value in (-0.1, 1.1)),
    *((name, "share", 1.1) for name in KINDS),
    *((name, "keep", "first") for name in KINDS),
    *((name, "seed", value) for name in KINDS for value in (0.5, "0")),
]


def test_bad_numbers_are_named() -> None:
    tried = 0
    for name, option, value in BAD_NUMBERS:
        if option in KINDS[name].__dataclass_fields__:
            tried += 1
            with pytest.raises(OptionError, match=option):
                KINDS[name](**{option: value})
    assert tried > 200


@pytest.mark.parametrize("bounds", [(1.0, 0.0), (0.0, 0.0), (0.0, math.nan), (0.0, math.inf), (0.0,), 1.0, "ab"])
@pytest.mark.parametrize("name", KINDS)
def test_bad_bounds_are_named(name: str, bounds: Any) -> None:
    with pytest.raises(OptionError, match="bounds"):
        KINDS[name](bounds=bounds)


@pytest.mark.parametrize("make", [AutoAttack, CW, Square, lambda **options: APGD(norm="l1", **options)])
def test_methods_that_need_bounds_say_so(make: Callable[..., Any]) -> None:
    with pytest.raises(OptionError, match="bounds"):
        make(bounds=None)


def test_fab_without_eps_has_nothing_to_restart_in() -> None:
    with pytest.raises(OptionError, match="restarts"):
        FAB(eps=None, restarts=2)
    with pytest.raises(OptionError, match="stop_at_success"):
        FAB(eps=None, stop_at_success=True)


# --- Inputs -----------------------------------------------------------------------------------------------------------

Change = Callable[[Tensor, Tensor], tuple[Any, Any]]

UNFIT: dict[str, tuple[Change, str]] = {
    "label too large": (lambda x, y: (x, y + CLASSES), r"classes of the model, 0 to 5"),
    "negative label": (lambda x, y: (x, y - 1 - y.min()), r"classes of the model, 0 to 5, and they are -1"),
    "integer images": (lambda x, y: ((255 * x).byte(), y), r"torch.uint8.*x.float\(\) / 255"),
    "above the bounds": (lambda x, y: (x + 0.5, y), "within the bounds 0 to 1"),
    "below the bounds": (lambda x, y: (x - 0.5, y), "within the bounds 0 to 1"),
    "NaN in inputs": (lambda x, y: (x.index_fill(3, torch.tensor(2), math.nan), y), "NaN"),
    "infinity in inputs": (lambda x, y: (x.index_fill(3, torch.tensor(2), math.inf), y), "infinity"),
    "labels of another type": (lambda x, y: (x, y.float()), "int64.*float32"),
    "labels of int32": (lambda x, y: (x, y.int()), "int64.*int32"),
    "labels of another shape": (lambda x, y: (x, y[:, None]), r"shape \(10,\)"),
    "one-hot labels": (lambda x, y: (x, torch.nn.functional.one_hot(y)), r"shape \(10,\)"),
    "too few labels": (lambda x, y: (x, y[:-1]), r"shape \(10,\)"),
    "labels elsewhere": (lambda x, y: (x, y.to("meta")), "labels on meta"),
    "no batch": (lambda x, y: (x[0, 0, 0], y[:8]), "batch"),
    "arrays": (lambda x, y: (x.numpy(), y.numpy()), "as_tensor"),
}


@pytest.mark.parametrize("problem", UNFIT)
@pytest.mark.parametrize("name", ["PGD", "APGD", "CW", "Square"])
def test_unfit_inputs_are_named_before_anything_happens(name: str, problem: str) -> None:
    model = Network().train()
    x, y = samples(model)
    state, (change, message) = ModelState.of(model), UNFIT[problem]
    with pytest.raises(AttackError, match=message):
        brief(name)(model, *change(x, y), runtime=EAGER)
    state.assert_untouched(model)


def test_rounding_beyond_the_bounds_is_no_error() -> None:
    model = Network()
    x, y = samples(model)
    x_adv = PGD(steps=1, seed=0)(model, x + 5e-7, y, runtime=EAGER)
    assert x_adv.max() <= 1


def test_any_number_is_an_input_where_there_are_no_bounds() -> None:
    model = Network()
    x, y = samples(model)
    x_adv = PGD(steps=1, bounds=None, eps=0.1, random_start=False, step_size=0.1)(model, x - 5, y, runtime=EAGER)
    assert (x_adv - (x - 5)).abs().max() > 0.0999


# --- Models -----------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Returns what a function makes of another network's logits."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = Network()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.network(x))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_is_broken_from_the_start_is_named(name: str, value: float) -> None:
    model = Logits(lambda logits: logits.index_fill(1, torch.tensor(3), value))
    x, y = samples(Network())
    with pytest.raises(AttackError, match="NaN"):
        brief(name)(model, x, y, runtime=EAGER)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "APGD", "FAB", "CW", "Square", "DeepFool", "AutoAttack"])
def test_nan_on_the_way_is_misclassified_and_no_error(name: str, norm: str) -> None:
    """A network that overflows away from the data is not robust there."""
    network = Network()
    x, y = samples(network)
    x = (64 * x).round() / 64
    y[1:] = labels_of(network, x)[1:]

    def forward(images: Tensor) -> Tensor:
        logits = network(images)
        is_clean = (64 * images - (64 * images).round()).abs().flatten(1).amax(1, keepdim=True) < 1e-3
        return torch.where(is_clean, logits, logits * math.nan)

    attack = brief(name, **({} if name == "CW" else {"norm": norm}))
    x_adv = attack(forward, x, y, runtime=EAGER)
    assert x_adv.isfinite().all()
    if name == "AutoAttack":
        assert forward(x_adv).isnan().any(1)[1:].all()


def test_nan_is_no_class() -> None:
    logits = torch.full((2, CLASSES), math.nan)
    labels = torch.tensor([[0, 1], [3, 0]])
    assert PGD().is_fooled(logits, labels).all()
    assert not PGD(targeted="given").is_fooled(logits, labels).any()


@pytest.mark.parametrize("function", [lambda logits: logits[:, 0], lambda logits: logits[..., None]])
def test_a_model_that_returns_no_logits_is_named(function: Callable[[Tensor], Any]) -> None:
    x, y = samples(Network())
    with pytest.raises(AttackError, match="logits"):
        PGD(steps=1)(Logits(function), x, y, runtime=EAGER)


def test_a_model_elsewhere_is_named() -> None:
    x, y = samples(Network())
    with pytest.raises(AttackError, match="model is on meta and the inputs are on cpu"):
        PGD(steps=1)(Network().to("meta"), x, y, runtime=EAGER)

    class OnAnotherGpu(Network):
        def parameters(self, recurse: bool = True) -> Iterator[Any]:
            yield from (type("Weight", (), {"device": torch.device("cuda:1")})() for _ in range(2))

    with pytest.raises(AttackError, match="model is on cuda:1 and the inputs are on cpu"):
        PGD(steps=1)(OnAnotherGpu(), x, y, runtime=EAGER)


def test_too_few_classes_for_a_loss_are_named() -> None:
    model = Logits(lambda logits: logits[:, :3])
    x, _ = samples(Network())
    y = torch.zeros(len(x), dtype=torch.int64)
    with pytest.raises(AttackError, match="'dlr-targeted' needs 4 classes"):
        TargetedAPGD(steps=1)(model, x, y, runtime=EAGER)
    with pytest.raises(AttackError, match="'dlr' needs 3 classes"):
        APGD(steps=1, loss="dlr")(Logits(lambda logits: logits[:, :2]), x, y, runtime=EAGER)
    # AutoAttack does without that part, and with fewer classes than it has targets.
    x_adv = AutoAttack(steps=3, queries=3, eps=0.3, seed=0)(model, x, y, runtime=EAGER)
    assert (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("name", ["Square", "AutoAttack", "DIFGSM", "TIFGSM"])
def test_methods_for_images_name_what_is_none(name: str) -> None:
    model = nn.Linear(5, CLASSES)
    x = torch.rand(4, 5)
    y = model(x).argmax(1)
    with pytest.raises((AttackError, OptionError), match="images"):
        brief(name, **({"diversity": 1.0} if name == "DIFGSM" else {}))(model, x, y, runtime=EAGER)


@pytest.mark.parametrize("name", ["PGD", "APGD", "TargetedAPGD", "FAB", "CW", "DeepFool", "VMIFGSM"])
def test_inputs_need_not_be_images(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    x = torch.rand(20, 5)
    y = model(x).argmax(1)
    x_adv = brief(name)(model, x, y, runtime=EAGER)
    assert (model(x_adv).argmax(1) != y).any()
