"""Have oneDNN pack the weights of linear layers once per attack, on a CPU where that is faster.

    %y = addmm(%b, %x, permute(%w))          %p = pack_linear(%w, rows)                in the prologue
    %g = mm(%gy, %w)                         %y = packed_linear(%x, %p, %b)

Whether it is faster depends on the BLAS that torch was built with and on the processor it finds: twice as fast where
MKL does not take its best path, no faster where it does. So both are timed for each shape when a step is compiled, and
the packed one has to win clearly. Legal for a weight that depends on weights alone and a type that
oneDNN computes in. Needs ``hoist-invariants``. Reorders float.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of
from gradprune.ops import pack_linear, packed_linear
from gradprune.ops.kernel_choice import is_faster
from gradprune.torch_compat.aot import size_hint

from .base import Tier
from .prepack_convolutions import is_computed_by_onednn
from .rewrite import rewrite

aten = torch.ops.aten


@rewrite(
    aten.addmm.default,
    aten.mm.default,
    name="prepack-linears",
    tier=Tier.REORDERS_FLOAT,
    reason="weight packed once per attack",
    needs=["hoist-invariants"],
)
def prepack_linears(node: fx.Node, build: Builder) -> fx.Node | None:
    """Replace a product with a weight by one with a packed weight."""
    if node.kwargs:
        return None
    rows, weight = node.args[-2:]
    bias = node.args[0] if node.target is aten.addmm.default else None
    if not build.is_invariant(weight) or build.is_invariant(rows):
        return None
    if not _is_packable(rows, weight, bias) or not is_packed_faster(*_sizes(rows, weight)):
        return None
    packed = build.call(pack_linear, build.call(aten.permute.default, weight, [1, 0]), _sizes(rows, weight)[0])
    return build.call(packed_linear, rows, packed, bias)


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
