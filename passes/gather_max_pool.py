"""The backward pass of max pooling on a CPU: gathered from the windows, and masked before instead of after.

    %gx = max_pool2d_with_indices_backward(%gy, %r, ..., %indices)     %m = le(%maxima, 0)
    %m = le(%r, 0)                                                     %gm = where(%m, 0, %gy)
    %g = where(%m, 0, %gx)                                             %g = max_pool_backward(%gm, %offsets, ...)

Inductor scatters the gradient, one element at a time and with atomic additions, or it gathers by comparing indices of
eight bytes. The operator on the right reads the offsets within the windows, of one byte each, that the indices are
computed from; how is said in Note [Max pooling on a CPU] in ops/max_pool.py. Legal for windows without dilation that
are small enough to have offsets. Elsewhere than on a CPU Inductor's gather is fast, and stays. Reorders float: where
windows overlap, what an element gets from each adds up in another order.

A mask that compares the pooling's own input is the same on an element and on the maximum of every window that the
element wins, so that it may be applied to the gradient of the maxima, of which there are fewer, on every device. With
NaN too: a window that holds one has NaN for its maximum, and the element that wins it is NaN. Legal if the gradient is
masked by zero and has no other use. Exact by itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops import max_pool_backward

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class GatherMaxPool(Pass):
    """Rewrite ``max_pool2d_with_indices_backward`` and the mask of a ReLU that comes before the pooling."""

    name = "gather-max-pool"
    tier = Tier.REORDERS_FLOAT
    keeps = (aten.max_pool2d_with_indices_backward.default,)

    def run(self, step_graph: StepGraph) -> PassResult:
        """Mask before the pooling where that is the same, then gather."""
        result = PassResult()
        graph = step_graph.graph
        for node in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices_backward.default):
            masked = _mask_of_its_input(node)
            if masked is not None:
                result.narrowed.append(Change.at(masked, "masked by the maxima before the pooling's backward"))
                node = _mask_before(node, masked)
            value = tensor_of(node)
            if value is None or value.device.type != "cpu":
                continue
            arguments = _gather_arguments(node)
            if isinstance(arguments, str):
                result.skipped.append(Change.at(node, arguments))
                continue
            result.narrowed.append(Change.at(node, "computed from the offsets of the maxima in their windows"))
            with graph.inserting_before(node):
                gathered = graph.call_function(max_pool_backward, arguments)
            gathered.meta = dict(node.meta)
            node.replace_all_uses_with(gathered)
            graph.erase_node(node)
        if result.narrowed:
            result.removed += eliminate_dead_code(graph)
        return result


def _gather_arguments(node: fx.Node) -> tuple[Any, ...] | str:
    """Arguments of the operator that computes the same, or the reason why there is none."""
    grad, indices = node.args[0], node.args[7]
    assert isinstance(indices, fx.Node)
    if indices.target is not prims._low_memory_max_pool_offsets_to_indices.default:
        return "its indices are not computed from offsets within the windows"
    offsets, kernel_size, input_size, stride, padding, dilation = indices.args
    if any(d != 1 for d in dilation):  # type: ignore[union-attr]
        return "its windows are dilated"
    return (grad, offsets, kernel_size, stride, padding, *input_size)  # type: ignore[misc]


def _mask_of_its_input(node: fx.Node) -> fx.Node | None:
    """The ``where`` that masks a pooling's gradient by comparing its input, if the gradient has no other use."""
    masked = next(iter(node.users), None)
    if masked is None or len(node.users) > 1 or masked.target is not aten.where.self:
        return None
    mask, zero, _ = masked.args
    pool = _pool_of(node)
    assert isinstance(mask, fx.Node)
    assert isinstance(zero, fx.Node)
    if pool is None or _maxima(pool) is None or mask.target is not aten.le.Scalar or not _is_zero(zero):
        return None
    return masked if _without_aliases(mask.args[0]) is _without_aliases(pool.args[0]) else None


def _mask_before(node: fx.Node, masked: fx.Node) -> fx.Node:
    """Mask the gradient that enters a pooling's backward instead of what leaves it, and return the new backward."""
    graph = node.graph
    old_mask, zero, _ = masked.args
    gradient, *others = node.args
    pool = _pool_of(node)
    assert pool is not None
    maxima = _maxima(pool)
    assert maxima is not None
    assert isinstance(old_mask, fx.Node)
    assert isinstance(gradient, fx.Node)
    with graph.inserting_before(masked):
        mask = graph.call_function(aten.le.Scalar, (maxima, old_mask.args[1]))
        before = graph.call_function(aten.where.self, (mask, zero, gradient))
        after = graph.call_function(aten.max_pool2d_with_indices_backward.default, (before, *others))
    mask.meta = {**old_mask.meta, "val": torch.empty_like(maxima.meta["val"], dtype=torch.bool)}
    before.meta = {**masked.meta, "val": torch.empty_like(gradient.meta["val"])}
    after.meta = {**node.meta, "val": masked.meta["val"]}
    masked.replace_all_uses_with(after)
    graph.erase_node(masked)
    graph.erase_node(node)
    return after


def _pool_of(node: fx.Node) -> fx.Node | None:
    """The pooling whose indices its backward reads."""
    indices = node.args[7]
    assert isinstance(indices, fx.Node)
    if indices.target is prims._low_memory_max_pool_offsets_to_indices.default:
        (indices,) = indices.all_input_nodes[:1]
    if indices.target is not operator.getitem:
        return None
    (pool,) = indices.all_input_nodes
    return pool if pool.target in _POOLS else None


_POOLS = (prims._low_memory_max_pool_with_offsets.default, aten.max_pool2d_with_indices.default)


def _maxima(pool: fx.Node) -> fx.Node | None:
    """What a pooling computes, if anything reads it."""
    return next((user for user in pool.users if user.target is operator.getitem and user.args[1] == 0), None)


def _is_zero(node: fx.Node) -> bool:
    """Whether a node is the scalar zero."""
    if node.target is aten.full.default:
        return node.args == ([], 0)
    return node.target is aten.scalar_tensor.default and node.args == (0,)


def _without_aliases(node: Any) -> Any:
    while node.target is aten.alias.default:
        node = node.args[0]
    return node
