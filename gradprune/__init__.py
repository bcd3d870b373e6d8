"""A ``torch.compile`` backend for adversarial attacks: only the gradient of the input perturbation is computed.

step = torch.compile(attack_step, backend="gradprune")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import compile, reports
    from .compiler.hoisted_step import invalidate
    from .compiler.options import Options
    from .compiler.perturbations import perturbation
    from .errors import (
        AttackError,
        CompileError,
        DoubleBackwardError,
        GradpruneError,
        NoPerturbationError,
        OptionError,
        PassError,
        TrainingError,
        TrainingStepError,
        UnsupportedTorchError,
        WeightGradientError,
    )
    from .inspect.explain import explain
    from .report.report import Report
    from .runtime.accelerate import accelerate
    from .runtime.patch import patch, unpatch

    __version__: str

__all__ = [
    "AttackError",
    "CompileError",
    "DoubleBackwardError",
    "GradpruneError",
    "NoPerturbationError",
    "OptionError",
    "Options",
    "PassError",
    "Report",
    "TrainingError",
    "TrainingStepError",
    "UnsupportedTorchError",
    "WeightGradientError",
    "__version__",
    "accelerate",
    "compile",
    "explain",
    "invalidate",
    "patch",
    "perturbation",
    "reports",
    "unpatch",
]

_HOMES = {
    "Options": "compiler.options",
    "Report": "report.report",
    "accelerate": "runtime.accelerate",
    "compile": "backend",
    "explain": "inspect.explain",
    "invalidate": "compiler.hoisted_step",
    "patch": "runtime.patch",
    "perturbation": "compiler.perturbations",
    "reports": "backend",
    "unpatch": "runtime.patch",
}
"""Where names are found that are not errors. They are looked up when asked for: ``gradprune --help`` needs no torch."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'gradprune' has no attribute {name!r}")
    value = getattr(import_module(f"gradprune.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gradprune")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
