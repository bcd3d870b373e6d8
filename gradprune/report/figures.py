"""What is counted of one graph: operators, FLOPs, bytes."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from gradprune.graph.cost import count_flops, flops_by_node
from gradprune.graph.liveness import base, live_bytes, saved_nodes, total_bytes
from gradprune.graph.step_graph import StepGraph
from gradprune.passes.base import Change
from gradprune.passes.pipeline import count_ops

from .prediction import Prediction, predict
from .snapshot import Snapshot


@dataclass(frozen=True)
class Figures:
    """What is counted of one graph.

    Attributes:
        ops: Operators.
        flops: FLOPs by class.
        saved_bytes: Bytes kept from forward to backward.
        memory: Bytes alive while each operator runs, in graph order, without fusion.
        prediction: What one run should cost.
        graph: The nodes by name.
        weight_gradients: Operators that compute a weight gradient, and which output needs it.
        bytes_of: Bytes of what every operator computes, by the name of its node.
    """

    ops: int
    flops: dict[str, int]
    saved_bytes: int
    memory: list[int]
    prediction: Prediction
    graph: Snapshot
    weight_gradients: list[Change]
    bytes_of: dict[str, int]

    @staticmethod
    def of(step_graph: StepGraph) -> Figures:
        """Count."""
        graph = Snapshot.of(step_graph)
        return Figures(
            count_ops(step_graph),
            count_flops(step_graph),
            total_bytes(saved_nodes(step_graph)),
            live_bytes(step_graph),
            predict(step_graph),
            graph,
            _weight_gradients(step_graph, graph),
            {node.name: total_bytes([node]) for node in step_graph.calls()},
        )


def _weight_gradients(step_graph: StepGraph, seen: Snapshot) -> list[Change]:
    """Operators that compute a weight gradient, and which output needs it."""
    changes = []
    for node, classes in flops_by_node(step_graph).items():
        if not classes.get("weight_grad"):
            continue
        results = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
        _, output = seen.path(results[0].name if results else node.name)
        if output is not None:
            changes.append(Change.at(node, f"output {output} needs it: {seen.meaning(output)}"))
    return changes


def saved_by(forward: fx.Graph) -> int:
    """Bytes that a partitioned forward graph computes and hands to its backward graph."""
    output = forward.output_node()
    visible = set(output.meta["user_visible_output_idxs"])
    saved = {
        base(value): None
        for position, value in enumerate(output.args[0])  # type: ignore[arg-type]
        if position not in visible and isinstance(value, fx.Node) and base(value).op == "call_function"
    }
    return total_bytes(saved)
