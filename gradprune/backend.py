"""The ``torch.compile`` backend itself, and the reports of what it compiled."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import _torch
from .capture import capture
from .errors import GradpruneError, PassError
from .inspect.observe import Observer
from .inspect.report import Report
from .lower import InnerCompile, compile_as_captured, copy_graph, lower, restore_graph
from .options import Options

log = logging.getLogger(__name__)

Callback = Callable[..., Any]


def gradprune(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callback:
    """The backend. Torch calls it, for ``torch.compile(step, backend="gradprune", options={...})``.

    Args:
        gm: The graph that Dynamo captured.
        example_inputs: Its inputs.
        mode: One of Inductor's modes, such as ``"max-autotune"``.
        options: See ``gradprune.options.Options``.

    Returns:
        The compiled graph.

    Raises:
        OptionError: An option or a value is unknown.
        TrainingStepError: The step takes gradients of weights alone.
        PassError: A pass failed and ``strict`` is set.
    """
    compiled, report = compile_graph(
        gm, example_inputs, Options.parse({**({"mode": mode} if mode else {}), **(options or {})})
    )
    wrapper = _torch.compiling_wrapper()
    if wrapper is not None:
        _compilations.append((weakref.ref(wrapper), _torch.compiling_code(), report))
    return compiled


# Dynamo may trace gradient calls and recurrent layers while this backend compiles, see Note [Scoped Dynamo flags].
for _flag in _torch.TRACED_FLAGS:
    _torch.scope_to_backend(_flag, gradprune)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inner_compile: InnerCompile = _torch.compile_fx_inner,
    *,
    run_prologue: bool = True,
) -> tuple[Callback, Report]:
    """Compile one Dynamo graph.

    Returns:
        The compiled graph and its report.

    Raises:
        GradpruneError: As the backend does.
    """
    _torch.forget_sources_of_constants()
    backup = copy_graph(gm.graph)
    try:
        captured = capture(gm, forward_only=options.forward_only)
    except GradpruneError:
        raise
    except Exception as error:
        if options.strict:
            raise PassError(f"the captured graph could not be classified: {error!r}") from error
        restore_graph(gm.graph, backup)
        gm.recompile()
        report = Report("model", fallback=f"the captured graph could not be classified: {error!r}")
        observer = Observer(report, options, _torch.compiling_name())
        log.warning("gradprune compiled a graph as captured, because classifying it failed: %s", error, exc_info=error)
        compiled = compile_as_captured(gm, example_inputs, options, observer.compiling(inner_compile))
        observer.finish()
        return compiled, report
    report = Report(captured.form)
    observer = Observer(report, options, _torch.compiling_name())
    observer.dynamo(backup, example_inputs)
    inner_compile = observer.compiling(inner_compile)
    try:
        compiled = lower(
            gm, example_inputs, captured, options, report, inner_compile, observer, run_prologue=run_prologue
        )
    except BaseException as error:
        observer.abandon(error)
        raise
    observer.finish()
    return compiled, report


_compilations: list[tuple[weakref.ref[Any], Any, Report]] = []
"""Which ``torch.compile`` call, which function's code, and the report, for every graph compiled so far."""


def reports(compiled: Callable[..., Any] | torch.nn.Module) -> list[Report]:
    """The reports of what has been compiled so far for one ``torch.compile`` call.

    Args:
        compiled: What ``torch.compile(..., backend="gradprune")``, ``gradprune.compile`` or ``gradprune.accelerate``
            returned. Compilation happens at the first call, so before it the list is empty; graph breaks and
            recompilations add a report each.

    Raises:
        GradpruneError: ``compiled`` is not compiled by gradprune.
    """
    compiled = getattr(compiled, "_gradprune_compiled", compiled)
    wrapper = _torch.compile_wrapper_of(compiled)
    if wrapper is None or wrapper.compiler_fn is not gradprune:
        raise GradpruneError(
            f"{compiled!r} was not compiled by gradprune: pass what torch.compile(..., backend='gradprune') returned"
        )
    alive = [entry for entry in _compilations if entry[0]() is not None]
    _compilations[:] = alive
    code = _torch.code_of(compiled)
    # Dynamo shares what it compiled between equal torch.compile calls on one function, so the reports are shared too.
    return [
        report
        for reference, compiled_code, report in alive
        if reference() is wrapper or (reference() == wrapper and code is not None and compiled_code is code)
    ]
