"""The input gradient of a strided convolution with few input channels as a convolution with many output channels.

The pixels of the input gradient are grouped into blocks of ``block`` x ``block``. Pixels in the same place of their
blocks are computed by the same formula from the neighbourhood of the block in the output gradient, so that one plain
convolution computes all blocks, with one output channel for each place in a block and each channel; what remains is to
put the pixels in their places. With three input channels a transposed convolution leaves most of a vector register
empty; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .library import LIBRARY


@dataclass(frozen=True)
class Subpixel:
    """Geometry of one spatial dimension; pixel ``block * a + r`` reads output positions ``step * a + lowest`` and on.

    Attributes:
        block: Pixels of a block.
        step: Stride of the convolution.
        lowest: First position read by the block at 0, never positive; the convolution pads by ``-lowest``.
        reach: Positions read, the size of the convolution's kernel.
        blocks: Blocks that cover the input.
    """

    block: int
    step: int
    lowest: int
    reach: int
    blocks: int


def subpixel(kernel: int, stride: int, padding: int, size: int, out_size: int, side: int) -> Subpixel:
    """Geometry for a convolution that maps ``size`` pixels to ``out_size`` positions.

    Args:
        kernel: Of the convolution, as ``stride`` and ``padding``.
        stride: See ``kernel``.
        padding: See ``kernel``.
        size: Pixels of the convolution's input.
        out_size: Positions of its output.
        side: Pixels of a block, which is as large as a multiple of the stride up to it, or the stride.
    """
    block = stride * max(1, side // stride)
    step = block // stride
    # Pixel y reads position o with kernel tap y + padding - stride * o, if that lies in [0, kernel).
    lowest = min(0, *(-((kernel - 1 - padding - place) // stride) for place in range(block)))
    highest = max((place + padding) // stride for place in range(block))
    blocks = -(-size // block)
    while (out_size - 2 * lowest - (highest - lowest + 1)) // step + 1 < blocks:
        lowest -= 1  # pads by more, on both sides, until the last block has all it reads
    return Subpixel(block, step, lowest, highest - lowest + 1, blocks)


LIBRARY.define("subpixel_weight(Tensor weight, int stride, int padding, int block, int lowest, int reach) -> Tensor")

subpixel_weight = torch.ops.gradprune.subpixel_weight.default
"""``subpixel_weight(weight, ...)``: from ``(O, I, K, K)`` to ``(block * block * I, O, reach, reach)``."""


@torch.library.impl(LIBRARY, "subpixel_weight", "CompositeExplicitAutograd")
def _subpixel_weight(weight: Tensor, stride: int, padding: int, block: int, lowest: int, reach: int) -> Tensor:
    kernel = weight.shape[2]
    places, positions = (torch.arange(length, device=weight.device) for length in (block, reach))
    taps = places[:, None] + padding - stride * (lowest + positions)
    taps = taps.where((taps >= 0) & (taps < kernel), kernel)  # behind the weight there are zeros
    padded = F.pad(weight.transpose(0, 1), (0, 1, 0, 1))
    of_blocks = padded[:, :, taps[:, None, :, None], taps[:, None, :]]
    return of_blocks.permute(2, 3, 0, 1, 4, 5).flatten(0, 2)


@torch.library.register_fake("gradprune::subpixel_weight", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _fake_subpixel_weight(weight: Tensor, stride: int, padding: int, block: int, lowest: int, reach: int) -> Tensor:
    outputs, inputs = weight.shape[:2]
    return weight.new_empty(block * block * inputs, outputs, reach, reach)
