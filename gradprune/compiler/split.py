"""Divide a step graph into a prologue, which reads weights alone, and the step that is run K times per attack."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from gradprune.errors import PassError
from gradprune.graph.step_graph import InputRole, StepGraph, set_outputs
from gradprune.ops import hoisted as hoisted_value


@dataclass
class Split:
    """A step graph in two.

    Attributes:
        prologue: Computes the hoisted values from weights.
        prologue_inputs: Which inputs of the whole graph it takes.
        step: Everything else. Takes inputs of the whole graph, then the hoisted values.
        step_inputs: Which inputs of the whole graph it takes.
        values: The hoisted values as fake tensors.
        saved: Which outputs are hoisted values, as pairs of an output and a value: backward passes read those that were
            valid in their forward pass.
    """

    prologue: fx.GraphModule
    prologue_inputs: list[int]
    step: fx.Graph
    step_inputs: list[int]
    values: list[torch.Tensor]
    saved: list[tuple[int, int]] = field(default_factory=list)


def split(step_graph: StepGraph, names: Collection[str]) -> Split:
    """Take hoisted values out of a step graph, in place.

    Args:
        step_graph: The graph after all passes. What remains of it is the step; of a model, the graph that torch divides
            into forward and backward, in which operators stand for the hoisted values, see ``forward_of``.
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

    is_divided_again = InputRole.TANGENT in step_graph.inputs.values()
    last, taken = placeholders[-1], set[fx.Node](placeholders if is_divided_again else ())
    for position, node in enumerate(hoisted):
        with graph.inserting_after(last):
            if is_divided_again:
                last = graph.call_function(hoisted_value, (placeholders[prologue_inputs[0]], position))
                last.meta = {"recompute": CheckpointPolicy.MUST_SAVE, "ac_graph_id": 0}
            else:
                last = graph.placeholder(f"hoisted_{node.name}")
        last.meta["val"] = node.meta["val"]
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


def forward_of(parts: Split, graph: fx.Graph) -> Split:
    """The division of a model's forward pass.

    Args:
        parts: That of the whole graph.
        graph: The forward pass. Hoisted values become inputs, behind its own.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    positions = {node.name: position for position, node in enumerate(placeholders)}
    stand_ins = {node.args[1]: node for node in graph.find_nodes(op="call_function", target=hoisted_value)}
    outputs, saved = list(graph.output_node().args[0]), []  # type: ignore[arg-type]
    last = placeholders[-1]
    for value, fake in enumerate(parts.values):
        with graph.inserting_after(last):
            last = graph.placeholder(f"hoisted_{value}")
        last.meta = {"val": fake}
        if value in stand_ins:
            saved += [(output, value) for output, node in enumerate(outputs) if node is stand_ins[value]]
            stand_ins[value].replace_all_uses_with(last)
            graph.erase_node(stand_ins[value])
    returned = {output for output, _ in saved}
    set_outputs(graph, [None if index in returned else node for index, node in enumerate(graph.output_node().args[0])])  # type: ignore[arg-type]
    graph.lint()
    inputs = [positions[node.name] for node in parts.prologue.graph.find_nodes(op="placeholder")]
    return Split(parts.prologue, inputs, graph, list(range(len(placeholders))), parts.values, saved)


def erase_stand_ins(graph: fx.Graph) -> None:
    """Take what stands for hoisted values out of a backward pass, which has those that it reads as inputs."""
    for node in graph.find_nodes(op="call_function", target=hoisted_value):
        graph.erase_node(node)


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
