"""Free operands of backward operators that are read for their shape alone.

    %g = avg_pool2d_backward(%gy, %x, ...)      %z = expand(full([1, 1, 1, 1], 0), shape of %x)
                                                %g = avg_pool2d_backward(%gy, %z, ...)

%x would have to be kept from forward to backward; a scalar expanded to its shape takes no memory. Which operators
read no element of which operand is said by ``rules/``, and ``tests/passes`` checks it by handing them NaN. Legal where
the shape is not symbolic. Exact.
"""

from __future__ import annotations

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of

from .base import Tier
from .rewrite import Skip, rewrite
from .rules import SHAPE_ONLY, shape_only_operators

aten = torch.ops.aten


@rewrite(
    *shape_only_operators(),
    name="shape-only-operands",
    tier=Tier.EXACT,
    reason="an operand is read for its shape alone",
)
def shape_only_operands(node: fx.Node, build: Builder) -> fx.Node | Skip | None:
    """Replace a saved tensor that a backward operator reads for its shape alone."""
    position = SHAPE_ONLY[str(node.target)]
    operand: fx.Node = node.args[position]  # type: ignore[assignment]
    value = tensor_of(operand)
    if operand.target is aten.expand.default or value is None:
        return None
    if not all(isinstance(size, int) for size in value.shape):
        return Skip("the shape of the saved operand is symbolic")
    kind = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    scalar = build.call(aten.full.default, [1] * value.dim(), 0, **kind)
    node.update_arg(position, build.call(aten.expand.default, scalar, list(value.shape)))
    return node
