"""Compile one graph that Dynamo captured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from gradprune.errors import GradpruneError, PassError
from gradprune.inspect.observe import Observer
from gradprune.report.report import Report
from gradprune.torch_compat import dynamo, inductor

from .capture import capture
from .lower import InnerCompile, compile_as_captured, copy_graph, lower, restore_graph
from .options import Options

log = logging.getLogger(__name__)

Callback = Callable[..., Any]


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inner_compile: InnerCompile = inductor.compile_fx_inner,
    *,
    run_prologue: bool = True,
) -> tuple[Callback, Report]:
    """Compile one Dynamo graph.

    Returns:
        The compiled graph and its report.

    Raises:
        GradpruneError: As the backend does.
    """
    dynamo.forget_sources_of_constants()
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
        observer = Observer(report, options, dynamo.compiling_name())
        log.warning("gradprune compiled a graph as captured, because classifying it failed: %s", error, exc_info=error)
        compiled = compile_as_captured(gm, example_inputs, options, observer.compiling(inner_compile))
        observer.finish()
        return compiled, report
    report = Report(captured.form)
    observer = Observer(report, options, dynamo.compiling_name())
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
