"""Every error gradprune raises on purpose. Each names the thing, says what was expected and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

try:
    from torch._dynamo.exc import ShortenTraceback
except ImportError:  # a torch so old that all there is to raise is UnsupportedTorchError
    ShortenTraceback = RuntimeError  # type: ignore[assignment, misc]


class GradpruneError(RuntimeError):
    """Base class of gradprune's own errors."""


class CompileError(GradpruneError, ShortenTraceback):
    """Raised while a step is compiled, before anything has run.

    Inherits from Dynamo's ``ShortenTraceback`` so that ``torch.compile`` lets it through as itself rather than wrapped
    into a ``BackendCompilerFailed``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(CompileError, ValueError):
    """An option, or its value, is unknown."""


class UnsupportedTorchError(GradpruneError, ImportError):
    """The installed torch is outside the range that gradprune was checked against."""


class NoPerturbationError(CompileError):
    """The step takes no gradient of an input perturbation."""


class TrainingStepError(CompileError):
    """Every gradient taken belongs to a weight: this is a training step, which gradprune must not compile."""


class PassError(CompileError):
    """A pass failed or produced an invalid graph (only raised with ``strict=True``)."""


class WeightGradientError(GradpruneError):
    """A weight gradient was asked for explicitly from a graph that was compiled without weight gradients."""


class DoubleBackwardError(GradpruneError):
    """The gradient computed by a compiled model was itself differentiated."""


class AttackError(GradpruneError, ValueError):
    """An attack cannot be run on this model with these inputs."""


class TrainingError(GradpruneError):
    """Training cannot go on, or not from this checkpoint."""


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """Say that ``name`` is not among ``valid``, and which one was probably meant."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid)[:12])}"
    return f"no {kind} {name!r}: {hint}"
