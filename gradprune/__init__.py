"""A ``torch.compile`` backend for adversarial attacks: only the gradient of the input perturbation is computed.

step = torch.compile(attack_step, backend="gradprune")
"""

from importlib.metadata import PackageNotFoundError, version

from .torch_version import check_version

check_version()  # before anything imports a private part of torch

from .accelerate import accelerate  # noqa: E402
from .backend import reports  # noqa: E402
from .compile import compile, explain  # noqa: E402
from .errors import (  # noqa: E402
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
from .inspect.report import Report  # noqa: E402
from .options import Options  # noqa: E402
from .prologue import invalidate  # noqa: E402

try:
    __version__ = version("gradprune")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

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
    "reports",
]
