"""Normalisation: outputs are the gradients of input, weight and bias (input and weight for RMS norm)."""

from __future__ import annotations

from .masked import narrow_flags, narrow_mask
from .registry import register, register_whole

register(
    "aten._batch_norm_impl_index_backward.default",
    "aten._fused_rms_norm_backward.default",
    "aten.batch_norm_backward.default",
    "aten.native_batch_norm_backward.default",
    "aten.native_layer_norm_backward.default",
)(narrow_mask("output_mask"))

# torch's CPU kernel for channels-last tensors writes the gradient of the input without asking whether there is one: a
# call that leaves it out ends the process. The gradients of weight and bias can be left out.
register("aten.native_group_norm_backward.default")(narrow_mask("output_mask", keep={0}))

# Synchronised batch norm. One flag stands for both reductions that the gradient of the input is made from.
register("aten.batch_norm_backward_reduce.default")(
    narrow_flags({"input_g": {0, 1}, "weight_g": {2}, "bias_g": {3}}),
)

register_whole(
    "the kernel computes the gradients of input, weight and bias together",
    "aten.cudnn_batch_norm_backward.default",
    "aten.miopen_batch_norm_backward.default",
)
register_whole(
    "the kernel computes the gradients of direction and magnitude together",
    "aten._weight_norm_interface_backward.default",
)
register_whole(
    "the kernel computes the gradients of input and slope together",
    "aten._prelu_kernel_backward.default",
)
