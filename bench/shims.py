"""What libraries of the tables need to be imported beside current packages; nothing that they compute with.

AdverTorch was last released in 2020, DeepRobust in 2023; others import what they plot or run in parallel with.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from gradprune.errors import GradpruneError
from gradprune.workloads.vision import let_torchvision_import


@dataclass(frozen=True)
class Library:
    """A library of the tables.

    Attributes:
        distribution: What it is called by pip.
        stubs: Modules and their attributes that are made up where they are missing.
        note: What is said of that below a table.
    """

    distribution: str
    stubs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    note: str = ""


LIBRARIES = {
    "Torchattacks": Library("torchattacks"),
    "Foolbox": Library("foolbox"),
    "ART": Library(
        "adversarial-robustness-toolbox",
        {"multiprocess": ()},
        "ART's AutoAttack imports multiprocess, which it uses only if asked to run in parallel: an empty module if it "
        "is not installed",
    ),
    "AdverTorch": Library(
        "advertorch",
        {"torch.autograd.gradcheck": ("zero_gradients",)},
        "AdverTorch imports torch.autograd.gradcheck.zero_gradients, which torch 1.9 removed and its PGD never calls: "
        "None",
    ),
    "DeepRobust": Library(
        "deeprobust",
        {
            "texttable": ("Texttable",),
            "tensorboardX": ("SummaryWriter",),
            "scipy.optimize.optimize": ("_status_message",),
        },
        "DeepRobust imports texttable, tensorboardX and scipy.optimize.optimize._status_message, which its PGD does "
        "not use: None where they are missing",
    ),
    "CleverHans": Library("cleverhans"),
    "adv-lib": Library(
        "adv-lib", {"visdom": ("Visdom",)}, "adv-lib imports visdom, which it plots with if asked to: the same"
    ),
}
"""By their names in the tables."""


def load(name: str, module: str) -> Any:
    """Import a module of a library.

    Args:
        name: One of ``LIBRARIES``.
        module: Its module, such as ``"advertorch.attacks"``.

    Raises:
        GradpruneError: It cannot be imported.
    """
    library = LIBRARIES[name]
    with contextlib.suppress(ImportError):  # without torchvision there is nothing to prepare
        let_torchvision_import()
    for stubbed, attributes in library.stubs.items():
        _stub(stubbed, attributes)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise GradpruneError(
            f"{name} cannot be imported ({error}): run pip install --no-deps {library.distribution}, and install what "
            "it still misses"
        ) from error


def _stub(name: str, attributes: Sequence[str]) -> None:
    """Make up what is missing of a module: the whole of it, or some attributes, which are ``None``."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sys.modules[name] = ModuleType(name)
    module = importlib.import_module(name)
    for attribute in attributes:
        if not hasattr(module, attribute):
            setattr(module, attribute, None)


def versions() -> dict[str, str]:
    """The versions of all libraries, for the environment of figures."""
    found = {}
    for library in LIBRARIES.values():
        try:
            found[library.distribution] = version(library.distribution)
        except PackageNotFoundError:
            found[library.distribution] = "not installed"
    return found
