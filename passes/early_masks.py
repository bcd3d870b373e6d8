"""Compute boolean masks that the backward pass needs in the forward pass, in the step form.

    %r = relu(%c)                        %r = relu(%c)
    ...                                  %m = realize(le(%r, 0))
    %m = le(%r, 0)                       ...
    %g = where(%m, 0, %gy)               %g = where(%m, 0, %gy)

A step graph is one graph, without a partitioner to decide what is kept from forward to backward: a comparison would be
fused into its user, and the activation in full precision would live until then. Stored early, one byte per element
lives instead. Legal for pointwise operators with a boolean result whose operands the forward pass has computed. The
model form has a partitioner which finds this by itself, so the pass leaves it alone. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..analysis.regions import BACKWARD, backward_nodes
from ..ops import realize
from ..step_graph import StepGraph, tensor_of
from .base import Change, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten


@dataclass(frozen=True)
class EarlyMasks:
    """Move boolean masks from the backward pass to the forward pass and store them there."""

    name = "early-masks"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """See ``Pass.run``."""
        result = PassResult()
        if step_graph.form != "step":
            return result
        graph = step_graph.graph
        backward = backward_nodes(step_graph)
        order = {node: index for index, node in enumerate(graph.nodes)}
        moved: list[fx.Node] = []
        for node in list(step_graph.calls()):
            if node not in backward or not _is_mask(node):
                continue
            for alias in list(node.all_input_nodes):
                node.replace_input_with(alias, _without_aliases(alias))
            operands = node.all_input_nodes
            if any(operand in backward for operand in operands) or all(o.op == "placeholder" for o in operands):
                continue
            latest = max(operands, key=order.__getitem__)
            latest.append(node)
            order[node] = order[latest]
            backward.discard(node)
            node.meta.pop(BACKWARD)
            moved.append(node)
        for node in moved:
            # A mask that only feeds other masks is better fused into them.
            later = [user for user in node.users if user not in moved]
            if later:
                with graph.inserting_after(node):
                    stored = graph.call_function(realize, (node,))
                stored.meta = dict(node.meta)
                for user in later:
                    user.replace_input_with(node, stored)
                result.narrowed.append(Change.at(node, "mask kept for the backward pass instead of the activation"))
        if moved:
            result.removed += eliminate_dead_code(graph)
        return result


def _is_mask(node: fx.Node) -> bool:
    value = tensor_of(node)
    return (
        value is not None
        and value.dtype is torch.bool
        and value.dim() > 0
        and isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
    )


def _without_aliases(node: fx.Node) -> fx.Node:
    while node.target is aten.alias.default:
        node = node.args[0]  # type: ignore[assignment]
    return node
