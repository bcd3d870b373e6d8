"""Bytes that a step graph keeps alive: what crosses from forward to backward, and the peak.

Both are properties of the graph as it stands. Fusion and recomputation make the compiled step need less; buffers are
counted once however many views they have. Inputs, which the caller owns, and what depends on weights alone are not
counted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from gradprune.torch_compat.aot import size_hint

from .regions import backward_nodes, weight_only_nodes
from .step_graph import StepGraph


def tensor_bytes(value: object) -> int:
    """Bytes of a tensor's elements, 0 for anything else."""
    if not isinstance(value, torch.Tensor):
        return 0
    # An expanded tensor holds one element for each of its expanded dimensions.
    elements = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        elements *= 1 if size_hint(stride) == 0 else size_hint(size)
    return elements * value.element_size()


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` shares the memory of its first operand, or is one of several views of it."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return (
        len(returns) == 1
        and returns[0].alias_info is not None
        and not returns[0].alias_info.is_write
        and isinstance(node.args[0], fx.Node)
    )


def base(node: fx.Node) -> fx.Node:
    """The node that owns the memory ``node`` is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def saved_readers(step_graph: StepGraph) -> dict[fx.Node, list[fx.Node]]:
    """Buffers that the forward pass produces and the backward pass reads, and the nodes that read them there.

    Values of weights alone are none.
    """
    backward = backward_nodes(step_graph)
    weight_only = weight_only_nodes(step_graph)
    saved: dict[fx.Node, list[fx.Node]] = {}
    for node in step_graph.calls():
        if node not in backward:
            continue
        for operand in node.all_input_nodes:
            owner = base(operand)
            if owner.op == "call_function" and owner not in backward and owner not in weight_only:
                saved.setdefault(owner, []).append(node)
    return saved


def saved_nodes(step_graph: StepGraph) -> list[fx.Node]:
    """Buffers that the forward pass produces and the backward pass reads, other than values of weights alone."""
    return list(saved_readers(step_graph))


def total_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of the values of ``nodes``."""
    return sum(tensor_bytes(node.meta.get("val")) for node in nodes)


def live_bytes(step_graph: StepGraph) -> list[int]:
    """Bytes alive while each operator runs, in graph order, each buffer freed after its last use."""
    last_use: dict[fx.Node, fx.Node] = {}
    for node in step_graph.graph.nodes:
        for operand in node.all_input_nodes:
            last_use[base(operand)] = node
    live = 0
    curve: list[int] = []
    alive: dict[fx.Node, int] = {}
    weight_only = weight_only_nodes(step_graph)
    for node in step_graph.graph.nodes:
        if node.op == "call_function" and base(node) is node and node not in weight_only:
            # A tuple's memory is counted at its items.
            size = tensor_bytes(node.meta.get("val"))
            if node.target is operator.getitem or size:
                alive[node] = size
                live += size
        if node.op == "call_function":
            curve.append(live)
        for operand in {base(operand) for operand in node.all_input_nodes} | {node}:
            if last_use.get(operand, operand) is node and operand in alive:
                live -= alive.pop(operand)
    return curve


def peak_bytes(step_graph: StepGraph) -> int:
    """Largest number of bytes alive at once when the nodes run in graph order."""
    return max(live_bytes(step_graph), default=0)
