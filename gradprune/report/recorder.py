"""Writes the report of a compilation while it goes on."""

from __future__ import annotations

from typing import Any

from torch import fx

from gradprune.compiler.events import Fallback, Listener
from gradprune.graph.step_graph import Form, StepGraph
from gradprune.passes.pipeline import PassRecord

from . import archive
from .figures import saved_by
from .kernels import called_kernels
from .report import Report


class Recorder(Listener):
    """Fills in a report.

    Attributes:
        report: The report, complete once the compilation is finished, but for the kernels of a model's backward graph.
    """

    def __init__(self, function: str = "") -> None:
        self.report = Report("model", function=function)
        self._names: set[str] = set()
        self._before_tracing = 0
        self._was_traced = False

    def classified(self, form: Form) -> None:
        """Note the form."""
        self.report.form = form

    def traced(self, step_graph: StepGraph) -> None:
        """Keep the graph as it was before the passes."""
        self._was_traced = True
        self._before_tracing = len(self.report.passes)
        self._names = {node.name for node in step_graph.graph.nodes}
        self.report.keep(step_graph, "before")

    def passed(self, record: PassRecord, graph: fx.Graph, step_graph: StepGraph | None) -> None:
        """Note what the pass did, and which nodes went with it."""
        self.report.passes.append(record)
        if step_graph is not None:
            names = {node.name for node in graph.nodes}
            self.report.note_removed(self._names - names, record.name)
            self._names = names

    def pruned(self, step_graph: StepGraph) -> None:
        """Keep the graph as it is after the passes."""
        self.report.keep(step_graph, "after")

    def fell_back(self, what: Fallback, reason: str, graph: fx.Graph | None) -> None:
        """Note what has to be done without, and forget the passes that are undone."""
        report = self.report
        report.fallback = reason if report.fallback is None else f"{report.fallback}; {reason}"
        report.fallback_kind = what.value
        if what in (Fallback.PASSES, Fallback.CAPTURED):
            del report.passes[self._before_tracing :]

    def storing(self, notes: dict[str, Any]) -> None:
        """Have the report stored."""
        notes["report"] = archive.to_data(self.report)

    def restored(self, notes: dict[str, Any]) -> None:
        """Make the report that of the compilation which was stored."""
        archive.fill_in(self.report, notes["report"])
        self.report.is_stored = True

    def checked(self, outcome: str) -> None:
        """Note how the comparison with eager ended."""
        self.report.check = outcome

    def compiling(self, part: str, graph: fx.Graph) -> None:
        """Take the bytes that forward hands to backward from the graph that torch's partitioner made."""
        if part == "forward" and self._was_traced:
            self.report.note_saved(saved_by(graph))

    def compiled(self, part: str, result: object) -> None:
        """Note the kernels. The code is there on a hit of Inductor's cache too."""
        code = getattr(result, "source_code", None)
        if code:
            self.report.kernels += called_kernels(code, part)
