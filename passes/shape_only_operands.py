"""Free operands of backward operators that are read for their shape alone.

    %g = avg_pool2d_backward(%gy, %x, ...)      %z = expand(full([1, 1, 1, 1], 0), shape of %x)
                                                %g = avg_pool2d_backward(%gy, %z, ...)

%x would have to be kept from forward to backward; a scalar expanded to its shape takes no memory. Legal where the
operator reads no element of that operand, which ``tests/passes`` checks by handing it NaN, and where the shape is not
symbolic. Exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gradprune.graph.regions import BACKWARD
from gradprune.graph.step_graph import StepGraph, tensor_of

from .base import Change, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten

SHAPE_ONLY_OPERANDS: dict[str, int] = {
    "aten::_adaptive_avg_pool2d_backward": 1,
    "aten::_adaptive_avg_pool3d_backward": 1,
    "aten::adaptive_max_pool2d_backward": 1,
    "aten::adaptive_max_pool3d_backward": 1,
    "aten::avg_pool2d_backward": 1,
    "aten::avg_pool3d_backward": 1,
    "aten::max_pool2d_with_indices_backward": 1,
    "aten::max_pool3d_with_indices_backward": 1,
    "aten::reflection_pad1d_backward": 1,
    "aten::reflection_pad2d_backward": 1,
    "aten::reflection_pad3d_backward": 1,
    "aten::replication_pad1d_backward": 1,
    "aten::replication_pad2d_backward": 1,
    "aten::replication_pad3d_backward": 1,
}
"""Operator name to the position of the operand whose elements it never reads."""


@dataclass(frozen=True)
class ShapeOnlyOperands:
    """Replace saved tensors that a backward operator reads for their shape alone."""

    name = "shape-only-operands"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """See ``Pass.run``."""
        result = PassResult()
        graph = step_graph.graph
        for node in list(step_graph.calls()):
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            position = SHAPE_ONLY_OPERANDS.get(node.target._schema.name)
            if position is None:
                continue
            operand = node.args[position]
            assert isinstance(operand, fx.Node)
            value = tensor_of(operand)
            if operand.target is aten.expand.default or value is None:
                continue
            if not all(isinstance(size, int) for size in value.shape):
                result.skipped.append(Change.at(node, "the shape of the saved operand is symbolic"))
                continue
            node.args = (*node.args[:position], _expanded_scalar(node, value), *node.args[position + 1 :])
            result.narrowed.append(Change.at(node, f"operand {position} is read for its shape alone"))
        if result.narrowed:
            result.removed += eliminate_dead_code(graph)
        return result


def _expanded_scalar(before: fx.Node, like: torch.Tensor) -> fx.Node:
    """A zero expanded to the shape of ``like``, inserted before a node."""
    graph = before.graph
    kwargs: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
    with graph.inserting_before(before):
        scalar = graph.call_function(aten.full.default, ([1] * like.dim(), 0), kwargs)
        expanded = graph.call_function(aten.expand.default, (scalar, list(like.shape)))
    scalar.meta = _meta_from(before, like.new_empty([1] * like.dim()))
    expanded.meta = _meta_from(before, like.new_empty([1] * like.dim()).expand(like.shape))
    return expanded


def _meta_from(node: fx.Node, value: torch.Tensor) -> dict[str, object]:
    kept = ("stack_trace", "from_node", "partitioner_tag", "seq_nr", BACKWARD)
    return {**{key: node.meta[key] for key in kept if key in node.meta}, "val": value}
