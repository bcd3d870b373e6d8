"""Follows one compilation: fills in the report, writes the dump, the log and torch's structured trace.

Nothing that goes wrong here fails a compilation: it is a warning, once, and the reason is in the report.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec

import torch
from torch import fx

from gradprune.compiler.options import Options
from gradprune.compiler.split import Split
from gradprune.graph.step_graph import StepGraph
from gradprune.passes.pipeline import PassRecord
from gradprune.report.kernels import called_kernels
from gradprune.report.report import Report
from gradprune.report.snapshot import INPUT_ROLES, OUTPUT_ROLES
from gradprune.torch_compat import aot, dynamo

from .dot import NODES_DRAWN, dot, svg
from .dump import VARIABLE, DumpFolder
from .program import program
from .repro import CONSTANTS, INPUTS, Repro

log = logging.getLogger(__name__)

P = ParamSpec("P")


def _harmless(method: Callable[Concatenate[Observer, P], None]) -> Callable[Concatenate[Observer, P], None]:
    """Have a failure of ``method`` be no more than a warning."""

    def wrapped(self: Observer, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.failed(error)

    wrapped.__doc__ = method.__doc__
    return wrapped


class Observer:
    """Is told of every stage of one compilation, in order.

    Args:
        report: To fill in.
        options: Of the compilation; ``dump`` and ``dump_inputs`` are read here and nowhere else.
        function: Name of what is compiled.
    """

    def __init__(self, report: Report, options: Options, function: str = "") -> None:
        self.report = report
        report.function = function
        self._save_inputs = options.dump_inputs
        self._examples: Sequence[Any] = ()
        self._sources: Sequence[str] = ()
        self._names: set[str] = set()
        self._repro: Repro | None = None
        self._page: dict[str, Any] = {}
        self._finished = False
        self._folder: DumpFolder | None = None
        root = options.dump if options.dump is not None else os.environ.get(VARIABLE) or None
        if root is not None:
            try:
                self._folder = DumpFolder(root, function or report.form)
                report.dump = str(self._folder.path)
            except Exception as error:
                what = f"the dump cannot be written to {os.fspath(root)!r}"
                self.failed(error, what, ": pass options={'dump': FOLDER} with a folder that can be written")

    @property
    def dumps(self) -> bool:
        """Whether there is a folder to write to."""
        return self._folder is not None

    def failed(self, error: Exception, what: str = "part of the dump is missing", hint: str = "") -> None:
        """Say once that something went wrong."""
        if self.report.dump_error is not None:
            return
        reason = repr(error)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}{f', {error.filename}' if error.filename else ''}"
        self.report.dump_error = f"{what}: {reason}"
        unforeseen = None if isinstance(error, OSError) else error
        log.warning("gradprune: %s%s", self.report.dump_error, hint, exc_info=unforeseen)

    @_harmless
    def dynamo(self, graph: fx.Graph, examples: Sequence[Any]) -> None:
        """The graph that Dynamo captured, before anything is done to it."""
        self._examples = examples
        self._sources = [dynamo.source_name(node) for node in graph.find_nodes(op="placeholder")]
        if self._folder is not None:
            self._folder.write_stage("dynamo.py", program(graph, "captured", ["What Dynamo captured.", _version()]))

    @_harmless
    def folded(self, record: PassRecord, graph: fx.Graph) -> None:
        """The one pass on Dynamo's graph has run."""
        log.debug("%s", _line(record))
        if self._folder is not None:
            self._folder.write_stage(f"{record.name}.py", program(graph, "folded", [_line(record), _version()]))

    @_harmless
    def captured(self, step_graph: StepGraph) -> None:
        """The ATen graph, before the passes that work on it."""
        self._names = {node.name for node in step_graph.graph.nodes}
        header = [f"The captured graph, forward and backward: {self.report.ops['before']} operators.", _version()]
        self._show("captured", step_graph, header)
        dynamo.trace_artifact("gradprune_captured", "string", lambda: self._program("captured", step_graph, header))
        if self._folder is None:
            return
        named = {}
        for node in step_graph.inputs:
            descriptor = node.meta.get("desc")
            if isinstance(descriptor, aot.PlainAOTInput):
                named[node.name] = self._examples[descriptor.idx]
        with aot.without_modes():
            self._repro = Repro.of(step_graph, named)
            tensors = {
                name: value.detach()
                for name, value in named.items()
                if isinstance(value, torch.Tensor) and not aot.is_fake(value)
            }
            if self._repro.constants:
                self._folder.write_with(CONSTANTS, functools.partial(torch.save, self._repro.constants))
            if self._save_inputs and tensors:
                self._folder.write_with(INPUTS, functools.partial(torch.save, tensors))
        self._page["before"] = _graph_data(step_graph)

    @_harmless
    def passed(self, record: PassRecord, step_graph: StepGraph) -> None:
        """A pass has run."""
        names = {node.name for node in step_graph.graph.nodes}
        self.report.note_removed(self._names - names, record.name)
        self._names = names
        log.debug("%s", _line(record))
        self._show(record.name, step_graph, [_line(record), _version()])

    @_harmless
    def pruned(self, step_graph: StepGraph) -> None:
        """All passes have run."""
        header = [f"After all passes: {self.report.ops['after']} operators.", _version()]
        dynamo.trace_artifact("gradprune_pruned", "string", lambda: self._program("pruned", step_graph, header))
        if self._folder is not None:
            if self._repro is not None:
                self._folder.write("repro.py", self._repro.script(step_graph.graph))
            self._page["after"] = _graph_data(step_graph)

    @_harmless
    def gave_up(self, step_graph: StepGraph, reason: str) -> None:
        """A pass failed; the graph is as it left it."""
        if self._folder is not None:
            header = [f"As a failing pass left it: {reason}", "Compiled is the graph as it was captured.", _version()]
            self._folder.write_stage("failed.py", self._program("failed", step_graph, header))

    @_harmless
    def split(self, parts: Split) -> None:
        """The step has been divided into what runs once per attack and the rest."""
        for name, module, what in (
            ("prologue", parts.prologue, "What depends on weights alone: runs once per attack, when weights changed."),
            ("step", parts.step, "The step, with the prologue's values as its last inputs."),
        ):
            text = functools.partial(program, module.graph, name, [what, _version()])
            dynamo.trace_artifact(f"gradprune_{name}", "string", text)
            if self._folder is not None:
                self._folder.write_stage(f"{name}.py", text())

    def compiling(self, inner_compile: Callable[..., Any]) -> Callable[..., Any]:
        """An inner compiler whose results are looked at on the way."""

        @functools.wraps(inner_compile)
        def compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
            part = "step" if self.report.form == "step" else "forward"
            compiled = inner_compile(gm, inputs, **kwargs)
            self._compiled("backward" if kwargs.get("is_backward") else part, compiled)
            return compiled

        return compile

    @_harmless
    def _compiled(self, part: str, compiled: object) -> None:
        # There on a hit of Inductor's cache too.
        code = getattr(compiled, "source_code", None)
        if not code:
            return
        self.report.kernels += called_kernels(code, part)
        if self._folder is not None:
            self._folder.write_stage(f"kernels-{part}.py", code)
            if self._finished:
                self._write_report(self._folder)

    @_harmless
    def finish(self) -> None:
        """All is compiled, but for the backward graph of a model: torch does that when backward is called."""
        self._examples = ()
        self._finished = True
        report = self.report
        log.info("%s%s", report.summary(), f", written to {report.dump}" if report.dump else "")
        dynamo.trace_artifact("gradprune_report", "json", lambda: json.dumps(report.to_dict(), indent=1))
        dynamo.trace_artifact("gradprune_report_text", "string", lambda: str(report))
        if self._folder is not None:
            self._write_report(self._folder)

    @_harmless
    def abandon(self, error: BaseException) -> None:
        """The compilation ended in an error; Dynamo also uses one to begin anew, and then there is nothing to keep."""
        if self._folder is not None and dynamo.is_restart(error):
            self._folder.discard()
        elif self._folder is not None:
            self.report.fallback = f"the compilation ended in an error: {error!r}"
            self._write_report(self._folder)

    def _write_report(self, folder: DumpFolder) -> None:
        self._write_pictures(folder)
        folder.write("report.json", json.dumps(self.report.to_dict(), indent=1) + "\n")
        folder.write("report.txt", f"{self.report}\n")

    @_harmless
    def _write_pictures(self, folder: DumpFolder) -> None:
        report = self.report
        if report.graphs:
            text = dot(report)
            folder.write("graph.dot", text)
            drawn = svg(text) if len(report.graphs["before"].nodes) <= NODES_DRAWN else None
            if drawn is not None:
                folder.write("graph.svg", drawn)
        if self._page.keys() == {"before", "after"}:
            from .page import write_page

            write_page(folder.path / "page.html", report, self._page["before"], self._page["after"])

    def _program(self, name: str, step_graph: StepGraph, header: Sequence[str]) -> str:
        roles = {node.name: f"{INPUT_ROLES[role]} {self._source(node)}" for node, role in step_graph.inputs.items()}
        returned = [
            f"output {position}: {OUTPUT_ROLES[role]}{'' if value is not None else ', not computed'}"
            for position, (value, role) in enumerate(zip(step_graph.output_values(), step_graph.outputs, strict=True))
        ]
        return program(step_graph.graph, name.replace("-", "_"), [*header, "", *returned], roles)

    def _source(self, node: fx.Node) -> str:
        """How the user's code reaches an input, as Dynamo has it."""
        descriptor = node.meta.get("desc")
        return self._sources[descriptor.idx] if isinstance(descriptor, aot.PlainAOTInput) else ""

    def _show(self, name: str, step_graph: StepGraph, header: Sequence[str]) -> None:
        """Write one stage to the log and the dump."""
        if not self.dumps and not log.isEnabledFor(logging.DEBUG):
            return
        text = self._program(name, step_graph, header)
        log.debug("%s:\n%s", name, text)
        if self._folder is not None:
            self._folder.write_stage(f"{name}.py", text)


def _graph_data(step_graph: StepGraph) -> Any:
    from .graph_data import graph_data

    return graph_data(step_graph)


def _line(record: PassRecord) -> str:
    result = record.result
    done = {"removed": result.removed, "narrowed": result.narrowed, "hoisted": result.hoisted, "left": result.skipped}
    counts = ", ".join(f"{len(changes)} {what}" for what, changes in done.items() if changes)
    return (
        f"After {record.name} ({record.tier.value}), which took {record.seconds * 1e3:.1f} ms: "
        f"{record.ops_before} -> {record.ops_after} operators; {counts or 'nothing changed'}."
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"gradprune {version('gradprune')}, torch {torch.__version__}"
    except PackageNotFoundError:
        return f"torch {torch.__version__}"
