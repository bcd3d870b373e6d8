"""Recurrent networks.

The cuDNN and MIOpen kernels go through the sequence once for the gradients of input and states, and a second time for
those of the weights. The first sweep fills the buffer that the second reads, so it always runs; what a mask can save
is the second sweep, that is the last of the four outputs (a list).

A fused cell makes the gradients of its gates and states in one kernel. Summing those of the gates over the batch, which
gives the ones of the biases, is a kernel of its own that a flag turns off.
"""

from __future__ import annotations

from .masked import narrow_flags, narrow_mask
from .registry import register, register_whole

register(
    "aten._cudnn_rnn_backward.default",
    "aten.miopen_rnn_backward.default",
)(narrow_mask("output_mask"))

# Outputs: gates, previous cell state, bias.
register("aten._thnn_fused_lstm_cell_backward_impl.default")(narrow_flags({"has_bias": {2}}))
# Outputs: input gates, hidden gates, previous state, input bias, hidden bias. One flag for both biases.
register(
    "aten._thnn_fused_gru_cell_backward.default",
    "aten._thnn_fused_lstm_cell_backward.default",
)(narrow_flags({"has_bias": {3, 4}}))

register_whole(
    "the operator computes the gradients of input, weights and states together",
    "aten.lstm_mps_backward.default",
    "aten.mkldnn_rnn_layer_backward.default",
)
