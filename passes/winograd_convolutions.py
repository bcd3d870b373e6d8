"""Compute convolutions of 3 by 3 and stride 1 by Winograd's algorithm, on a CPU where that is faster.

    %y = convolution(%x, %w, %b, ...)        %u = winograd_weight(%w)                  in the prologue
                                             %y = winograd_convolution(%x, %u, %b, ...)

Forward and, as a transposed convolution of stride 1, input gradient; see ``gradprune/ops/winograd.py``. Inference does
the same where weights are constants; here it is the hoisting that makes the weight's transform free. Legal for
float32, without groups or dilation, for a padding of at most 2 and multiples of 16 channels, if the weight
depends on weights alone. Both kernels are timed for each shape when a step is compiled. Needs ``hoist-invariants``.
Reorders float; the sums have fewer terms, and the result is no further from float64 than a direct convolution's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.cost import DIRECT_FLOPS, convolution_flops
from gradprune.graph.step_graph import tensor_of
from gradprune.ops import pack_convolution, packed_convolution, winograd
from gradprune.ops.kernel_choice import is_faster
from gradprune.torch_compat.aot import size_hint

from .base import Tier
from .prepack_convolutions import Convolution
from .rewrite import rewrite

aten = torch.ops.aten


@rewrite(
    aten.convolution.default,
    name="winograd-convolutions",
    tier=Tier.REORDERS_FLOAT,
    reason="16 multiplications instead of 36, weight transformed once",
    needs=["hoist-invariants"],
)
def winograd_convolutions(node: fx.Node, build: Builder) -> fx.Node | None:
    """Replace a convolution of 3 by 3 by one with a transformed weight."""
    c = Convolution.of(node)
    if c is None or not build.is_invariant(c.weight) or build.is_invariant(node):
        return None
    if not _is_legal(c) or not _is_worth_it(c):
        return None
    weight = build.call(winograd.winograd_weight, c.weight, c.transposed)
    replacement = build.call(winograd.winograd_convolution, c.input, weight, c.bias, _padding(c), "none")
    replacement.meta[DIRECT_FLOPS] = convolution_flops(node)
    return replacement


def _padding(c: Convolution) -> list[int]:
    """Padding of the plain convolution that computes the same."""
    return [2 - p for p in c.padding] if c.transposed else c.padding


def _is_legal(c: Convolution) -> bool:
    x, weight = tensor_of(c.input), tensor_of(c.weight)
    return (
        x is not None
        and weight is not None
        and x.dtype is torch.float32
        and c.kernel == [3, 3]
        and c.stride == [1, 1]
        and c.dilation == [1, 1]
        and c.groups == 1
        and c.output_padding == [0, 0]
        and all(0 <= p <= 2 for p in _padding(c))
        and min(c.out_size[2:]) > 0
        and all(channels % winograd.LANES == 0 for channels in weight.shape[:2])
        and winograd.is_available()
    )


def _is_worth_it(c: Convolution) -> bool:
    size, outputs, padding = [size_hint(n) for n in c.size], int(c.out_size[1]), _padding(c)

    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        x = torch.randn(size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, size[1], 3, 3)
        transformed = winograd.winograd_weight(weight, False)
        geometry = ([1, 1], padding, [1, 1], False, [0, 0], 1)
        packed = pack_convolution(weight, *geometry, size)
        return (
            lambda: winograd.winograd_convolution(x, transformed, None, padding, "none"),
            lambda: packed_convolution(x, packed, None, *geometry, "none"),
        )

    return is_faster(f"winograd {size} to {outputs}, padding {padding}", make)
