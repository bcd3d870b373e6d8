"""Divide a step graph into a prologue, which reads weights alone, and the step that is run K times per attack."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from gradprune.graph.invariance import hoisted_values
from gradprune.graph.step_graph import StepGraph


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
    step: fx.GraphModule
    step_inputs: list[int]
    values: list[torch.Tensor]


def split(gm: fx.GraphModule, step_graph: StepGraph) -> Split | None:
    """Split a graph at its hoisted values; ``None`` if it has none.

    Args:
        gm: The graph; it is not changed.
        step_graph: The roles of the same graph.
    """
    hoisted = hoisted_values(step_graph)
    if not hoisted:
        return None
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    prologue = fx.Graph()
    needed = _ancestors(hoisted, stop=set())
    copies: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in needed:
            copies[node] = prologue.node_copy(node, copies.__getitem__)
    prologue.output(tuple(copies[node] for node in hoisted))
    prologue_inputs = [index for index, node in enumerate(placeholders) if node in needed]

    step = fx.Graph()
    impure = [node for node in step_graph.calls() if node.is_impure()]
    needed = _ancestors([gm.graph.output_node(), *impure], stop=set(hoisted))
    copies = {}
    step_inputs = [index for index, node in enumerate(placeholders) if node in needed]
    for index in step_inputs:
        copies[placeholders[index]] = step.node_copy(placeholders[index], copies.__getitem__)
    for node in hoisted:
        copies[node] = step.placeholder(f"hoisted_{node.name}")
        copies[node].meta = {"val": node.meta["val"]}
    for node in gm.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = step.node_copy(node, copies.__getitem__)
    return Split(
        fx.GraphModule(gm, prologue),
        prologue_inputs,
        fx.GraphModule(gm, step),
        step_inputs,
        [node.meta["val"] for node in hoisted],
    )


def _ancestors(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all they are computed from, down to and without ``stop``."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node not in stop:
            found.add(node)
            waiting += node.all_input_nodes
    return found
