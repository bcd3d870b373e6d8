"""Keep masks for the backward pass instead of the activations they are computed from.

    %r = relu(%c)                        %r = relu(%c)
    ...                                  %p = realize(convert(where(le(%r, 0), 1., 0.), uint8))
    %m = le(%r, 0)                       ...
    %g = where(%m, 0, %gy)               %g = where(unpack_mask(%p, %gy), 0, %gy)

A step graph is one graph, without a partitioner to decide what is kept from forward to backward: a comparison would be
fused into its user, and the activation in full precision would live until then. Computed and stored early, one byte per
element lives instead. In the model form torch's partitioner makes that choice; there the pass only changes how masks
are stored, and only on a CPU. Legal for pointwise operators with a boolean result whose operands the forward pass has
computed. Does nothing where the backward pass reads the activation anyway. Exact.

Note [Masks on a CPU]: Inductor's C++ code stores and loads booleans one by one even in vectorised loops: writing
a mask beside a ReLU takes 10 ms where the ReLU alone takes 0.3, reading it back 3.4 ms instead of 0.35 (0.8 M elements,
AVX-512, torch 2.13). Conversions between float and uint8 are vectorised: 0.48 and 0.45 ms. On a GPU booleans are fine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gradprune.graph.regions import BACKWARD, backward_nodes
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops import realize, unpack_mask

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten
convert_element_type = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class EarlyMasks(Pass):
    """Compute boolean masks in the forward pass and store them in a form that is cheap to write and to read."""

    name = "early-masks"
    tier = Tier.EXACT

    def run(self, step_graph: StepGraph) -> PassResult:
        """Move masks to the forward pass where that frees an activation, and store them."""
        result = PassResult()
        is_step = step_graph.form == "step"
        moved = _move_to_forward(step_graph) if is_step else set()
        backward = backward_nodes(step_graph)
        for node in list(step_graph.calls()):
            if node in backward or not _is_mask(node) or not _operands(node):
                continue
            readers = [user for user in node.users if user in backward]
            if not readers or (is_step and node not in moved):
                continue
            value = tensor_of(node)
            if value is not None and value.device.type == "cpu":
                _pack(node, readers, backward, store=is_step)
            elif is_step:
                _store(node, readers)
            else:
                continue
            result.narrowed.append(Change.at(node, "mask kept for the backward pass instead of the activation"))
        if moved or result.narrowed:
            result.removed += eliminate_dead_code(step_graph.graph)
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


def _operands(node: fx.Node) -> list[fx.Node]:
    """What a mask is computed from, other than inputs of the graph, which are alive anyway."""
    operands = {_without_aliases(operand) for operand in node.all_input_nodes}
    return [operand for operand in operands if operand.op == "call_function"]


def _without_aliases(node: fx.Node) -> fx.Node:
    while node.target is aten.alias.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _move_to_forward(step_graph: StepGraph) -> set[fx.Node]:
    """Move masks of the backward pass to where their operands are computed; returns the moved nodes."""
    backward = backward_nodes(step_graph)
    moved: set[fx.Node] = set()
    for node in list(step_graph.calls()):
        if node not in backward or not _is_mask(node):
            continue
        operands = _operands(node)
        if not operands or any(operand in backward or _is_read(operand, node, backward) for operand in operands):
            continue
        for alias in list(node.all_input_nodes):
            node.replace_input_with(alias, _without_aliases(alias))
        max(node.all_input_nodes).append(node)  # nodes compare by their place in the graph
        backward.discard(node)
        del node.meta[BACKWARD]
        moved.add(node)
    return moved


def _is_read(operand: fx.Node, mask: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether the backward pass reads ``operand`` for something else than masks, so that it stays alive anyway."""
    if _is_mask(operand):
        return False  # stored for its other readers, but not as the boolean that a mask of masks is computed from
    for user in operand.users:
        if user.target is aten.alias.default:
            if _is_read(user, mask, backward):
                return True
        elif user is not mask and user in backward and not _is_mask(user):
            return True
    return False


def _pack(mask: fx.Node, readers: list[fx.Node], backward: set[fx.Node], *, store: bool) -> None:
    """Have ``readers`` unpack a mask that is kept as uint8."""
    graph = mask.graph
    value = tensor_of(mask)
    assert value is not None
    with graph.inserting_after(mask):
        ones = graph.call_function(aten.full.default, ([], 1.0), _on(value, torch.float32))
    with graph.inserting_after(ones):
        zeros = graph.call_function(aten.full.default, ([], 0.0), _on(value, torch.float32))
    with graph.inserting_after(zeros):
        chosen = graph.call_function(aten.where.self, (mask, ones, zeros))
    with graph.inserting_after(chosen):
        packed = graph.call_function(convert_element_type, (chosen, torch.uint8))
    for constant in (ones, zeros):
        constant.meta = {**mask.meta, "val": value.new_empty([], dtype=torch.float32)}
    chosen.meta = {**mask.meta, "val": torch.empty_like(value, dtype=torch.float32)}
    packed.meta = {**mask.meta, "val": torch.empty_like(value, dtype=torch.uint8)}
    if store:
        _store(packed, [])
        packed = next(iter(packed.users))
    for reader in readers:
        gradient = next((n for n in reader.all_input_nodes if n in backward and tensor_of(n) is not None), None)
        if gradient is None:
            continue  # computed from masks alone: the reader is one more step before the gradient comes in
        with graph.inserting_before(reader):
            unpacked = graph.call_function(unpack_mask, (packed, gradient))
        unpacked.meta = {**reader.meta, "val": torch.empty_like(value)}
        reader.replace_input_with(mask, unpacked)


def _store(node: fx.Node, readers: list[fx.Node]) -> None:
    """Insert ``realize`` after a node and have ``readers`` read that."""
    with node.graph.inserting_after(node):
        stored = node.graph.call_function(realize, (node,))
    stored.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, stored)


def _on(value: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}
