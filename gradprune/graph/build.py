"""Insert nodes into an ATen graph together with their metadata."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from .invariance import invariant_nodes
from .regions import BACKWARD
from .step_graph import StepGraph

_KEPT = ("stack_trace", "from_node", "partitioner_tag", "seq_nr", BACKWARD)


class Knowledge:
    """What is known about a graph when a pass begins, worked out when it is first asked for."""

    def __init__(self, step_graph: StepGraph) -> None:
        self._step_graph = step_graph

    @cached_property
    def invariant(self) -> set[fx.Node]:
        """Nodes that depend on weights alone."""
        return invariant_nodes(self._step_graph)


class Builder:
    """Inserts calls before a node, as parts of what will replace it.

    Args:
        before: The node; where it came from and which pass it belongs to is noted on every inserted node.
        knowledge: What is known about its graph.

    Attributes:
        inserted: The nodes inserted so far.
    """

    def __init__(self, before: fx.Node, knowledge: Knowledge | None = None) -> None:
        self._before = before
        self._knowledge = knowledge
        self.inserted: list[fx.Node] = []

    def is_invariant(self, node: object) -> bool:
        """Whether a node depends on weights alone, so that it can be computed once per attack."""
        assert self._knowledge is not None
        return node in self._knowledge.invariant

    def call(self, target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call and compute its fake value."""
        with self._before.graph.inserting_before(self._before):
            node = self._before.graph.call_function(target, args, kwargs)
        values = tree_map(_value, (args, kwargs))
        # A call without operands, of ``full`` for example, is of the mode that the node before it is of.
        mode = next(_value(n) for n in (*node.all_input_nodes, *self._before.all_input_nodes)).fake_mode
        with mode, torch.no_grad():
            value = target(*values[0], **values[1])
        node.meta = {**{key: self._before.meta[key] for key in _KEPT if key in self._before.meta}, "val": value}
        self.inserted.append(node)
        return node


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument
