"""Have oneDNN pack weights once per attack, and choose the kernel for each convolution, on a CPU.

    %y = convolution(%x, %w, %b, ...)        %p = pack_convolution(%w, ...)            in the prologue
                                             %y = packed_convolution(%x, %p, %b, ...)

Left to itself, torch reorders a weight into the kernel's layout at every call, and runs input gradients as transposed
convolutions, for which oneDNN has fewer fast kernels. As weights stay the same from step to step, the pass packs
the weight of every convolution and replaces

- a transposed convolution of stride 1 by a plain one with the flipped weight,
- the input gradient with respect to an image, of few channels, by a convolution over blocks of pixels, see
  ``gradprune/ops/subpixel.py``,
- a convolution whose windows neither overlap nor leave gaps (patch embedding) by a matrix product,
- a convolution followed by nothing but a ReLU by one operator.

Convolutions of less than ``WORTH_FLOPS`` stay: of so few operations, most of a call's time is oneDNN's own overhead,
and torch's other kernels have less. Legal for two and three spatial dimensions and types that oneDNN computes in (not
float64), if the weight depends on weights alone. Needs ``hoist-invariants``: packed weights exist between prologue and
step only. Reorders float.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from gradprune.graph.build import Builder
from gradprune.graph.cost import DIRECT_FLOPS, convolution_flops
from gradprune.graph.invariance import invariant_nodes
from gradprune.graph.step_graph import StepGraph, tensor_of
from gradprune.ops import pack_convolution, packed_convolution, realize, subpixel_weight
from gradprune.ops.subpixel import Subpixel, subpixel
from gradprune.ops.winograd import winograd_convolution
from gradprune.torch_compat.aot import size_hint

from .base import Change, Pass, PassResult, Tier
from .dce import eliminate_dead_code

aten = torch.ops.aten

FEW_CHANNELS = 4
"""An image's channels: below it, a transposed convolution leaves most of a vector register empty."""

WORTH_FLOPS = 500_000
"""Floating-point operations from which on a packed convolution is faster. On one thread of a server, a call of oneDNN
takes 25 us or more; 3x3 convolutions of 0.3, 0.6 and 2.4 million operations took 15, 49 and 70 us without packing, and
28, 42 and 50 us with it."""


@dataclass(frozen=True)
class PrepackConvolutions(Pass):
    """Replace convolutions by ones with packed weights."""

    name = "prepack-convolutions"
    tier = Tier.REORDERS_FLOAT
    needs = frozenset({"hoist-invariants"})

    def run(self, step_graph: StepGraph) -> PassResult:
        """Pack every convolution that is large enough, then fuse ReLUs."""
        result = PassResult()
        invariant = invariant_nodes(step_graph)
        graph = step_graph.graph
        replaced: set[fx.Node] = set()
        for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
            convolution = Convolution.of(node)
            if convolution is None or convolution.weight not in invariant or node in invariant:
                continue
            if convolution_flops(node) < WORTH_FLOPS:
                continue
            found = _replace(convolution)
            if found is None:
                continue
            replacement, how = found
            if replacement.target is packed_convolution:
                replacement.meta[DIRECT_FLOPS] = convolution_flops(node)
            # Strides in the metadata stay those of the trace, for the views further on; Inductor knows better.
            kept = {key: replacement.meta[key] for key in (DIRECT_FLOPS,) if key in replacement.meta}
            replacement.meta = {**node.meta, **kept}
            node.replace_all_uses_with(replacement)
            replaced.add(replacement)
            result.narrowed.append(Change.at(node, how))
            graph.erase_node(node)
        result.narrowed += _fuse_relu(graph, replaced)
        if result.narrowed:
            result.removed += eliminate_dead_code(graph)
        return result


