"""Compute the gradient of an image for blocks of pixels at once, where that is faster on a GPU.

    %gx = convolution(%gy, %w, ..., transposed)     %b = subpixel_weight(%w, ...)         in the prologue
                                                    %c = convolution(%gy, %b, ...)
                                                    %gx = pixels of %c in their places

cuDNN computes the input gradient of a network's first convolution, of three channels or one, without tensor cores, and
takes longer for it than for any other: a sixth of a step of ResNet-18. A plain convolution with an output channel for
each place in a block of pixels has what a tensor core needs, see ``gradprune/ops/subpixel.py``. Which of the two is
faster depends on the GPU, the type and the sizes, and is measured. Legal for two spatial dimensions and known sizes, if
the weight depends on weights alone. Reorders float.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gradprune.graph.build import Builder
from gradprune.graph.step_graph import tensor_of
from gradprune.ops import subpixel_weight
from gradprune.ops.kernel_choice import is_faster

from .base import Tier
from .prepack_convolutions import Convolution, blocks_of, by_blocks, is_image_gradient
from .rewrite import rewrite

aten = torch.ops.aten

DEVICES = ("cuda",)
"""Where it applies. On a CPU the convolution for blocks has a packed weight."""


@rewrite(
    aten.convolution.default,
    name="blocked-image-gradients",
    tier=Tier.REORDERS_FLOAT,
    reason="computed for blocks of pixels",
    needs=["hoist-invariants"],
)
def blocked_image_gradients(node: fx.Node, build: Builder) -> fx.Node | None:
    """Have an image gradient computed by a plain convolution."""
    weight = tensor_of(node.args[1])  # type: ignore[arg-type]
    if weight is None or weight.device.type not in DEVICES or not build.is_invariant(node.args[1]):
        return None
    c = Convolution.on_any_device(node)
    if c is None or not is_image_gradient(c) or not isinstance(c.size[0], int) or not _is_faster(c, weight):
        return None
    return by_blocks(c, _side(c), build, _convolve(c))


def _side(c: Convolution) -> int:
    """Pixels of a block: for 48 output channels or 64, which tensor cores compute side by side."""
    return 8 if c.out_size[1] == 1 else 4


def _convolve(c: Convolution) -> Callable[[Builder, fx.Node, int, int], fx.Node]:
    def convolve(build: Builder, weight: fx.Node, step: int, padding: int) -> fx.Node:
        last = build.call(aten.clone.default, weight, memory_format=torch.channels_last)
        geometry = ([step, step], [padding, padding], [1, 1], False, [0, 0], 1)
        return build.call(aten.convolution.default, c.input, last, None, *geometry)

    return convolve


def _is_faster(c: Convolution, weight: Tensor) -> bool:
    stride, padding, (blocks, _) = c.stride[0], c.padding[0], blocks_of(c, _side(c))

    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        kind = {"dtype": weight.dtype, "device": weight.device}
        gradient = torch.randn(c.size, **kind).contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
        own = torch.randn(weight.shape, **kind)  # type: ignore[call-overload]
        blocked = subpixel_weight(own, stride, padding, blocks.block, blocks.lowest, blocks.reach)
        blocked, own = (one.contiguous(memory_format=torch.channels_last) for one in (blocked, own))
        pair, ones = [stride, stride], [1, 1]
        return (
            # With another kernel to put pixels in their places, which need not be one of its own in a step.
            lambda: F.conv2d(gradient, blocked, None, blocks.step, -blocks.lowest).clone(),
            lambda: aten.convolution(gradient, own, None, pair, c.padding, ones, True, c.output_padding, 1),
        )

    shapes = f"{c.size} by {list(weight.shape)} to {c.out_size}"
    return is_faster(f"image gradient {shapes}, stride {stride}, padding {padding} {weight.dtype}", make, weight.device)
