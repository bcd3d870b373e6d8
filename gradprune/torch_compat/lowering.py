"""What operators need of Inductor to be lowered: its intermediate representation, and the table of lowerings."""

from __future__ import annotations

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
    "lowerings",
    "mkldnn_ir",
    "ops",
    "register_lowering",
    "to_dtype",
]
