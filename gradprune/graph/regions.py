"""Which nodes of a step graph belong to the backward pass, and which depend on weights alone."""

from __future__ import annotations

from torch import fx

from gradprune.torch_compat.dynamo import dynamo_nodes

from .step_graph import InputRole, OutputRole, StepGraph

BACKWARD = "gradprune_backward"
"""Key in ``node.meta`` that marks nodes of the backward pass. Passes copy it to the nodes they put in their place."""


def mark_backward(step_graph: StepGraph, gradient_calls: frozenset[str]) -> None:
    """Mark the nodes of the backward pass.

    In the step form these are the nodes that AOTAutograd traced from one of ``gradient_calls``, the Dynamo nodes that
    take a gradient. In the model form they are those that depend on a tangent.
    """
    if step_graph.form == "step":
        backward = {node for node in step_graph.calls() if not gradient_calls.isdisjoint(dynamo_nodes(node))}
    else:
        backward = descendants(step_graph, {n for n, role in step_graph.inputs.items() if role is InputRole.TANGENT})
    for node in step_graph.calls():
        if node in backward:
            node.meta[BACKWARD] = True


def backward_nodes(step_graph: StepGraph) -> set[fx.Node]:
    """Nodes of the backward pass."""
    return {node for node in step_graph.calls() if BACKWARD in node.meta}


def descendants(step_graph: StepGraph, roots: set[fx.Node]) -> set[fx.Node]:
    """``roots`` and every node that depends on one of them."""
    reached = set(roots)
    for node in step_graph.calls():
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def weight_only_nodes(step_graph: StepGraph) -> set[fx.Node]:
    """Nodes whose value depends on weights and constants alone, weights included."""
    others = {node for node, role in step_graph.inputs.items() if role is not InputRole.WEIGHT}
    varying = descendants(step_graph, others)
    return {node for node in step_graph.graph.nodes if node not in varying and node.op != "output"}


def weight_gradient_nodes(step_graph: StepGraph) -> set[fx.Node]:
    """Nodes of the backward pass that lead to weight gradients and to nothing else."""
    wanted: set[fx.Node] = set()
    for value, role in zip(step_graph.output_values(), step_graph.outputs, strict=True):
        if isinstance(value, fx.Node) and role not in (OutputRole.WEIGHT_GRAD, OutputRole.KEPT_WEIGHT_GRAD):
            wanted.add(value)
    for node in reversed(step_graph.graph.nodes):
        if node in wanted or (node.op == "call_function" and node.is_impure()):
            wanted.update(node.all_input_nodes)
            wanted.add(node)
    return {node for node in backward_nodes(step_graph) if node not in wanted}
