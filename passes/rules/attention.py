"""Fused attention: outputs are the gradients of query, key, value and, for some kernels, of the attention bias.

Each kernel makes the first three in a single sweep over the attention matrix, so at best the gradient of the bias is
saved. Where there is a mask the flags of query, key and value are cleared too. They are free to clear, and spare the
memory-efficient kernel a copy per gradient when it has to split a batch of more than 65535.
"""

from __future__ import annotations

from .masked import narrow_flags, narrow_mask
from .registry import register, register_whole

register(
    "aten._scaled_dot_product_efficient_attention_backward.default",
    "aten._scaled_dot_product_fused_attention_overrideable_backward.default",
)(narrow_mask("grad_input_mask"))
register("aten._efficient_attention_backward.default")(narrow_flags({"bias_requires_grad": {3}}))

register_whole(
    "the kernel computes the gradients of query, key and value together",
    "aten._cudnn_attention_backward.default",
    "aten._flash_attention_backward.default",
    "aten._scaled_dot_product_cudnn_attention_backward.default",
    "aten._scaled_dot_product_flash_attention_backward.default",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    "flex_attention_backward",
)
