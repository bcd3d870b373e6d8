"""Add the bias of a linear layer after the matrix product instead of inside it, on a CPU.

    %y = addmm(%b, %x, %w)                   %y = add(mm(%x, %w), %b)

BLAS adds to what the output holds already, so that ``addmm`` first writes the bias into every row; as an operator of
its own the addition is fused into whatever reads the result. Legal for a bias of one dimension, without scaling
factors. Reorders float.
"""

from __future__ import annotations

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of
from gradprune.ops import mm

from .base import Tier
from .rewrite import rewrite

aten = torch.ops.aten


@rewrite(
    aten.addmm.default,
    name="unfuse-bias",
    tier=Tier.REORDERS_FLOAT,
    reason="bias added where the product is read",
)
def unfuse_bias(node: fx.Node, build: Builder) -> fx.Node | None:
    """Split ``addmm`` into a product and a sum."""
    bias = tensor_of(node.args[0])  # type: ignore[arg-type]
    if node.kwargs or bias is None or bias.dim() != 1 or bias.device.type != "cpu":
        return None
    if bias.dtype not in (torch.float32, torch.float64):
        return None  # a product in half precision would be rounded twice
    return build.call(aten.add.Tensor, build.call(mm, *node.args[1:]), node.args[0])
