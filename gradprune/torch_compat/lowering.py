"""What operators need of Inductor to be lowered: its intermediate representation, and the table of lowerings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch._inductor import ir, mkldnn_ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import expand, fallback_handler, full, lowerings, register_lowering, to_dtype
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

__all__ = [
    "FloorDiv",
    "ModularIndexing",
    "TensorBox",
    "V",
    "expand",
    "fallback_handler",
    "full",
    "ir",
    "lowering_packed_weight",
    "lowering_reordered_weight",
    "lowerings",
    "mkldnn_ir",
    "ops",
    "register_lowering",
    "to_dtype",
]


@contextmanager
def lowering_packed_weight() -> Iterator[None]:
    """Within it, Inductor takes the weight of a convolution for one that oneDNN has packed.

    With a packed weight, every result has channels-last strides. With a symbolic size Inductor takes no weight for
    packed, and a result computed from one channel for contiguous, which it then reads in the wrong order.
    """
    names, name = vars(mkldnn_ir), "is_contiguous_storage_and_layout"
    before = names[name]
    names[name] = lambda x: False
    try:
        yield
    finally:
        names[name] = before


@contextmanager
def lowering_reordered_weight() -> Iterator[None]:
    """Within it, Inductor takes the weight of a transposed convolution for one that oneDNN has reordered.

    Up to torch 2.14 it does so always. Torch 2.15 asks the node it is lowering whether its weight is computed by the
    operator that reorders, and otherwise takes output channels for input channels.
    """
    graph = fx.Graph()
    reordered = graph.call_function(torch.ops.mkldnn._reorder_convolution_transpose_weight.default)
    before = V.graph.current_node
    V.graph.current_node = graph.call_function(
        torch.ops.mkldnn._convolution_transpose_pointwise.default, (None, reordered)
    )
    try:
        yield
    finally:
        V.graph.current_node = before
