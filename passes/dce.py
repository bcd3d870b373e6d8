"""Dead-code elimination: a single backward sweep that erases what no output depends on.

    %gw = mm(%gy_t, %x)              (gone)
    %gx = mm(%gy, %w)                %gx = mm(%gy, %w)
    return (%gx,)                    return (%gx,)

Legal always: a node is erased only if it has no users, writes nothing, and draws no random numbers (an unused random
operator stays, so that the generator's state after the step is what it was). Exact.
"""

from __future__ import annotations

import torch
from torch import fx

from gradprune.graph.step_graph import is_random

from .base import Change


def is_removable(node: fx.Node) -> bool:
    """Whether a node may be erased once nobody uses it."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.is_impure(impure_random=False):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable and not is_random(node)
    return not isinstance(target, torch._ops.HigherOrderOperator)


def eliminate_dead_code(graph: fx.Graph, reason: str = "no output depends on it") -> list[Change]:
    """Erase dead nodes of ``graph``.

    Returns:
        The erased nodes in graph order.
    """
    erased: list[Change] = []
    for node in reversed(graph.nodes):
        if not node.users and is_removable(node):
            erased.append(Change.at(node, reason))
            graph.erase_node(node)
    return erased[::-1]
