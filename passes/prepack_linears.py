"""Have oneDNN pack the weights of linear layers once per attack, on a CPU where that is faster.

    %y = addmm(%b, %x, permute(%w))          %p = pack_linear(%w, rows)                in the prologue
    %g = mm(%gy, %w)                         %y = packed_linear(%x, %p, %b)

Whether it is faster depends on the BLAS that torch was built with and on the processor it finds: twice as fast where
MKL does not take its best path, no faster where it does. So both are timed for each shape when a step is compiled, and
the packed one has to win clearly. Legal in step graphs, for a weight that depends on weights alone and a type that
oneDNN computes in. Needs ``hoist-invariants``. Reorders float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.invariance import invariant_nodes
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops import pack_linear, packed_linear
from gradprune.ops.kernel_choice import is_faster
from gradprune.torch_compat.aot import size_hint

from .base import Change, PassResult, Tier
from .dce import eliminate_dead_code
from .prepack_convolutions import is_computed_by_onednn

aten = torch.ops.aten


@dataclass(frozen=True)
class PrepackLinears:
    """Replace matrix products with a weight by ones with a packed weight."""

    name = "prepack-linears"
    tier = Tier.REORDERS_FLOAT

    def run(self, step_graph: StepGraph) -> PassResult:
        """See ``Pass.run``."""
        result = PassResult()
        if step_graph.form != "step":
            return result
        invariant = invariant_nodes(step_graph)
        for node in list(step_graph.calls()):
            if node.target is aten.addmm.default and not node.kwargs:
                bias, rows, weight = node.args
            elif node.target is aten.mm.default:
                bias, (rows, weight) = None, node.args
            else:
                continue
            if weight not in invariant or rows in invariant:
                continue
            if not _is_packable(rows, weight, bias) or not is_packed_faster(*_sizes(rows, weight)):
                continue
            build = Builder(node)
            packed = build.call(pack_linear, build.call(aten.permute.default, weight, [1, 0]), _sizes(rows, weight)[0])
            product = build.call(packed_linear, rows, packed, bias)
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            result.narrowed.append(Change.at(node, "weight packed once per attack"))
            step_graph.graph.erase_node(node)
        if result.narrowed:
            result.removed += eliminate_dead_code(step_graph.graph)
        return result


def _is_packable(rows: object, weight: object, bias: object) -> bool:
    tensors = [tensor_of(operand) for operand in (rows, weight, bias) if isinstance(operand, fx.Node)]
    first = tensors[0]
    if first is None or not is_computed_by_onednn(first.dtype):
        return False
    same = all(t is not None and t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
    return same and (bias is None or tensors[-1].shape == tensors[1].shape[1:])  # type: ignore[union-attr]


def _sizes(rows: object, weight: object) -> tuple[int, int, int, torch.dtype]:
    x, w = tensor_of(rows), tensor_of(weight)  # type: ignore[arg-type]
    assert x is not None
    assert w is not None
    return size_hint(x.shape[0]), int(w.shape[0]), int(w.shape[1]), x.dtype


def is_packed_faster(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether ``(rows, inputs) @ (inputs, outputs)`` is clearly faster by oneDNN with a packed weight than by BLAS."""

    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        packed = pack_linear(weight, rows)
        return lambda: packed_linear(x, packed, None), lambda: torch.mm(x, weight.t())

    return is_faster(f"packed linear {rows} x {inputs} x {outputs} {dtype}", make)
