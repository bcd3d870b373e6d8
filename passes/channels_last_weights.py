"""Bring the weights of convolutions into channels-last order once per attack, on a GPU.

    %y = convolution(%x, %w, %b, ...)        %l = clone(%w, memory_format=channels_last)  in the prologue
                                             %y = convolution(%x, %l, %b, ...)

Where Inductor computes a graph in channels-last order, it converts the weights at every call. The pass hoists that, for
graphs that Inductor says it will compute so. Legal in step graphs, for convolutions of two spatial dimensions whose
weight depends on weights alone. Reorders float: the order may decide which kernel a library picks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradprune.graph.build import Builder
from gradprune.graph.invariance import invariant_nodes
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.torch_compat.inductor import computes_in_channels_last

from .base import Change, PassResult, Tier

aten = torch.ops.aten

DEVICES = ("cuda",)
"""Where it applies. On a CPU weights are packed instead."""


@dataclass(frozen=True)
class ChannelsLastWeights:
    """Convert weights of convolutions ahead."""

    name = "channels-last-weights"
    tier = Tier.REORDERS_FLOAT

    def run(self, step_graph: StepGraph) -> PassResult:
        """See ``Pass.run``."""
        result = PassResult()
        convolutions = step_graph.graph.find_nodes(op="call_function", target=aten.convolution.default)
        if step_graph.form != "step" or not convolutions or not computes_in_channels_last(step_graph.graph):
            return result
        invariant = invariant_nodes(step_graph)
        for node in convolutions:
            weight = node.args[1]
            value = tensor_of(weight)
            if weight not in invariant or value is None or value.dim() != 4 or value.device.type not in DEVICES:
                continue
            if value.is_contiguous(memory_format=torch.channels_last):
                continue
            converted = Builder(node).call(aten.clone.default, weight, memory_format=torch.channels_last)
            node.update_arg(1, converted)
            result.narrowed.append(Change.at(node, "weight converted to channels-last once per attack"))
        return result
