"""What of a step graph stays the same from step to step because it depends on weights alone."""

from __future__ import annotations

import torch
from torch import fx

from .liveness import is_view
from .regions import weight_only_nodes
from .step_graph import InputRole, OutputRole, StepGraph, is_random, tensor_of


def invariant_nodes(step_graph: StepGraph) -> set[fx.Node]:
    """Nodes that may be computed once for many steps, weights included.

    Their value depends on weights and constants alone; weights that the step itself writes, such as running statistics
    in training mode, are none. Random operators are not invariant, nor is what the step returns: two steps must not
    hand out the same memory.
    """
    candidates = weight_only_nodes(step_graph)
    varying = {node for node in candidates if _is_written(node, step_graph) or not _is_pure(node)}
    for node in step_graph.calls():
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    returned = [value for value in step_graph.output_values() if value is not None]
    while returned:
        node = returned.pop()
        if node in candidates and node.op == "call_function":
            varying.add(node)
            returned += node.all_input_nodes if is_view(node) else []
    return candidates - varying


def hoisted_values(step_graph: StepGraph) -> list[fx.Node]:
    """Invariant values that the rest of the step reads and that are worth computing ahead, in graph order.

    Views cost nothing, so a value is taken before the views that are made of it, and a view of a weight, or a constant,
    is no value to hoist.
    """
    invariant = invariant_nodes(step_graph)
    computed = _computed_from_weights(step_graph, invariant)
    hoisted: set[fx.Node] = set()
    for node in step_graph.graph.nodes:
        if node in invariant:
            continue
        for operand in node.all_input_nodes:
            value = operand
            while is_view(value) and value.all_input_nodes[0] in computed:
                value = value.all_input_nodes[0]
            is_worth_it = value in computed and not is_view(value)
            if operand in invariant and is_worth_it and tensor_of(value) is not None:
                hoisted.add(value)
    return [node for node in step_graph.graph.nodes if node in hoisted]


def _computed_from_weights(step_graph: StepGraph, invariant: set[fx.Node]) -> set[fx.Node]:
    """Invariant values that take arithmetic on a weight, be it in what is returned as well and so no such value."""
    depends = {node for node, role in step_graph.inputs.items() if role is InputRole.WEIGHT}
    arithmetic: set[fx.Node] = set()
    for node in step_graph.calls():
        if depends.isdisjoint(node.all_input_nodes):
            continue
        depends.add(node)
        if not is_view(node) or not arithmetic.isdisjoint(node.all_input_nodes):
            arithmetic.add(node)
    return arithmetic & invariant


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and not is_random(node)
    return not isinstance(target, torch._ops.HigherOrderOperator) and not node.is_impure()


def _is_written(node: fx.Node, step_graph: StepGraph) -> bool:
    """Whether the step writes to a weight, in the graph or by an output that is stored into it afterwards."""
    if node.op != "placeholder":
        return False
    if any(user.target is torch.ops.aten.copy_.default and user.args[0] is node for user in node.users):
        return True
    descriptors = step_graph.output_node.meta.get("desc") or ()
    return any(
        role is OutputRole.MUTATION and getattr(descriptor, "mutated_input", None) == node.meta.get("desc")
        for role, descriptor in zip(step_graph.outputs, descriptors, strict=False)
    )
