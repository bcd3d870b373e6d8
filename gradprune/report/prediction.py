"""What a step should cost by its FLOPs and its memory traffic: a model, to be compared with a measurement.

A contraction takes as long as its arithmetic or its traffic, whichever is longer. Everything else is taken to be fused,
forward and backward apart: what costs is reading and writing the buffers that contractions, the other half of the step
or the caller see. Values of weights alone are free. Launches, caches and the quality of kernels are not modelled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from gradprune.graph.cost import flops_by_node
from gradprune.graph.liveness import base, tensor_bytes
from gradprune.graph.regions import backward_nodes, weight_only_nodes
from gradprune.graph.step_graph import StepGraph

FLOPS_PER_BYTE = 10
"""FLOPs in the time of a byte of memory traffic, in float32: 7 to 25 on servers' CPUs and on GPUs without tensor cores
(an A100 has 13). Tensor cores do several times as many, which makes traffic matter more."""


@dataclass(frozen=True)
class Prediction:
    """What one run of a graph should cost.

    Attributes:
        moved_bytes: Bytes read and written.
        time: Time in units of a byte of traffic; only ratios mean something.
    """

    moved_bytes: int
    time: float


def predict(step_graph: StepGraph) -> Prediction:
    """Model the cost of a graph as it stands."""
    backward, weight_only = backward_nodes(step_graph), weight_only_nodes(step_graph)
    calls = [node for node in step_graph.calls() if node not in weight_only]
    by_class = flops_by_node(step_graph)
    flops = {node: sum(by_class.get(node, {}).values()) for node in calls}
    moved, time = 0, 0.0
    fused_reads: set[tuple[fx.Node, bool]] = set()
    visible = {base(value) for value in step_graph.output_values() if value is not None}
    for node in calls:
        if base(node) is not node or node.target is operator.getitem:
            continue
        owners = {base(operand) for operand in node.all_input_nodes}
        if flops[node]:
            traffic = sum(map(_bytes, owners)) + _bytes(node)
            moved += traffic
            time += max(flops[node] / FLOPS_PER_BYTE, traffic)
            visible |= owners
            continue
        for owner in owners:
            crosses = owner.op == "call_function" and (owner in backward) != (node in backward)
            if crosses:
                visible.add(owner)
            if crosses or owner.op == "placeholder" or owner in weight_only or flops.get(_producer(owner)):
                fused_reads.add((owner, node in backward))
    writes = [node for node in visible if node.op == "call_function" and not flops.get(_producer(node), 1)]
    fused = sum(_bytes(owner) for owner, _ in fused_reads) + sum(map(_bytes, writes))
    return Prediction(moved + fused, time + fused)


def _producer(node: fx.Node) -> fx.Node:
    """The operator that computes a value, which may be one of its several results."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else tensor_bytes(value)
