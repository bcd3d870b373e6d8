"""The ``torch.compile`` backend itself, and the reports of what it compiled."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from .compiler import apart, stored
from .compiler.lower import compile_graph, compile_job
from .compiler.options import Options
from .errors import GradpruneError
from .inspect.observe import Observer
from .report.recorder import Recorder
from .report.report import Report
from .torch_compat import dynamo

log = logging.getLogger(__name__)

RUNS_EAGERLY = "not compiled, runs eagerly"
"""What ``Report.fallback_kind`` says where there is nothing else to report."""

Callback = Callable[..., Any]

F = TypeVar("F", bound=Callable[..., Any])


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
        options: See ``gradprune.Options``.

    Returns:
        The compiled graph.

    Raises:
        OptionError: An option or a value is unknown.
        TrainingStepError: The step takes gradients of weights alone.
        PassError: A pass failed and ``strict`` is set.
    """
    parsed = Options.parse({**({"mode": mode} if mode else {}), **(options or {})})
    recorder = Recorder(dynamo.compiling_name())
    compiled = compile_graph(gm, example_inputs, parsed, (recorder, Observer(recorder.report, parsed)))
    dynamo.note_compiled()
    wrapper = dynamo.compiling_wrapper()
    if wrapper is not None:
        reference = weakref.ref(wrapper, _forget)
        _compilations.append((reference, dynamo.compiling_code(), recorder.report))
    return compiled


# Dynamo may trace gradient calls and recurrent layers while this backend compiles, see Note [Scoped Dynamo flags].
for _flag in dynamo.TRACED_FLAGS:
    dynamo.scope_to_backend(_flag, gradprune)


_compilations: list[tuple[weakref.ref[Any], Any, Report]] = []
"""Which ``torch.compile`` call, which function's code, and the report, for every graph that can still be called."""


def _note_left_out(left: dynamo.LeftOut) -> None:
    """Say once what is left to Python, and note it for the reports, so that nothing runs eagerly without a word."""
    reason = f"{left.where}: {left.reason}"
    if any(reference() is left.wrapper and known == reason for reference, known in _left_out):
        return
    _left_out.append((weakref.ref(left.wrapper, _forget), reason))
    log.warning("gradprune: %s: %s", RUNS_EAGERLY if left.whole else "compiled in part", reason)


dynamo.on_left_out(gradprune, _note_left_out)


_left_out: list[tuple[weakref.ref[Any], str]] = []
"""Which ``torch.compile`` call, and what of it Dynamo left to Python and why."""


def _forget(gone: weakref.ref[Any]) -> None:
    _compilations[:] = [entry for entry in _compilations if entry[0] is not gone]
    _left_out[:] = [entry for entry in _left_out if entry[0] is not gone]


def compile_apart() -> None:
    """Compile and store what another process writes to this one's input, see the option ``background``."""
    apart.be_less_urgent()
    job = apart.Job.read(sys.stdin)
    compilation = job.compilation()
    compilation.listeners = [Recorder(), stored.Storing(job.key, compilation)]
    compile_job(job, compilation)


def reports(compiled: Callable[..., Any] | torch.nn.Module) -> list[Report]:
    """The reports of what has been compiled so far for one ``torch.compile`` call.

    Args:
        compiled: What ``torch.compile(..., backend="gradprune")``, ``gradprune.compile``, ``gradprune.accelerate`` or
            ``gradprune.patch`` returned. Compilation happens at the first call, so before it the list is empty; graph
            breaks and recompilations add a report each. What is compiled in the background is waited for.

    Raises:
        GradpruneError: ``compiled`` is not compiled by gradprune.
    """
    apart.finish_all()
    patched = getattr(compiled, "__dict__", {}).get("_gradprune_patched")
    if patched is not None:
        return [report for model in patched.models.compiled.values() for report in reports(model)]
    parts = vars(compiled).get("_gradprune_compiled") if isinstance(compiled, torch.nn.Module) else None
    if parts is not None:
        pairs = [_reports_of(part) for part in list(parts.values())]
        found = [report for pair in pairs for report in pair[0]]
        return _with_left_out(found, [*vars(compiled)["_gradprune_notes"], *(why for pair in pairs for why in pair[1])])
    return _with_left_out(*_reports_of(compiled))


def _with_left_out(found: list[Report], reasons: list[str]) -> list[Report]:
    for report in found:
        report.left_out = reasons
    if reasons and not found:
        return [Report("model", fallback="; ".join(reasons), fallback_kind=RUNS_EAGERLY, left_out=reasons)]
    return found


def _reports_of(compiled: Any) -> tuple[list[Report], list[str]]:
    """The reports of one ``torch.compile`` call, and what of it runs eagerly."""
    wrapper = dynamo.compile_wrapper_of(compiled)
    if wrapper is None or wrapper.compiler_fn is not gradprune:
        raise GradpruneError(
            f"{compiled!r} was not compiled by gradprune: pass what torch.compile(..., backend='gradprune') returned"
        )
    code = dynamo.code_of(compiled)
    # Dynamo shares what it compiled between equal torch.compile calls on one function, so the reports are shared too.
    found = [
        report
        for reference, compiled_code, report in _compilations
        if reference() is wrapper or (reference() == wrapper and code is not None and compiled_code is code)
    ]
    return found, [reason for reference, reason in _left_out if reference() is wrapper]


def compile(fn: F, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any) -> F:
    """Compile an attack step or a model: ``torch.compile(fn, backend="gradprune")`` with its options checked at once.

    Args:
        fn: A function that runs forward, takes the gradient of the perturbation and returns what it returns; or an
            ``nn.Module`` whose backward is called from outside.
        fullgraph: Raise at a graph break instead of compiling the pieces.
        dynamic: As in ``torch.compile``.
        options: See ``gradprune.Options``.

    Returns:
        The compiled function or module. Compilation happens at the first call.

    Raises:
        OptionError: An option or a value is unknown.
    """
    Options.parse(options)
    backend: Any = gradprune
    return torch.compile(fn, backend=backend, fullgraph=fullgraph, dynamic=dynamic, options=options or None)  # type: ignore[return-value]
