"""Attacks by their names, and from options that several of them share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from gradprune import attacks as library
from gradprune.errors import OptionError, unknown
from gradprune.runtime import Query

from . import Attack


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    """No attack: inputs and labels are checked like those of any other, and returned as they came."""

    can_be_targeted = False

    def run(self, query: Query, x: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        """See ``Attack.run``."""
        return x.clone()


ATTACKS: dict[str, type[Attack]] = {
    "fgsm": library.FGSM,
    "rs-fgsm": library.RSFGSM,
    "bim": library.BIM,
    "pgd": library.PGD,
    "mi-fgsm": library.MIFGSM,
    "ni-fgsm": library.NIFGSM,
    "si-ni-fgsm": library.SINIFGSM,
    "vmi-fgsm": library.VMIFGSM,
    "vni-fgsm": library.VNIFGSM,
    "di-fgsm": library.DIFGSM,
    "ti-fgsm": library.TIFGSM,
    "apgd": library.APGD,
    "apgd-t": library.TargetedAPGD,
    "cw": library.CW,
    "deepfool": library.DeepFool,
    "fab": library.FAB,
    "square": library.Square,
    "autoattack": library.AutoAttack,
}

HAVE_OPTIONS = ("norm", "eps", "step_size", "targeted", "bounds", "seed")
"""Fields of attacks that ``--set`` leaves to options of their own."""
FIXED_STEPS = ("fgsm", "rs-fgsm", "autoattack")
"""Attacks that are what they are because of their number of steps."""


@dataclass(frozen=True)
class StepSize:
    """A step size, in the units of the inputs or in ``eps``."""

    value: float
    is_relative: bool

    def of(self, eps: float) -> float:
        """The step size in a ball of radius ``eps``."""
        return self.value * eps if self.is_relative else self.value


CLEAN = "clean"
"""Name of ``Clean`` in tables; it is not asked for by name."""

DEFAULT_STEP_SIZE = StepSize(1 / 4, is_relative=True)


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """Which attacks: all combinations of what applies to each.

    Attributes:
        names: Of ``ATTACKS``.
        eps: Radii; 0 stands for no attack.
        norm: ``None`` for the attack's own default.
        steps: ``None`` for the attack's own default.
        step_size: For attacks that are given one; FGSM has its own.
        targeted: See ``Attack``.
        bounds: See ``Attack``.
        seed: See ``Attack``.
        settings: Further fields of attacks; each goes to the attacks that have it.
    """

    names: Sequence[str]
    eps: Sequence[float]
    norm: str | None = None
    steps: Sequence[int] | None = None
    step_size: StepSize = DEFAULT_STEP_SIZE
    targeted: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int | None = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def build_attacks(options: AttackOptions) -> list[tuple[str, Attack]]:
    """The attacks asked for with the names they were asked for by, each once.

    Raises:
        OptionError: One does not exist, or not with these options.
    """
    for name in options.names:
        if name not in ATTACKS:
            raise OptionError(unknown("attack", name, ATTACKS))
    _check_settings(options)
    built = [(name, attack) for name in options.names for attack in _variants(name, options)]
    return list(dict.fromkeys(built))


def _variants(name: str, options: AttackOptions) -> list[Attack]:
    kind: Any = ATTACKS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    common: dict[str, Any] = {"bounds": options.bounds, "seed": options.seed}
    common.update({key: value for key, value in options.settings.items() if key in fields})
    if options.targeted is not None:
        if not kind.can_be_targeted:
            raise OptionError(f"the attack {name} cannot be targeted: leave out --targeted, or the attack")
        common["targeted"] = options.targeted
    if "norm" in fields and options.norm is not None:
        common["norm"] = options.norm
    elif options.norm not in (None, "l2"):
        raise OptionError(f"the attack {name} is one of the l2 norm: leave out --norm {options.norm}, or the attack")
    takes_steps = "steps" in fields and name not in FIXED_STEPS and "steps" not in options.settings
    found = []
    for steps in options.steps or (None,):
        chosen: dict[str, Any] = {"steps": steps} if takes_steps and steps is not None else {}
        if "eps" not in fields:
            found.append(kind(**common, **chosen))
            continue
        for eps in options.eps:
            if eps == 0:
                continue
            if "step_size" in fields and not issubclass(kind, library.FGSM):
                chosen["step_size"] = options.step_size.of(eps)
            found.append(kind(**common, **chosen, eps=eps))
    return found


def _check_settings(options: AttackOptions) -> None:
    """Check names and types of ``settings``; values are the attacks' own matter."""
    fields = {field.name: field for name in options.names for field in dataclasses.fields(ATTACKS[name])}
    for name, value in options.settings.items():
        if name in HAVE_OPTIONS:
            raise OptionError(f"--set {name}: pass --{name.replace('_', '-')}")
        allowed = [field for field, is_ in fields.items() if field not in HAVE_OPTIONS and _type(is_) is not None]
        if name not in allowed:
            raise OptionError(f"--set: {unknown('setting', name, allowed)}, for {', '.join(options.names)}")
        wanted = _type(fields[name])
        assert wanted is not None
        fits = isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool)
        if not fits and not (wanted is float and type(value) is int):
            raise OptionError(f"--set {name}: expected {wanted.__name__}, got {value!r}")


def _type(field: dataclasses.Field[Any]) -> type | None:
    """The type of a field as its default shows; ``None`` for one that a command line cannot give."""
    return type(field.default) if isinstance(field.default, bool | int | float | str) else None


def label_of(name: str, attack: Attack) -> str:
    """What an attack is called in tables: its name, and what is not as usual but for norm, eps and steps."""
    own: dict[str, Any] = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    usual = {field.name: field.default for field in dataclasses.fields(attack)}
    unusual = [str(attack.targeted)] if attack.targeted else []
    if "step_size" in own and not isinstance(attack, library.FGSM):
        share = own["step_size"] / own["eps"]
        if not math.isclose(share, DEFAULT_STEP_SIZE.value):
            unusual.append(f"step eps/{1 / share:.3g}" if share else "step 0")
    unusual += [
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in own.items()
        if key not in (*HAVE_OPTIONS, "steps") and value != usual[key]
    ]
    return ", ".join([name, *unusual])
