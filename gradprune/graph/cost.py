"""FLOPs of a step graph, split into forward, input gradient, weight gradient and the rest.

Counted are contractions (convolutions, matrix products, fused attention), a multiply-add as two, with torch's own
formulas except for convolutions: torch 2.13 counts the weight gradient of a grouped convolution once per group too
often, while it costs what the forward pass costs ([SB]: 2BTM each).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from gradprune.ops import packed_convolution
from gradprune.torch_compat.aot import size_hint

from .regions import backward_nodes, weight_gradient_nodes, weight_only_nodes
from .step_graph import StepGraph, tensor_of

aten = torch.ops.aten

_SAME_FORMULA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
"""Operators that torch has no formula for, and those that do the same."""

DIRECT_FLOPS = "gradprune_flops"
"""Key in ``node.meta`` for nodes that compute a convolution by another algorithm: the convolution's own FLOPs."""

FLOP_CLASSES = ("forward", "input_grad", "weight_grad", "other")


def count_flops(step_graph: StepGraph) -> dict[str, int]:
    """FLOPs by class.

    Returns:
        ``forward``, ``input_grad``, ``weight_grad``, and ``other`` for contractions of weights alone (spectral norm,
        for example). A convolution backward that computes a weight gradient counts it under ``weight_grad`` wherever
        its result goes.
    """
    totals = dict.fromkeys(FLOP_CLASSES, 0)
    for classes in flops_by_node(step_graph).values():
        for name, flops in classes.items():
            totals[name] += flops
    return totals


def flops_by_node(step_graph: StepGraph) -> dict[fx.Node, dict[str, int]]:
    """FLOPs of every node that has some, by class as in ``count_flops``."""
    found: dict[fx.Node, dict[str, int]] = {}
    backward = backward_nodes(step_graph)
    weight_gradients = weight_gradient_nodes(step_graph)
    weight_only = weight_only_nodes(step_graph)
    for node in step_graph.calls():
        classes = dict.fromkeys(FLOP_CLASSES, 0)
        if node.target is aten.convolution_backward.default:
            each = convolution_flops(node)
            mask: Any = node.args[-1]
            classes["weight_grad" if node in weight_gradients else "input_grad"] += each * bool(mask[0])
            classes["weight_grad"] += each * bool(mask[1])
        elif node in weight_only:
            classes["other"] = node_flops(node)
        elif node in weight_gradients:
            classes["weight_grad"] = node_flops(node)
        elif node in backward:
            classes["input_grad"] = node_flops(node)
        else:
            classes["forward"] = node_flops(node)
        classes = {name: flops for name, flops in classes.items() if flops}
        if classes:
            found[node] = classes
    return found


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node; 0 for what is no contraction or has no known shape."""
    if DIRECT_FLOPS in node.meta:
        return int(node.meta[DIRECT_FLOPS])
    if node.target in (aten.convolution.default, aten.convolution_backward.default, packed_convolution):
        return convolution_flops(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    packet = node.target.overloadpacket
    formula: Callable[..., Any] | None = flop_registry.get(_SAME_FORMULA.get(packet, packet))
    if formula is None:
        return 0
    args, kwargs = tree_map(_value, (node.args, node.kwargs))
    return int(formula(*args, **kwargs, out_val=tree_map(_shape, node.meta["val"])))


def convolution_flops(node: fx.Node) -> int:
    """FLOPs of a convolution, which are also those of its input gradient and those of its weight gradient."""
    if node.target in (aten.convolution.default, packed_convolution):  # whose first arguments are the same
        narrow, weight, transposed = node.args[0] if node.args[6] else node, node.args[1], node.args[6]
        batch = node.args[0]
    else:
        transposed = node.args[7]
        narrow, weight, batch = node.args[1] if transposed else node.args[0], node.args[2], node.args[1]
    values = [tensor_of(n) for n in (narrow, weight, batch)]  # type: ignore[arg-type]
    if any(value is None for value in values):
        return 0
    narrow_shape, weight_shape, batch_shape = (_shape(value) for value in values)
    # Every weight is used once at each position of the smaller of the two maps.
    return int(2 * batch_shape[0] * math.prod(narrow_shape[2:]) * math.prod(weight_shape))


def _value(argument: Any) -> Any:
    return tree_map(_shape, argument.meta.get("val")) if isinstance(argument, fx.Node) else argument


def _shape(value: Any) -> Any:
    """Shape of a tensor, anything else as it is.

    A symbolic size counts as what it is in the example at hand. ``int(size)`` would say so too, and would have the
    graph recompiled for every other size.
    """
    if not isinstance(value, torch.Tensor):
        return value
    return torch.Size([size_hint(size) for size in value.shape])
