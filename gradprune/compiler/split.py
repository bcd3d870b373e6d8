"""Divide a step graph into a prologue, which reads weights alone, and the step that is run K times per attack."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from gradprune.errors import PassError
from gradprune.graph.step_graph import InputRole, StepGraph


@dataclass
class Split:
    """A step graph in two.

    Attributes:
        prologue: Computes the hoisted values from weights.
        prologue_inputs: Which inputs of the whole graph it takes.
        step: Everything else. Takes inputs of the whole graph, then the hoisted values.
        step_inputs: Which inputs of the whole graph it takes.
        values: The hoisted values as fake tensors.
    """

    prologue: fx.GraphModule
    prologue_inputs: list[int]
    step: fx.Graph
    step_inputs: list[int]
    values: list[torch.Tensor]


def split(step_graph: StepGraph, names: Collection[str]) -> Split:
    """Take hoisted values out of a step graph, in place.

    Args:
        step_graph: The graph after all passes. What remains of it is the step.
        names: Names of the nodes that compute the hoisted values.

    Raises:
        PassError: A value to hoist depends on something else than weights.
    """
    graph = step_graph.graph
    hoisted = [node for node in graph.nodes if node.name in names]
    placeholders = list(graph.find_nodes(op="placeholder"))
    values = [node.meta["val"] for node in hoisted]
    prologue = fx.Graph()
    needed = _ancestors(hoisted)
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            copies[node] = prologue.node_copy(node, copies.__getitem__)
    prologue.output(tuple(copies[node] for node in hoisted))
    prologue.lint()
    prologue_inputs = [index for index, node in enumerate(placeholders) if node in needed]
    others = [node.name for node in placeholders if node in needed and step_graph.inputs[node] is not InputRole.WEIGHT]
    if others:
        raise PassError(f"a hoisted value depends on {', '.join(others)}, which is no weight")

    last, taken = placeholders[-1], set[fx.Node]()
    for node in hoisted:
        with graph.inserting_after(last):
            last = graph.placeholder(f"hoisted_{node.name}")
        last.meta = {"val": node.meta["val"]}
        taken.add(last)
        node.replace_all_uses_with(last)
    needed = _ancestors([step_graph.output_node, *(node for node in step_graph.calls() if node.is_impure())])
    step_inputs = [index for index, node in enumerate(placeholders) if node in needed]
    for node in reversed(graph.nodes):
        if node not in needed and node not in taken:
            graph.erase_node(node)
    graph.lint()
    prologue_module = fx.GraphModule(graph.owning_module or nn.Module(), prologue)
    return Split(prologue_module, prologue_inputs, graph, step_inputs, values)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