@dataclass(frozen=True)
class Convolution:
    """Arguments of an ``aten.convolution``, one value for each spatial dimension where torch allows fewer."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int
    kernel: list[int]
    size: list[Any]
    out_size: list[Any]

    @staticmethod
    def of(node: fx.Node) -> Convolution | None:
        """``None`` if oneDNN cannot compute it with a packed weight."""
        x = tensor_of(node.args[0])  # type: ignore[arg-type]
        if x is None or x.device.type != "cpu" or not is_computed_by_onednn(x.dtype):
            return None
        return Convolution.on_any_device(node)

    @staticmethod
    def on_any_device(node: fx.Node) -> Convolution | None:
        """``None`` if it is not one of two or three dimensions, whose sizes are known but for the batch."""
        x, weight, out = (tensor_of(n) for n in (node.args[0], node.args[1], node))  # type: ignore[arg-type]
        if x is None or weight is None or out is None or x.device != weight.device or x.dtype != weight.dtype:
            return None
        rank = weight.dim() - 2
        if rank not in (2, 3):
            return None
        if not all(isinstance(size, int) for size in (*weight.shape, *x.shape[1:], *out.shape[1:])):
            return None
        arguments: Any = node.args
        stride, padding, dilation, output_padding = (
            list(value) * rank if len(value) == 1 else list(value) for value in (*arguments[3:6], arguments[7])
        )
        if arguments[6] and any(extra >= step for extra, step in zip(output_padding, stride, strict=True)):
            return None
        return Convolution(
            node,
            arguments[0],
            arguments[1],
            arguments[2],
            stride,
            padding,
            dilation,
            arguments[6],
            output_padding,
            arguments[8],
            list(weight.shape[2:]),
            list(x.shape),
            list(out.shape),
        )


def is_computed_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a type on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def _replace(convolution: Convolution) -> tuple[fx.Node, str] | None:
    """The node that takes the place of a convolution, and how it computes it; ``None`` if it stays."""
    if convolution.transposed:
        if is_image_gradient(convolution):
            return _by_blocks(convolution), "computed for blocks of pixels, weight packed once per attack"
        if _has_plain_counterpart(convolution):
            return _flipped(convolution), "plain convolution with the flipped weight, packed once per attack"
        if not isinstance(convolution.size[0], int):
            return None  # Inductor's kernel for it would be compiled for this batch alone
    return _packed(convolution), "weight packed once per attack"


def _packed(c: Convolution) -> fx.Node:
    build = Builder(c.node)
    geometry = (c.stride, c.padding, c.dilation, c.transposed, c.output_padding, c.groups)
    weight = build.call(pack_convolution, c.weight, *geometry, [size_hint(size) for size in c.size])
    return build.call(packed_convolution, c.input, weight, c.bias, *geometry, "none")


# --- Transposed convolutions of stride 1 ------------------------------------------------------------------------------


def _has_plain_counterpart(c: Convolution) -> bool:
    padding = _flipped_padding(c)
    is_depthwise = tensor_of(c.weight).shape[:2] == (c.groups, 1)  # type: ignore[union-attr]
    return (
        set(c.stride) == {1} and set(c.output_padding) == {0} and min(padding) >= 0 and (c.groups == 1 or is_depthwise)
    )


def _flipped_padding(c: Convolution) -> list[int]:
    return [d * (k - 1) - p for d, k, p in zip(c.dilation, c.kernel, c.padding, strict=True)]


def _flipped(c: Convolution) -> fx.Node:
    build = Builder(c.node)
    rank = len(c.kernel)
    weight = c.weight
    if any(k > 1 for k in c.kernel):
        weight = build.call(aten.flip.default, weight, list(range(2, 2 + rank)))
    if c.groups == 1:  # a depthwise weight has one input channel either way
        weight = build.call(aten.permute.default, weight, [1, 0, *range(2, 2 + rank)])
    geometry = (c.stride, _flipped_padding(c), c.dilation, False, [0] * rank, c.groups)
    weight = build.call(pack_convolution, weight, *geometry, [size_hint(size) for size in c.size])
    return build.call(packed_convolution, c.input, weight, c.bias, *geometry, "none")


# --- Input gradients of images ----------------------------------------------------------------------------------------


def is_image_gradient(c: Convolution) -> bool:
    """Whether it is a transposed convolution to few channels that can be computed for blocks of pixels."""
    return (
        c.transposed
        and len(c.kernel) == 2
        and c.groups == 1
        and c.bias is None
        and c.out_size[1] <= FEW_CHANNELS
        and c.kernel[0] == c.kernel[1] > 1
        and c.stride[0] == c.stride[1]
        and c.padding[0] == c.padding[1]
        and c.dilation == [1, 1]
        and c.kernel[0] >= c.stride[0]
    )


def _by_blocks(c: Convolution) -> fx.Node:
    def convolve(build: Builder, weight: fx.Node, step: int, padding: int) -> fx.Node:
        geometry = ([step, step], [padding, padding], [1, 1], False, [0, 0], 1)
        packed = build.call(pack_convolution, weight, *geometry, [size_hint(size) for size in c.size])
        return build.call(packed_convolution, c.input, packed, None, *geometry, "none")

    # At least 12 output channels, most of a vector register.
    return by_blocks(c, 4 if c.out_size[1] == 1 else 2, Builder(c.node), convolve)


def by_blocks(
    c: Convolution, side: int, build: Builder, convolve: Callable[[Builder, fx.Node, int, int], fx.Node]
) -> fx.Node:
    """Compute an image gradient for blocks of pixels.

    Args:
        c: The transposed convolution.
        side: Pixels of a block, see ``subpixel``.
        build: Inserts what is called.
        convolve: Inserts a convolution of its input with a weight, by step and padding.
    """
    stride, padding, channels = c.stride[0], c.padding[0], c.out_size[1]
    rows, columns = blocks_of(c, side)
    block = rows.block
    weight = build.call(subpixel_weight, c.weight, stride, padding, block, rows.lowest, rows.reach)
    value = convolve(build, weight, rows.step, -rows.lowest)
    value.meta[DIRECT_FLOPS] = convolution_flops(c.node)
    value = build.call(aten.slice.Tensor, value, 2, 0, rows.blocks)
    value = build.call(aten.slice.Tensor, value, 3, 0, columns.blocks)
    value = build.call(aten.reshape.default, value, [-1, block, block, channels, rows.blocks, columns.blocks])
    value = build.call(aten.permute.default, value, [0, 3, 4, 1, 5, 2])
    value = build.call(aten.reshape.default, value, [-1, channels, rows.blocks * block, columns.blocks * block])
    value = build.call(aten.slice.Tensor, value, 2, 0, c.out_size[2])
    value = build.call(aten.slice.Tensor, value, 3, 0, c.out_size[3])
    # Stored, because Inductor cannot index through these views in turn, as the backward of an average pool would.
    return build.call(realize, build.call(aten.clone.default, value))


def blocks_of(c: Convolution, side: int) -> tuple[Subpixel, Subpixel]:
    """The geometry of both dimensions of an image gradient, which read the same positions relative to a block."""
    rows, columns = (
        subpixel(c.kernel[0], c.stride[0], c.padding[0], c.out_size[2 + k], c.size[2 + k], side) for k in range(2)
    )
    lowest = min(rows.lowest, columns.lowest)
    reach = max(rows.lowest + rows.reach, columns.lowest + columns.reach) - lowest
    return replace(rows, lowest=lowest, reach=reach), replace(columns, lowest=lowest, reach=reach)


# --- ReLU -------------------------------------------------------------------------------------------------------------


def _fuse_relu(graph: fx.Graph, replaced: set[fx.Node]) -> list[Change]:
    """Have packed convolutions apply a ReLU that is all that reads them; says so of those that are not ``replaced``."""
    fused = []
    for target in (packed_convolution, winograd_convolution):
        for node in graph.find_nodes(op="call_function", target=target):
            users = list(node.users)
            if len(users) == 1 and users[0].target is aten.relu.default:
                if node not in replaced:
                    fused.append(Change.at(users[0], "applied by the convolution"))
                node.args = (*node.args[:-1], "relu")
                users[0].replace_all_uses_with(node)
                graph.erase_node(users[0])
    return fused
