"""Shows a compilation while it goes on: the dump, the log and torch's structured trace.

What goes wrong here is a warning, once, and the reason is in the report.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gradprune.compiler.events import Fallback, Listener
from gradprune.compiler.options import Options
from gradprune.compiler.split import Split
from gradprune.graph.step_graph import Form, StepGraph
from gradprune.passes.pipeline import PassRecord, count_ops
from gradprune.report.report import Report
from gradprune.report.snapshot import INPUT_ROLES, OUTPUT_ROLES
from gradprune.torch_compat import aot, dynamo

from .dot import NODES_DRAWN, dot, svg
from .dump import VARIABLE, DumpFolder
from .graph_data import graph_data
from .page import write_page
from .program import program
from .repro import CONSTANTS, INPUTS, Repro

log = logging.getLogger(__name__)


class Observer(Listener):
    """Shows every stage of one compilation.

    Args:
        report: What a recorder fills in, which is told of each event first.
        options: Of the compilation; ``dump`` and ``dump_inputs`` are read here and nowhere else.
    """

    def __init__(self, report: Report, options: Options) -> None:
        self.report = report
        self._options = options
        self._examples: Sequence[Any] = ()
        self._sources: Sequence[str] = ()
        self._captured = ""
        self._repro: Repro | None = None
        self._page: dict[str, Any] = {}
        self._finished = False
        self._folder: DumpFolder | None = None

    @property
    def needs_stages(self) -> bool:
        """Whether there is a dump, a log of everything or a trace to be written."""
        return self._root is not None or log.isEnabledFor(logging.DEBUG) or dynamo.is_traced()

    def captured(self, graph: fx.Graph, example_inputs: Sequence[Any]) -> None:
        """Look at the graph while it is what Dynamo captured."""
        self._examples = example_inputs
        self._sources = [dynamo.source_name(node) for node in graph.find_nodes(op="placeholder")]
        if self._root is not None:
            self._captured = program(graph, "captured", ["What Dynamo captured.", _version()])

    def classified(self, form: Form) -> None:
        """Begin the dump: its folder is called by the function, or else by the form."""
        root = self._root
        if root is None:
            return
        try:
            self._folder = DumpFolder(root, self.report.function or self.report.form)
            self.report.dump = str(self._folder.path)
        except Exception as error:
            what = f"the dump cannot be written to {os.fspath(root)!r}"
            self._note(error, what, ": pass options={'dump': FOLDER} with a folder that can be written")
            return
        self._folder.write_stage("dynamo.py", self._captured)

    @property
    def _root(self) -> str | os.PathLike[str] | None:
        return self._options.dump if self._options.dump is not None else os.environ.get(VARIABLE) or None

    def passed(self, record: PassRecord, graph: fx.Graph, step_graph: StepGraph | None) -> None:
        """Show what the pass did and left behind."""
        log.debug("%s", _line(record))
        if step_graph is not None:
            self._show(record.name, step_graph, [_line(record), _version()])
        elif self._folder is not None:
            self._folder.write_stage(f"{record.name}.py", program(graph, "folded", [_line(record), _version()]))

    def traced(self, step_graph: StepGraph) -> None:
        """Show the graph before the passes, and keep what it takes to run it again."""
        operators = count_ops(step_graph)
        header = [f"The captured graph, forward and backward: {operators} operators.", _version()]
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
            if self._options.dump_inputs and tensors:
                self._folder.write_with(INPUTS, functools.partial(torch.save, tensors))
        self._page["before"] = graph_data(step_graph)

    def pruned(self, step_graph: StepGraph) -> None:
        """Show the graph after the passes."""
        header = [f"After all passes: {count_ops(step_graph)} operators.", _version()]
        dynamo.trace_artifact("gradprune_pruned", "string", lambda: self._program("pruned", step_graph, header))
        if self._folder is not None:
            if self._repro is not None:
                self._folder.write("repro.py", self._repro.script(step_graph.graph))
            self._page["after"] = graph_data(step_graph)

    def fell_back(self, what: Fallback, reason: str, graph: fx.Graph | None) -> None:
        """Show what a failure left behind."""
        if self._folder is not None and graph is not None:
            header = [f"As a failure left it: {reason}", f"{what.value.capitalize()}.", _version()]
            self._folder.write_stage("failed.py", program(graph, "failed", header))

    def checked(self, outcome: str) -> None:
        """Write the report again, in which the outcome is."""
        if self._folder is not None:
            self._write_report(self._folder)

    def split(self, parts: Split) -> None:
        """Show both parts."""
        for name, graph, what in (
            ("prologue", parts.prologue.graph, "Depends on weights alone: runs once per attack, when weights changed."),
            ("step", parts.step, "The step, with the prologue's values as its last inputs."),
        ):
            text = functools.partial(program, graph, name, [what, _version()])
            dynamo.trace_artifact(f"gradprune_{name}", "string", text)
            if self._folder is not None:
                self._folder.write_stage(f"{name}.py", text())

    def compiled(self, part: str, result: object) -> None:
        """Write the generated code. It is there on a hit of Inductor's cache too."""
        code = getattr(result, "source_code", None)
        if code and self._folder is not None:
            self._folder.write_stage(f"kernels-{part}.py", code)
            if self._finished:
                self._write_report(self._folder)

    def finished(self) -> None:
        """Write the report."""
        self._examples = ()
        self._finished = True
        report = self.report
        if log.isEnabledFor(logging.INFO):
            log.info("%s%s", report.summary(), f", written to {report.dump}" if report.dump else "")
        dynamo.trace_artifact("gradprune_report", "json", lambda: json.dumps(report.to_dict(), indent=1))
        dynamo.trace_artifact("gradprune_report_text", "string", lambda: str(report))
        if self._folder is not None:
            self._write_report(self._folder)

    def abandoned(self, error: BaseException) -> None:
        """Keep the dump of a failure; where Dynamo only begins anew there is nothing to keep."""
        if self._folder is not None and dynamo.is_restart(error):
            self._folder.discard()
        elif self._folder is not None:
            self.report.fallback = f"the compilation ended in an error: {error!r}"
            self._write_report(self._folder)

    def failed(self, event: str, error: Exception) -> None:
        """Say once that something is missing."""
        self._note(error, "part of the dump is missing")

    def _note(self, error: Exception, what: str, hint: str = "") -> None:
        if self.report.dump_error is not None:
            return
        reason = repr(error)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}{f', {error.filename}' if error.filename else ''}"
        self.report.dump_error = f"{what}: {reason}"
        unforeseen = None if isinstance(error, OSError) else error
        log.warning("gradprune: %s%s", self.report.dump_error, hint, exc_info=unforeseen)

    def _write_report(self, folder: DumpFolder) -> None:
        try:
            self._write_pictures(folder)
        except Exception as error:
            self.failed("pictures", error)
        folder.write("report.json", json.dumps(self.report.to_dict(), indent=1) + "\n")
        folder.write("report.txt", f"{self.report}\n")

    def _write_pictures(self, folder: DumpFolder) -> None:
        report = self.report
        if report.graphs:
            text = dot(report)
            folder.write("graph.dot", text)
            drawn = svg(text) if len(report.graphs["before"].nodes) <= NODES_DRAWN else None
            if drawn is not None:
                folder.write("graph.svg", drawn)
        if self._page.keys() == {"before", "after"}:
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
        if self._folder is None and not log.isEnabledFor(logging.DEBUG):
            return
        text = self._program(name, step_graph, header)
        log.debug("%s:\n%s", name, text)
        if self._folder is not None:
            self._folder.write_stage(f"{name}.py", text)


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
