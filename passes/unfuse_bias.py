"""Add the bias of a linear layer after the matrix product instead of inside it, on a CPU.

    %y = addmm(%b, %x, %w)                   %y = add(mm(%x, %w), %b)

BLAS adds to what the output holds already, so that ``addmm`` first writes the bias into every row; as an operator of
its own the addition is fused into whatever reads the result. Legal for a bias of one dimension, without scaling
factors. Reorders float.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops import mm

from .base import Change, PassResult, Tier

aten = torch.ops.aten


@dataclass(frozen=True)
class UnfuseBias:
    """Split ``addmm`` into a product and a sum."""

    name = "unfuse-bias"
    tier = Tier.REORDERS_FLOAT

    def run(self, step_graph: StepGraph) -> PassResult:
        """See ``Pass.run``."""
        result = PassResult()
        for node in step_graph.graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias = tensor_of(node.args[0])
            if node.kwargs or bias is None or bias.dim() != 1 or bias.device.type != "cpu":
                continue
            if bias.dtype not in (torch.float32, torch.float64):
                continue  # a product in half precision would be rounded twice
            build = Builder(node)
            total = build.call(aten.add.Tensor, build.call(mm, *node.args[1:]), node.args[0])
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            result.narrowed.append(Change.at(node, "bias added where the product is read"))
            step_graph.graph.erase_node(node)
        return result
