"""Matrix products.

The dense ``linear`` is traced as ``mm`` and ``addmm``, whose gradients are operators of their own. The ones below serve
nested, sparse, oneDNN and MPS tensors.
"""

from __future__ import annotations

from .masked import narrow_flags, narrow_mask
from .registry import register

register(
    "aten._sparse_mm_reduce_impl_backward.default",
    "aten.linear_backward.default",
    "aten.mkldnn_linear_backward.default",
)(narrow_mask("output_mask"))
register("aten.matmul_backward.default")(narrow_mask("mask"))
register("aten.mkldnn_linear_backward_weights.default")(narrow_flags({"bias_defined": {1}}))
