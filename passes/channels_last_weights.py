"""Bring the weights of convolutions into channels-last order once per attack, on a GPU.

    %y = convolution(%x, %w, %b, ...)        %l = clone(%w, memory_format=channels_last)  in the prologue
                                             %y = convolution(%x, %l, %b, ...)

Where Inductor computes a graph in channels-last order, it converts the weights at every call. The pass hoists that, for
graphs that Inductor says it will compute so. Legal for convolutions of two spatial dimensions whose
weight depends on weights alone. Reorders float: the order may decide which kernel a library picks.
"""

from __future__ import annotations

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of
from gradprune.torch_compat.inductor import computes_in_channels_last

from .base import Tier
from .rewrite import rewrite

aten = torch.ops.aten

DEVICES = ("cuda",)
"""Where it applies. On a CPU weights are packed instead."""


@rewrite(
    aten.convolution.default,
    name="channels-last-weights",
    tier=Tier.REORDERS_FLOAT,
    reason="weight converted to channels-last once per attack",
    needs=["hoist-invariants"],
    when=lambda step_graph: computes_in_channels_last(step_graph.graph),
)
def channels_last_weights(node: fx.Node, build: Builder) -> fx.Node | None:
    """Have a convolution read its weight in channels-last order."""
    weight: fx.Node = node.args[1]  # type: ignore[assignment]
    value = tensor_of(weight)
    if not build.is_invariant(weight) or value is None or value.dim() != 4 or value.device.type not in DEVICES:
        return None
    if value.is_contiguous(memory_format=torch.channels_last):
        return None
    node.update_arg(1, build.call(aten.clone.default, weight, memory_format=torch.channels_last))
    return node
