"""The backward pass of max pooling from the offsets that its forward pass keeps, without atomic additions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from gradprune.torch_compat.lowering import (
    FloorDiv,
    ModularIndexing,
    V,
    expand,
    fallback_handler,
    full,
    ir,
    ops,
    register_lowering,
)

from .library import LIBRARY

LIBRARY.define(
    "max_pool_backward(Tensor grad, Tensor offsets, int[] kernel_size, int[] stride, int[] padding, SymInt height, "
    "SymInt width) -> Tensor"
)

max_pool_backward = torch.ops.gradprune.max_pool_backward.default
"""``max_pool_backward(grad, offsets, ...)``: gradient of what two-dimensional max pooling was applied to.

``offsets`` are the places of the maxima within their windows, row by row, as
``prims._low_memory_max_pool_with_offsets`` returns them; a place in the padding receives nothing. ``height`` and
``width`` are those of the result. The dilation is one.
"""


@torch.library.impl(LIBRARY, "max_pool_backward", "CompositeExplicitAutograd")
def _max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    height: int,
    width: int,
) -> Tensor:
    reach = [(n - 1) * s + 1 for n, s in zip(grad.shape[-2:], stride, strict=True)]
    padded = [
        max(size + p, r + k - 1) for size, p, r, k in zip((height, width), padding, reach, kernel_size, strict=True)
    ]
    result = grad.new_zeros([*grad.shape[:-2], *padded])
    for i, j in itertools.product(*map(range, kernel_size)):
        chosen = torch.where(offsets == i * kernel_size[1] + j, grad, 0)
        result[..., i : i + reach[0] : stride[0], j : j + reach[1] : stride[1]] += chosen
    inside = result[..., padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inside.clone(memory_format=_memory_format(offsets))


@torch.library.register_fake("gradprune::max_pool_backward", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    height: int,
    width: int,
) -> Tensor:
    size = [*grad.shape[:-2], height, width]
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=_memory_format(offsets))


def _memory_format(like: Tensor) -> torch.memory_format:
    return torch._prims_common.suggest_memory_format(like) if like.dim() == 4 else torch.contiguous_format


# --- Lowering ---------------------------------------------------------------------------------------------------------
#
# Note [Max pooling on a CPU]: where channels are innermost, a whole vector of channels lies in the same windows, and an
# element can gather what each of the windows that cover it sends there: loads and comparisons are vectorised, nothing
# is written twice. Elsewhere neighbours lie in different windows, and ATen's scatter is fastest, once the indices that
# it needs are computed in a way that vectorises. Converting to channels-last and back is slower. Milliseconds on one
# thread, AVX-512, torch 2.13, for 8x64x56x56 and windows of 3 by 3 with stride 2, then 128x64x24x24, 2 by 2, stride 2:
#
#     channels-last    Inductor's scatter  2.6, 13.0    its gather 20.5, 16.5    gathered here 0.63, 0.98
#     contiguous       Inductor's scatter  1.1,  3.0    its gather 16.6, 20.1    scattered by ATen 1.05, 3.5
#                      with atomic additions, for several threads, 2.2, 7.6      gathered after conversion 1.6, 5.6


@register_lowering(max_pool_backward, type_promotion_kind=None)
def _lower_max_pool_backward(
    grad: Any,
    offsets: Any,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    height: Any,
    width: Any,
) -> Any:
    size = [sympy.sympify(height), sympy.sympify(width)]
    ceil_mode = _ceil_mode(grad.get_size()[-2:], kernel_size, stride, padding, size)
    if any([_is_channels_last(grad), _is_channels_last(offsets)]) or ceil_mode is None:
        return _gather(grad, offsets, kernel_size, stride, padding, size)
    return _scatter(grad, offsets, kernel_size, stride, padding, size, ceil_mode)


def _ceil_mode(
    pooled: Sequence[Any], kernel_size: list[int], stride: list[int], padding: list[int], size: list[Any]
) -> bool | None:
    """Whether the pooling rounded its result's size up, ``None`` if symbolic sizes leave that open."""
    for n, m, k, s, p in zip(size, pooled, kernel_size, stride, padding, strict=True):
        if not V.graph.sizevars.statically_known_equals(FloorDiv(n + 2 * p - k + s, s), m):
            return True if n.is_number and m.is_number else None
    return False


