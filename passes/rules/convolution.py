"""Convolution: outputs are the gradients of input, weight and bias, and each has its own kernel."""

from __future__ import annotations

from .masked import narrow_mask
from .registry import register, register_whole

register(
    "aten._slow_conv2d_backward.output_mask",
    "aten.convolution_backward.default",
    "aten.convolution_backward_overrideable.default",
    "aten.mps_convolution_backward.default",
    "aten.mps_convolution_transpose_backward.default",  # no bias gradient, and a mask of two
)(narrow_mask("output_mask"))

# It has an output mask, but the mask only says which gradients to return as zeros where they would be undefined.
# Tracing takes this operator apart, so that dead-code elimination does what the mask does not.
register_whole(
    "the operator's mask does not keep it from computing a gradient",
    "aten._convolution_double_backward.default",
)
