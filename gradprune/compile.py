"""``gradprune.compile`` and ``gradprune.explain``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .backend import gradprune
from .inspect.analyse import analyse
from .inspect.report import Report
from .options import Options

F = TypeVar("F", bound=Callable[..., Any])


def compile(fn: F, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any) -> F:
    """Compile an attack step or a model: ``torch.compile(fn, backend="gradprune")`` with its options checked at once.

    Args:
        fn: A function that runs forward, takes the gradient of the perturbation and returns what it returns; or an
            ``nn.Module`` whose backward is called from outside.
        fullgraph: Raise at a graph break instead of compiling the pieces.
        dynamic: As in ``torch.compile``.
        options: See ``gradprune.options.Options``.

    Returns:
        The compiled function or module. Compilation happens at the first call.

    Raises:
        OptionError: An option or a value is unknown.
    """
    Options.parse(options)
    backend: Any = gradprune
    return torch.compile(fn, backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options or None)  # type: ignore[return-value]


def explain(fn: Callable[..., Any], *args: Any, **options: Any) -> Report:
    """What gradprune would do to a step or a model, without running or compiling any kernel.

    The function is captured and analysed as ``torch.compile`` would; where a compiled graph would run, uninitialised
    memory of the right shape is returned instead. Arguments are copied; weights, buffers and their ``.grad`` are left
    as they are. What the function does in Python, such as appending to a list, is done.

    Args:
        fn: An attack step or a model.
        args: Its arguments, tensors or anything else. Of a model, at least one has to require grad.
        options: See ``gradprune.options.Options``.

    Returns:
        The report of the graph that takes the gradient; if a graph break leaves several, of the costliest one.

    Raises:
        NoPerturbationError: No graph takes the gradient of an input.
        GradpruneError: As the backend does.
    """
    return analyse(fn, args, Options.parse(options)).report