def _gather(
    grad: Any, offsets: Any, kernel_size: list[int], stride: list[int], padding: list[int], size: list[Any]
) -> Any:
    """Lower to a loop over the result's elements, which adds up what the windows send there."""
    grad, offsets = (ir.ExternKernel.require_channels_last(value) for value in (grad, offsets))
    load_grad, load_offset = grad.make_loader(), offsets.make_loader()
    dtype = grad.get_dtype()
    *batch, pooled_height, pooled_width = grad.get_size()
    pooled = (pooled_height, pooled_width)

    def from_window(index: Sequence[Any], back: tuple[int, ...]) -> Any:
        """What an element gets from the window ``back`` places before the last one that begins at it or before."""
        *prefix, h, w = index
        window: list[Any] = []
        within: list[Any] = []
        conditions: list[Any] = []
        for d, position in enumerate((h, w)):
            k, s, p, b = kernel_size[d], stride[d], padding[d], back[d]
            window.append(FloorDiv(position + p, s) - b)
            within.append(ModularIndexing(position + p, 1, s) + b * s)
            if (b + 1) * s > k:  # some elements lie behind the window's end
                conditions.append(ops.lt(_int32(within[d]), _int32(k)))
            if b * s > p:  # some have no such window before them
                conditions.append(ops.ge(_int32(window[d]), _int32(0)))
            if not V.graph.sizevars.statically_known_lt(FloorDiv(size[d] - 1 + p, s) - b, pooled[d]):
                conditions.append(ops.lt(_int32(window[d]), _int32(pooled[d])))

        def chosen() -> Any:
            # int32 because comparisons of bytes are not vectorised
            offset = ops.to_dtype(load_offset([*prefix, *window]), torch.int32)
            is_here = ops.eq(offset, _int32(within[0] * kernel_size[1] + within[1]))
            return ops.where(is_here, load_grad([*prefix, *window]), ops.constant(0.0, dtype))

        return ops.masked(functools.reduce(ops.and_, conditions), chosen, 0.0) if conditions else chosen()

    backs = list(itertools.product(*(range(-(-k // s)) for k, s in zip(kernel_size, stride, strict=True))))

    def element(index: Sequence[Any]) -> Any:
        return functools.reduce(ops.add, [from_window(index, back) for back in backs])

    result = ir.Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=element, ranges=[*batch, *size])
    return ir.ExternKernel.require_channels_last(result)


def _scatter(
    grad: Any,
    offsets: Any,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    size: list[Any],
    ceil_mode: bool,
) -> Any:
    """Lower to ATen's operator."""
    load_offset = offsets.make_loader()

    def flat_index(index: Sequence[Any]) -> Any:
        column = ops.to_dtype(load_offset(index), torch.int32)
        row = _int32(0)
        for i in range(1, kernel_size[0]):  # a division would not be vectorised
            is_further = ops.ge(column, _int32(kernel_size[1]))
            row = ops.where(is_further, _int32(i), row)
            column = ops.where(is_further, ops.sub(column, _int32(kernel_size[1])), column)
        y, x = (
            # A window of nothing but minus infinity has its maximum in the padding.
            ops.maximum(ops.add(_int32(position * s - p), within), _int32(0))
            if p
            else ops.add(_int32(position * s), within)
            for position, s, p, within in zip(index[-2:], stride, padding, (row, column), strict=True)
        )
        return ops.to_dtype(ops.add(ops.mul(y, _int32(size[1])), x), torch.int64)

    *batch, _, _ = pooled_size = grad.get_size()
    indices = ir.Pointwise.create(
        device=offsets.get_device(), dtype=torch.int64, inner_fn=flat_index, ranges=pooled_size
    )
    # ATen reads the shape of what was pooled, not its elements.
    zero = full([1] * len(pooled_size), 0, dtype=grad.get_dtype(), device=grad.get_device())
    like = expand(zero, [*batch, *size])
    return _aten_backward(grad, like, kernel_size, stride, padding, [1, 1], ceil_mode, indices)


_aten_backward = fallback_handler(torch.ops.aten.max_pool2d_with_indices_backward.default, add_to_fallback_set=False)


def _int32(value: Any) -> Any:
    return ops.index_expr(sympy.sympify(value), torch.int32)


def _is_channels_last(value: Any) -> bool:
    """Whether a value will be stored with its channels innermost."""
    value.realize()
    _settle(value.get_name())
    strides = value.maybe_get_stride()
    return strides is not None and len(strides) == 4 and V.graph.sizevars.statically_known_equals(strides[1], 1)


def _settle(name: str) -> None:
    """Decide the memory layout of a buffer now, as Inductor would after lowering the whole graph."""
    buffer = V.graph.try_get_buffer(name)
    if isinstance(buffer, ir.ComputedBuffer) and isinstance(buffer.layout, ir.FlexibleLayout):
        for read in buffer.get_read_names():
            _settle(read)
        buffer.decide_layout()
