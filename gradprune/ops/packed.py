"""Convolutions and linear layers whose weights oneDNN has packed beforehand, on a CPU.

Packing brings a weight into the blocked layout that a kernel wants for given sizes. torch packs constants only, when a
model is frozen; here the packed weight is an input of the step, computed by the prologue, so that weights may change. A
packed weight is an opaque tensor: it has a shape, but neither strides nor elements that other operators could read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gradprune.torch_compat.lowering import (
    TensorBox,
    lowering_packed_weight,
    lowering_reordered_weight,
    lowerings,
    mkldnn_ir,
    register_lowering,
)

from .library import LIBRARY

_mkldnn = torch.ops.mkldnn
_BACKENDS = "CompositeExplicitAutograd"


# --- Convolution ------------------------------------------------------------------------------------------------------

LIBRARY.define(
    "pack_convolution(Tensor weight, int[] stride, int[] padding, int[] dilation, bool transposed, "
    "int[] output_padding, int groups, int[] input_size) -> Tensor"
)
LIBRARY.define(
    "packed_convolution(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups, str activation) -> Tensor"
)

pack_convolution = torch.ops.gradprune.pack_convolution.default
"""``pack_convolution(weight, ..., input_size)``: weight of ``aten.convolution``, packed for inputs of that size.

Inputs of another size give the same result, but the kernel may have to reorder the weight at every call.
"""

packed_convolution = torch.ops.gradprune.packed_convolution.default
"""``aten.convolution`` with a packed weight, followed by ``activation``, which is ``"none"`` or ``"relu"``.

The result has channels-last strides.
"""


@torch.library.impl(LIBRARY, "pack_convolution", _BACKENDS)
def _pack_convolution(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    weight = weight.contiguous(memory_format=_channels_last(weight))
    if transposed:
        return _mkldnn._reorder_convolution_transpose_weight(  # type: ignore[no-any-return]
            weight, padding, output_padding, stride, dilation, groups, input_size
        )
    return _mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, input_size)  # type: ignore[no-any-return]


@torch.library.register_fake("gradprune::pack_convolution", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_pack_convolution(
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    if not transposed:
        return weight.new_empty(weight.shape)
    return weight.new_empty([groups * weight.shape[1], weight.shape[0] // groups, *weight.shape[2:]])


@torch.library.impl(LIBRARY, "packed_convolution", _BACKENDS)
def _packed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    input = input.contiguous(memory_format=_channels_last(input))
    if transposed:
        return _mkldnn._convolution_transpose_pointwise(  # type: ignore[no-any-return]
            input, weight, bias, padding, output_padding, stride, dilation, groups, activation, [], ""
        )
    return _mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
        input, weight, bias, padding, stride, dilation, groups, activation, [], ""
    )


@torch.library.register_fake("gradprune::packed_convolution", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_packed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    activation: str,
) -> Tensor:
    size = [input.shape[0], weight.shape[0]]
    for k, (length, kernel) in enumerate(zip(input.shape[2:], weight.shape[2:], strict=True)):
        reach = dilation[k] * (kernel - 1) + 1
        if transposed:
            size.append((length - 1) * stride[k] - 2 * padding[k] + reach + output_padding[k])
        else:
            size.append((length + 2 * padding[k] - reach) // stride[k] + 1)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_channels_last(input))


@register_lowering(packed_convolution, type_promotion_kind=None)
def _lower_packed_convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    activation: str,
) -> Any:
    after: tuple[Any, ...] = (activation, [], "")
    with lowering_packed_weight():
        if transposed:
            with lowering_reordered_weight():
                node = mkldnn_ir.ConvolutionTransposeUnary.create(
                    input, weight, bias, padding, output_padding, stride, dilation, groups, *after
                )
        else:
            node = mkldnn_ir.ConvolutionUnary.create(input, weight, bias, padding, stride, dilation, groups, *after)
    return TensorBox.create(node)


def _channels_last(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d


# --- Linear -----------------------------------------------------------------------------------------------------------

LIBRARY.define("pack_linear(Tensor weight, int rows) -> Tensor")
LIBRARY.define("packed_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")

pack_linear = torch.ops.gradprune.pack_linear.default
"""``pack_linear(weight, rows)``: weight ``(O, I)`` of a linear layer, packed for inputs ``(rows, I)``."""

packed_linear = torch.ops.gradprune.packed_linear.default
"""``packed_linear(input, weight, bias)``: ``input @ weight.T + bias`` for ``input`` of shape ``(N, I)``."""


@torch.library.impl(LIBRARY, "pack_linear", _BACKENDS)
def _pack_linear(weight: Tensor, rows: int) -> Tensor:
    return _mkldnn._reorder_linear_weight(weight.contiguous(), rows)  # type: ignore[no-any-return]


@torch.library.register_fake("gradprune::pack_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_pack_linear(weight: Tensor, rows: int) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.impl(LIBRARY, "packed_linear", _BACKENDS)
def _packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _mkldnn._linear_pointwise(input.contiguous(), weight, bias, "none", [], "")  # type: ignore[no-any-return]


@torch.library.register_fake("gradprune::packed_linear", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty([input.shape[0], weight.shape[0]])


@register_lowering(packed_linear, type_promotion_kind=None)
def _lower_packed_linear(input: Any, weight: Any, bias: Any) -> Any:
    # torch's own lowering of its linear operator insists on a weight that is a constant of the graph.
    return TensorBox.create(mkldnn_ir.LinearUnary.create(input, weight, bias, "none", [], ""))


@register_flop_formula(torch.ops.gradprune.packed_linear)
def _packed_linear_flops(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * input_shape[0] * weight_shape[0] * weight_shape[1])


# --- Matrix product ---------------------------------------------------------------------------------------------------

LIBRARY.define("mm(Tensor input, Tensor mat2) -> Tensor")
torch.library.impl(LIBRARY, "mm", _BACKENDS)(torch.mm)
torch.library.register_fake("gradprune::mm", torch.mm, lib=LIBRARY)

mm = torch.ops.gradprune.mm.default
"""``aten.mm`` by a name that Inductor does not know, and so does not merge with a sum that follows."""

register_lowering(mm, type_promotion_kind=None)(lowerings[torch.ops.aten.mm.default])


@register_flop_formula(torch.ops.gradprune.mm)
def _mm_flops(input_shape: Any, mat2_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * input_shape[0] * input_shape[1] * mat2_shape[1])
