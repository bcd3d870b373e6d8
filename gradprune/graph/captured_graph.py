"""The graph that passes work on before autograd: Dynamo's, with the inputs known that are weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .step_graph import Form


@dataclass
class CapturedGraph:
    """A graph of torch functions and methods, which may write to its inputs.

    Attributes:
        graph: The graph.
        form: Of what it is the graph, as in ``StepGraph``.
        weights: Placeholders that hold a parameter or a buffer.
    """

    graph: fx.Graph
    form: Form
    weights: frozenset[fx.Node]

    def calls(self) -> Iterator[fx.Node]:
        """Nodes that compute something, in order."""
        return (node for node in self.graph.nodes if node.op in ("call_function", "call_method"))
