from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, interpreted, relative_error, step_by_autograd_grad, step_by_backward
from pass_testing import Builder, apply, aten, captured, copied, evaluate, find, random_arguments, step_of
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import gradprune
from gradprune.graph.cost import count_flops
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph
from gradprune.ops import pack_convolution, packed_convolution, subpixel_weight
from gradprune.ops.subpixel import subpixel
from gradprune.passes import prepack_convolutions as module
from gradprune.passes.base import PassResult, Tier
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.pipeline import run_passes, select_passes
from gradprune.passes.prepack_convolutions import PrepackConvolutions, is_computed_by_onednn
from gradprune.passes.verify import Verifier

TOLERANCE = 1e-5
"""Relative error in float32, of the result in float64."""

PACKED = "weight packed once per attack"
FLIPPED = "plain convolution with the flipped weight, packed once per attack"
BLOCKS = "computed for blocks of pixels, weight packed once per attack"

needs_onednn = pytest.mark.skipif(not is_computed_by_onednn(torch.float32), reason="torch was built without oneDNN")
pytestmark = needs_onednn

HALF_TYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not is_computed_by_onednn(dtype), reason="no kernels on this processor")
    )
    for dtype in (torch.bfloat16, torch.float16)
]


# --- Graphs of one convolution ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution; shapes of the input and of one output channel's kernel."""

    size: tuple[int, ...]
    channels: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    batch: int = 2

    @staticmethod
    def square(
        size: tuple[int, ...],
        channels: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> Geometry:
        rank = len(size)
        same = ((number,) * rank for number in (kernel, stride, padding, dilation))
        return Geometry(size, channels, outputs, *same, groups)

    @property
    def out_size(self) -> tuple[int, ...]:
        sizes = zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What follows the tensors in a call of ``aten.convolution``."""
        rank = len(self.size)
        return (list(self.stride), list(self.padding), list(self.dilation), False, [0] * rank, self.groups)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.groups, *self.kernel)


def forward(g: Geometry, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> StepGraph:
    """A step that is one convolution."""
    b = Builder()
    x = b.input("x", g.batch, g.channels, *g.size, dtype=dtype)
    w = b.input("w", *g.weight_shape, role=InputRole.WEIGHT, dtype=dtype)
    shift = b.input("b", g.outputs, role=InputRole.WEIGHT, dtype=dtype) if bias else None
    return b.build(b.call(aten.convolution.default, x, w, shift, *g.arguments))


def input_gradient(g: Geometry, *, dtype: torch.dtype = torch.float32) -> StepGraph:
    """A step that is the input gradient of one convolution, computed by a convolution."""
    b = Builder()
    gy = b.input("gy", g.batch, g.outputs, *g.out_size, dtype=dtype)
    x = b.input("x", g.batch, g.channels, *g.size, dtype=dtype)
    w = b.input("w", *g.weight_shape, role=InputRole.WEIGHT, dtype=dtype)
    mask = [True, False, False]
    backward = b.call(aten.convolution_backward.default, gy, x, w, None, *g.arguments, mask, backward=True)
    step_graph = b.build((b.item(backward, 0), OutputRole.INPUT_GRAD))
    dgrad_as_convolution.run(step_graph)
    assert find(step_graph, aten.convolution.default)
    return step_graph


def transposed(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], *, bias: bool = False, relu: bool = False, **options: Any
) -> StepGraph:
    """A step that is one transposed convolution, as in a decoder."""
    rank = len(shape) - 2
    groups = options.get("groups", 1)
    b = Builder()
    x, w = b.input("x", *shape), b.weight("w", *weight_shape)
    shift = b.weight("b", weight_shape[1] * groups) if bias else None
    stride, padding, dilation, output_padding = (
        [number] * rank if isinstance(number := options.get(name, default), int) else list(number)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    )
    y = b.call(aten.convolution.default, x, w, shift, stride, padding, dilation, True, output_padding, groups)
    return b.build(b.call(aten.relu.default, y) if relu else y)


def prepack(step_graph: StepGraph, tolerance: float = TOLERANCE) -> PassResult:
    """Run the pass; the graph stays valid and computes what it computed in float64."""
    verifier, original = Verifier(step_graph), copied(step_graph)
    arguments = random_arguments(step_graph)
    result = PrepackConvolutions().run(step_graph)
    verifier.check(step_graph, after=PrepackConvolutions.name)
    (actual,) = evaluate(step_graph, arguments)
    (expected,) = evaluate(original, [argument.double() for argument in arguments])
    (value,) = original.output_values()
    assert actual.dtype == value.meta["val"].dtype
    assert relative_error(actual, expected) < tolerance
    return result


def how(result: PassResult) -> str:
    """How the only convolution is computed."""
    change, *others = result.narrowed
    assert change.operator == "aten.convolution"
    for other in others:
        assert (other.operator, other.reason) == ("aten.relu", "applied by the convolution")
    return change.reason


def check_packed(step_graph: StepGraph) -> fx.Node:
    """The only convolution takes a weight that was packed, of nothing but a weight."""
    assert not find(step_graph, aten.convolution.default)
    (node,) = find(step_graph, packed_convolution)
    (pack,) = find(step_graph, pack_convolution)
    assert node.args[1] is pack
    assert pack.args[1:7] == node.args[3:9]
    assert pack.args[7] == list(node.args[0].meta["val"].shape)
    return node


# --- Every geometry ---------------------------------------------------------------------------------------------------

GROUPS: dict[str, tuple[int, int, int]] = {
    # channels, outputs, groups
    "dense": (6, 8, 1),
    "groups": (6, 8, 2),
    "depthwise": (6, 6, 6),
    "depthwise multiplied": (6, 12, 6),
}


def geometries(rank: int, grouping: str) -> Iterator[Geometry]:
    channels, outputs, groups = GROUPS[grouping]
    size, kernels, strides = ((12, 9), (1, 2, 3, 5, 7), (1, 2, 3)) if rank == 2 else ((5, 6, 4), (1, 2, 3), (1, 2))
    for kernel, stride, dilation in itertools.product(kernels, strides, (1, 2)):
        for padding in {0, 1, kernel // 2, dilation * (kernel - 1) // 2}:
            g = Geometry.square(size, channels, outputs, kernel, stride, padding, dilation, groups)
            if min(g.out_size) > 0 and (kernel > 1 or dilation == 1):
                yield g


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("rank", [2, 3])
def test_forward(rank: int, grouping: str):
    for number, g in enumerate(geometries(rank, grouping)):
        step_graph = forward(g, bias=number % 2 == 0)
        assert how(prepack(step_graph)) == PACKED, g
        node = check_packed(step_graph)
        assert list(node.args[3:]) == [*g.arguments, "none"]


@pytest.mark.parametrize("grouping", GROUPS)
@pytest.mark.parametrize("rank", [2, 3])
def test_input_gradient(rank: int, grouping: str):
    """At stride 1 it is a plain convolution, whose padding is what the kernel reaches beyond that of the forward's."""
    for g in geometries(rank, grouping):
        step_graph = input_gradient(g)
        kernel, stride, padding, dilation = g.kernel[0], g.stride[0], g.padding[0], g.dilation[0]
        flipped = stride == 1 and padding <= dilation * (kernel - 1) and grouping in ("dense", "depthwise")
        assert how(prepack(step_graph)) == (FLIPPED if flipped else PACKED), g
        node = check_packed(step_graph)
        assert node.args[6] is not flipped
        assert node.args[4] == [dilation * (kernel - 1) - padding if flipped else padding] * rank


RECTANGULAR = {
    "kernel": Geometry((9, 8), 6, 8, (3, 2), (1, 1), (1, 0), (1, 1)),
    "kernel of one dimension": Geometry((9, 8), 6, 8, (1, 7), (1, 1), (0, 3), (1, 1)),
    "stride": Geometry((9, 8), 6, 8, (3, 3), (2, 1), (1, 1), (1, 1)),
    "stride of images": Geometry((9, 8), 3, 8, (3, 3), (2, 1), (1, 1), (1, 1)),
    "padding": Geometry((9, 8), 6, 8, (3, 3), (1, 1), (0, 2), (1, 1)),
    "padding of images": Geometry((9, 8), 3, 8, (3, 3), (1, 1), (0, 1), (1, 1)),
    "dilation": Geometry((9, 8), 6, 8, (3, 3), (1, 1), (2, 1), (2, 1)),
    "groups": Geometry((9, 8), 6, 4, (3, 2), (2, 1), (1, 0), (1, 2), 2),
    "volume": Geometry((5, 6, 4), 6, 8, (3, 1, 2), (1, 2, 1), (1, 0, 0), (1, 1, 2)),
    "one image": Geometry((9, 8), 6, 8, (3, 3), (1, 1), (1, 1), (1, 1), batch=1),
    "one pixel": Geometry((1, 1), 6, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("case", RECTANGULAR)
def test_dimensions_may_differ(case: str):
    for step_graph in (forward(RECTANGULAR[case], bias=True), input_gradient(RECTANGULAR[case])):
        assert how(prepack(step_graph)) in (PACKED, FLIPPED)
        check_packed(step_graph)


def test_small_convolution_stays(monkeypatch: pytest.MonkeyPatch):
    flops = count_flops(forward(SMALL))["forward"]
    monkeypatch.setattr(module, "WORTH_FLOPS", flops + 1)
    assert not apply(PrepackConvolutions(), forward(SMALL)).result.changed
    monkeypatch.setattr(module, "WORTH_FLOPS", flops)
    assert apply(PrepackConvolutions(), forward(SMALL)).result.changed


@pytest.mark.parametrize("padding", [[1], [1, 1]])
def test_one_number_may_stand_for_all_dimensions(padding: list[int]):
    b = Builder()
    x, w = b.input("x", 2, 6, 8, 7), b.weight("w", 8, 6, 3, 3)
    step_graph = b.build(b.call(aten.convolution.default, x, w, None, [2], padding, [1], False, [0], 1))
    prepack(step_graph)
    assert list(check_packed(step_graph).args[3:6]) == [[2, 2], [1, 1], [1, 1]]


TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    # shapes of input and weight, options, and how it is computed
    "stride 1": ((2, 6, 4, 5), (6, 8, 3, 3), {}, FLIPPED),
    "stride 1, padding": ((2, 6, 4, 5), (6, 8, 3, 3), {"padding": 1}, FLIPPED),
    "stride 1, dilation": ((2, 6, 4, 5), (6, 8, 3, 2), {"dilation": (2, 1), "padding": (3, 0)}, FLIPPED),
    "padding beyond the kernel": ((2, 6, 8, 9), (6, 8, 2, 2), {"padding": 2}, PACKED),
    "stride": ((2, 6, 4, 5), (6, 8, 3, 3), {"stride": 2, "padding": 1}, PACKED),
    "output padding": ((2, 6, 4, 5), (6, 8, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}, PACKED),
    "output padding of one dimension": (
        (2, 6, 4, 5),
        (6, 8, 3, 3),
        {"stride": (3, 2), "output_padding": (2, 0)},
        PACKED,
    ),
    "stride and dilation": ((2, 6, 4, 5), (6, 8, 3, 3), {"stride": 2, "dilation": 2, "output_padding": 1}, PACKED),
    "groups": ((2, 6, 4, 5), (6, 4, 3, 3), {"groups": 2, "stride": 2, "output_padding": 1}, PACKED),
    "groups at stride 1": ((2, 6, 4, 5), (6, 4, 3, 3), {"groups": 2}, PACKED),
    "depthwise": ((2, 6, 4, 5), (6, 1, 3, 3), {"groups": 6, "stride": 2}, PACKED),
    "depthwise at stride 1": ((2, 6, 4, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}, FLIPPED),
    "volume": ((2, 4, 3, 4, 3), (4, 6, 3, 2, 2), {"stride": 2, "output_padding": 1}, PACKED),
    "volume at stride 1": ((2, 4, 3, 4, 3), (4, 6, 3, 2, 2), {"padding": (1, 0, 0)}, FLIPPED),
    "image": ((2, 6, 4, 5), (6, 3, 4, 4), {"stride": 2, "padding": 1}, BLOCKS),
    "image, output padding": ((2, 6, 4, 5), (6, 3, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}, BLOCKS),
}


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolution_of_a_decoder(case: str, bias: bool, relu: bool):
    shape, weight_shape, options, expected = TRANSPOSED[case]
    step_graph = transposed(shape, weight_shape, bias=bias, relu=relu, **options)
    result = prepack(step_graph)
    if expected == BLOCKS and bias:
        expected = FLIPPED if options["stride"] == 1 else PACKED
    assert how(result) == expected
    node = check_packed(step_graph)
    assert node.args[-1] == ("relu" if relu and expected != BLOCKS else "none")


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision(stride: int, channels: int, dtype: torch.dtype):
    """Sums are kept in float32; the result is rounded once."""
    g = Geometry.square((9, 8), channels, 8, 3, stride, 1)
    tolerance = 2 * torch.finfo(dtype).eps
    assert how(prepack(forward(g, bias=True, dtype=dtype), tolerance)) == PACKED
    reason = how(prepack(input_gradient(g, dtype=dtype), tolerance))
    assert reason == (BLOCKS if channels == 3 else FLIPPED if stride == 1 else PACKED)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_operand_may_have_any_strides(memory_format: torch.memory_format):
    b = Builder()
    x, w = b.input("x", 2, 9, 8, 6), b.weight("w", 3, 3, 8, 6)
    turned = b.call(aten.permute.default, x, [0, 3, 1, 2])
    weight = b.call(aten.clone.default, b.call(aten.permute.default, w, [2, 3, 0, 1]), memory_format=memory_format)
    g = Geometry.square((9, 8), 6, 8, 3, padding=1)
    prepack(b.build(b.call(aten.convolution.default, turned, weight, None, *g.arguments)))


# --- Blocks of pixels -------------------------------------------------------------------------------------------------


def by_blocks(gy: Tensor, weight: Tensor, stride: int, padding: int, size: tuple[int, int], side: int) -> Tensor:
    """The input gradient as ``gradprune/ops/subpixel.py`` defines it: a convolution, and pixels put in their places."""
    channels, kernel = weight.shape[1:3]
    rows, columns = (subpixel(kernel, stride, padding, n, out, side) for n, out in zip(size, gy.shape[2:], strict=True))
    block, step = rows.block, rows.step
    assert (columns.block, columns.step) == (block, step)
    assert block == step * stride
    for geometry, n, out in zip((rows, columns), size, gy.shape[2:], strict=True):
        assert geometry.lowest <= 0
        assert geometry.blocks == -(-n // block)
        # The convolution, which pads by as much on both sides, has a result for every block.
        assert (out - 2 * geometry.lowest - geometry.reach) // step + 1 >= geometry.blocks
    lowest = min(rows.lowest, columns.lowest)
    reach = max(rows.lowest + rows.reach, columns.lowest + columns.reach) - lowest
    kernels = subpixel_weight(weight, stride, padding, block, lowest, reach)
    assert kernels.shape == (block * block * channels, weight.shape[0], reach, reach)
    value = F.conv2d(gy, kernels, stride=step, padding=-lowest)[:, :, : rows.blocks, : columns.blocks]
    value = value.reshape(-1, block, block, channels, rows.blocks, columns.blocks).permute(0, 3, 4, 1, 5, 2)
    value = value.reshape(-1, channels, rows.blocks * block, columns.blocks * block)
    return value[:, :, : size[0], : size[1]]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_blocks_of_pixels_are_the_input_gradient(stride: int, side: int, channels: int):
    sizes = [(7, 8), (9, 7), (10, 13)]  # no stride divides all of them
    for kernel, padding, size in itertools.product(range(1, 8), range(4), sizes):
        weight = torch.randn(2, channels, kernel, kernel, dtype=torch.float64)
        out = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        gy = torch.randn(1, 2, *out, dtype=torch.float64)
        shape = (1, channels, *size)
        expected = torch.nn.grad.conv2d_input(shape, weight, gy, stride, padding)
        error = (by_blocks(gy, weight, stride, padding, size, side) - expected).abs().max() / expected.abs().max()
        assert error < 1e-13, (kernel, padding, size)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_blocks_have_enough_output_channels_for_a_vector_register(stride: int):
    for channels, kernel, padding in itertools.product((1, 2, 3, 4), range(2, 8), range(4)):
        geometry = subpixel(kernel, stride, padding, 32, 16, 4 if channels == 1 else 2)
        assert geometry.block % stride == 0
        assert geometry.block**2 * channels >= 8
        assert geometry.block <= max(4, stride)


@pytest.mark.parametrize("size", [(12, 9), (8, 8)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_gradient_is_computed_by_blocks(channels: int, size: tuple[int, int]):
    for kernel, stride, padding in itertools.product((2, 3, 5, 7), (1, 2, 3, 4), (0, 1, 3)):
        if kernel < stride:
            continue
        g = Geometry.square(size, channels, 8, kernel, stride, padding)
        step_graph = input_gradient(g)
        assert how(prepack(step_graph)) == BLOCKS, g
        node = check_packed(step_graph)
        assert node.args[6] is False
        assert node.args[1].args[0].target is subpixel_weight


NOT_BY_BLOCKS = {
    "many channels": Geometry.square((9, 8), 5, 8, 3, 2, 1),
    "one by one": Geometry.square((9, 8), 3, 8, 1, 1),
    "one by one, stride": Geometry.square((9, 8), 3, 8, 1, 2),
    "stride beyond the kernel": Geometry.square((9, 8), 3, 8, 2, 3),
    "dilation": Geometry.square((9, 8), 3, 8, 3, 2, 1, dilation=2),
    "groups": Geometry.square((9, 8), 3, 6, 3, 2, 1, groups=3),
    "kernel": Geometry((9, 8), 3, 8, (3, 2), (1, 1), (1, 1), (1, 1)),
    "stride": Geometry((9, 8), 3, 8, (3, 3), (1, 2), (1, 1), (1, 1)),
    "padding": Geometry((9, 8), 3, 8, (3, 3), (2, 2), (1, 0), (1, 1)),
    "volume": Geometry.square((5, 6, 4), 3, 8, 3, 2, 1),
}


@pytest.mark.parametrize("case", NOT_BY_BLOCKS)
def test_image_gradient_that_is_not_computed_by_blocks(case: str):
    assert how(prepack(input_gradient(NOT_BY_BLOCKS[case]))) in (PACKED, FLIPPED)


# --- ReLU -------------------------------------------------------------------------------------------------------------

SMALL = Geometry.square((6, 5), 6, 8, 3, padding=1)


def relu_graph(read: Callable[[Builder, fx.Node], list[fx.Node]], g: Geometry = SMALL) -> StepGraph:
    """A convolution and what reads it."""
    b = Builder()
    x, w, shift = b.input("x", 2, g.channels, *g.size), b.weight("w", *g.weight_shape), b.weight("b", g.outputs)
    return b.build(*read(b, b.call(aten.convolution.default, x, w, shift, *g.arguments)))


@pytest.mark.parametrize("g", [SMALL, Geometry.square((4, 5, 3), 4, 6, 3)], ids=["2d", "3d"])
def test_relu_is_fused(g: Geometry):
    def read(b: Builder, value: fx.Node) -> list[fx.Node]:
        return [b.call(aten.sin.default, b.call(aten.relu.default, value))]

    step_graph = relu_graph(read, g)
    prepack(step_graph)
    assert not find(step_graph, aten.relu.default)
    assert check_packed(step_graph).args[-1] == "relu"


def test_relu_that_the_backward_pass_reads_is_fused():
    """Its mask is computed from the ReLU."""

    def read(b: Builder, value: fx.Node) -> list[fx.Node]:
        relu = b.call(aten.relu.default, value)
        return [b.call(aten.mul.Tensor, relu, b.call(aten.gt.Scalar, relu, 0))]

    step_graph = relu_graph(read)
    prepack(step_graph)
    assert check_packed(step_graph).args[-1] == "relu"


NOT_FUSED: dict[str, Callable[[Builder, fx.Node], list[fx.Node]]] = {
    "another reader": lambda b, value: [b.call(aten.add.Tensor, b.call(aten.relu.default, value), value)],
    "a reader before it": lambda b, value: [b.call(aten.sin.default, value), b.call(aten.relu.default, value)],
    "returned": lambda b, value: [b.call(aten.relu.default, value), value],
    "returned alone": lambda b, value: [value],
    "two of them": lambda b, value: [b.call(aten.relu.default, value), b.call(aten.relu.default, value)],
    "a view between": lambda b, value: [b.call(aten.relu.default, b.call(aten.permute.default, value, [0, 2, 3, 1]))],
    "clamp": lambda b, value: [b.call(aten.clamp_min.default, value, 0.1)],
    "leaky": lambda b, value: [b.call(aten.leaky_relu.default, value, 0.1)],
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_fused(case: str):
    step_graph = relu_graph(NOT_FUSED[case])
    before = [node.target for node in step_graph.calls()][1:]
    applied = apply(PrepackConvolutions(), step_graph)
    assert check_packed(step_graph).args[-1] == "none"
    assert [node.target for node in step_graph.calls()][2:] == before
    assert how(applied.result) == PACKED


def test_relu_of_another_operator_is_none_of_the_pass_s_business():
    b = Builder()
    x = b.input("x", 2, 3)
    assert not apply(PrepackConvolutions(), b.build(b.call(aten.relu.default, x))).changed


def test_relu_behind_a_convolution_that_was_packed_before():
    """Packed by another pass; whatever a pass changes, it says so."""

    def read(b: Builder, value: fx.Node) -> list[fx.Node]:
        return [b.call(aten.sin.default, b.call(aten.relu.default, value))]

    step_graph = relu_graph(read)
    (relu,) = find(step_graph, aten.relu.default)
    with step_graph.graph.inserting_before(relu):
        copy = step_graph.graph.node_copy(relu)
    relu.replace_input_with(relu.args[0], copy)
    prepack(step_graph)  # packs the convolution and fuses the first of the two
    applied = apply(PrepackConvolutions(), step_graph)
    assert not find(step_graph, aten.relu.default)
    (change,) = applied.result.narrowed
    assert (change.operator, change.reason) == ("aten.relu", "applied by the convolution")


# --- What is left alone -----------------------------------------------------------------------------------------------


def test_text_before_and_after():
    applied = apply(PrepackConvolutions(), forward(SMALL, bias=True))
    FileCheck().check("aten.convolution.default](args = (%x, %w, %b, [1, 1], [1, 1],").run(applied.before)
    after = FileCheck().check(
        "gradprune.pack_convolution.default](args = (%w, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,"
    )
    after.check_same("[2, 6, 6, 5])")
    after.check("gradprune.packed_convolution.default](args = (%x, %pack_convolution_default, %b, [1, 1], [1, 1],")
    after.check_same("none").check("return (packed_convolution_default,)").run(applied.after)
    assert how(applied.result) == PACKED


def test_text_of_an_input_gradient():
    applied = apply(PrepackConvolutions(), input_gradient(SMALL))
    after = (
        FileCheck()
        .check("flip.default](args = (%w, [2, 3])")
        .check("permute.default](args = (%flip_default, [1, 0, 2, 3])")
    )
    after.check("pack_convolution.default](args = (%permute_default, [1, 1], [1, 1], [1, 1], False,")
    after.check("packed_convolution.default](args = (%gy, %pack_convolution_default, None,").run(applied.after)


def test_backward_marks_and_source_are_kept():
    g = Geometry.square((9, 8), 3, 8, 3, 2, 1)
    step_graph = input_gradient(g)
    (node,) = find(step_graph, aten.convolution.default)
    node.meta["stack_trace"] = '  File "attack.py", line 7, in step'
    result = PrepackConvolutions().run(step_graph)
    assert result.narrowed[0].source == "attack.py:7"
    for node in step_graph.calls():
        assert node.meta.get("gradprune_backward"), node
        assert "attack.py" in node.meta["stack_trace"], node


def test_model_form():
    applied = apply(PrepackConvolutions(), dataclasses.replace(forward(SMALL), form="model"))
    assert applied.changed
    assert applied.result == apply(PrepackConvolutions(), forward(SMALL)).result


@pytest.mark.parametrize("direction", [forward, input_gradient])
def test_float64_is_left_alone(direction: Callable[..., StepGraph]):
    assert not apply(PrepackConvolutions(), direction(SMALL, dtype=torch.float64)).changed


@pytest.mark.parametrize("direction", [forward, input_gradient])
def test_one_dimension_is_left_alone(direction: Callable[..., StepGraph]):
    g = Geometry.square((9,), 6, 8, 3, 2, 1)
    assert not apply(PrepackConvolutions(), direction(g)).changed


@pytest.mark.parametrize(
    "options", [{"dilation": 2, "output_padding": 1}, {"dilation": (1, 3), "output_padding": (0, 2)}]
)
def test_output_padding_that_is_not_below_the_stride_is_left_alone(options: dict[str, Any]):
    """torch wants it below the stride or the dilation; oneDNN cannot do the latter."""
    step_graph = transposed((2, 6, 4, 5), (6, 8, 3, 3), **options)
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_weight_that_is_no_weight_is_left_alone():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.input("w", 8, 6, 3, 3)
    step_graph = b.build(b.call(aten.convolution.default, x, w, None, *SMALL.arguments))
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_weight_that_depends_on_the_input_is_left_alone():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    scaled = b.call(aten.mul.Tensor, w, b.call(aten.mean.default, x))
    step_graph = b.build(b.call(aten.convolution.default, x, scaled, None, *SMALL.arguments))
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_weight_that_the_step_writes_is_left_alone():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    y = b.call(aten.convolution.default, x, w, None, *SMALL.arguments)
    b.call(aten.copy_.default, w, b.call(aten.neg.default, w))
    step_graph = b.build(y)
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_random_weight_is_left_alone():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    noisy = b.call(aten.mul.Tensor, w, b.call(aten.rand_like.default, w))
    step_graph = b.build(b.call(aten.convolution.default, x, noisy, None, *SMALL.arguments))
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_weight_computed_from_weights_is_packed():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    step_graph = b.build(b.call(aten.convolution.default, x, b.call(aten.tanh.default, w), None, *SMALL.arguments))
    assert how(prepack(step_graph)) == PACKED


def test_bias_may_depend_on_anything():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    shift = b.call(aten.sum.dim_IntList, b.input("z", 3, 8), [0])
    step_graph = b.build(b.call(aten.convolution.default, x, w, shift, *SMALL.arguments))
    assert how(prepack(step_graph)) == PACKED


def test_convolution_of_weights_alone_is_left_alone():
    """All of it is hoisted."""
    b = Builder()
    v, w = b.weight("v", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    y = b.call(aten.convolution.default, v, w, None, *SMALL.arguments)
    step_graph = b.build(b.call(aten.mul.Tensor, y, b.input("x", 1)))
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_weight_of_another_type_is_left_alone():
    step_graph = forward(SMALL)
    (node,) = (node for node in step_graph.inputs if node.name == "w")
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    assert not PrepackConvolutions().run(step_graph).changed


def test_other_devices_are_left_alone():
    b = Builder(device="meta")
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    step_graph = b.build(b.call(aten.convolution.default, x, w, None, *SMALL.arguments))
    assert not PrepackConvolutions().run(step_graph).changed


def test_torch_without_onednn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not apply(PrepackConvolutions(), forward(SMALL)).changed
    assert not is_computed_by_onednn(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_types_that_onednn_does_not_compute_in(dtype: torch.dtype):
    assert not is_computed_by_onednn(dtype)


def test_weight_gradient_is_left_alone():
    b = Builder()
    gy, x, w = b.input("gy", 2, 8, 6, 5), b.input("x", 2, 6, 6, 5), b.weight("w", 8, 6, 3, 3)
    mask = [False, True, False]
    backward = b.call(aten.convolution_backward.default, gy, x, w, None, *SMALL.arguments, mask, backward=True)
    step_graph = b.build((b.item(backward, 1), OutputRole.KEPT_WEIGHT_GRAD))
    assert not apply(PrepackConvolutions(), step_graph).changed


def test_convolutions_with_one_weight_share_the_packed_weight():
    b = Builder()
    x, w = b.input("x", 2, 6, 6, 5), b.weight("w", 6, 6, 3, 3)
    y = b.call(aten.tanh.default, b.call(aten.convolution.default, x, w, None, *SMALL.arguments))
    step_graph = b.build(b.call(aten.convolution.default, y, w, None, *SMALL.arguments))
    assert len(prepack(step_graph).narrowed) == 2
    assert len(find(step_graph, pack_convolution)) == 2
    apply(HoistInvariants(), step_graph)
    (pack,) = find(step_graph, pack_convolution)
    assert len(pack.users) == 2


FLOPS: dict[str, tuple[Callable[..., StepGraph], Geometry]] = {
    "forward": (forward, Geometry.square((9, 8), 6, 8, 3, 2, 1)),
    "forward, groups": (forward, Geometry.square((9, 8), 6, 8, 3, groups=2)),
    "transposed": (input_gradient, Geometry.square((9, 8), 6, 8, 3, 2, 1)),
    "transposed, groups": (input_gradient, Geometry.square((9, 8), 6, 8, 3, 2, groups=2)),
    "flipped, as large": (input_gradient, Geometry.square((9, 8), 6, 8, 3, padding=1)),
    "flipped": (input_gradient, Geometry.square((9, 8), 6, 8, 3)),
    "blocks": (input_gradient, Geometry.square((9, 8), 3, 8, 3)),
    "blocks, stride": (input_gradient, Geometry.square((9, 8), 3, 8, 7, 2, 3)),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops_are_those_of_the_convolution(case: str):
    """What a user is told a step costs is no matter of how it is computed."""
    make, g = FLOPS[case]
    step_graph = make(g)
    before = count_flops(step_graph)
    prepack(step_graph)
    assert count_flops(step_graph) == before
    positions = math.prod(g.out_size)
    assert sum(before.values()) == 2 * g.batch * positions * math.prod(g.weight_shape)


def test_it_may_round_differently():
    assert PrepackConvolutions().tier is Tier.REORDERS_FLOAT


def test_it_needs_hoisting():
    """A packed weight would have to be packed at every call."""
    names = [step.name for step in select_passes(["hoist-invariants"])]
    assert PrepackConvolutions.name not in names
    assert PrepackConvolutions.name in [step.name for step in select_passes(["prepack-linears"])]
    step_graph = captured(step_of(nn.Conv2d(6, 8, 3)), torch.rand(2, 6, 6, 5))
    run_passes(step_graph, select_passes(["hoist-invariants"]), verify=True)
    assert not find(step_graph, packed_convolution)


# --- Captured steps ---------------------------------------------------------------------------------------------------


def test_symbolic_batch_is_packed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
    x = torch.rand(4, 3, 8, 7)
    torch._dynamo.mark_dynamic(x, 0)
    step_graph = captured(step_of(model), x)
    run_passes(step_graph, select_passes(["winograd-convolutions"]), verify=True)
    assert not find(step_graph, aten.convolution.default)
    assert len(find(step_graph, packed_convolution)) == 4
    packs = find(step_graph, pack_convolution)
    assert {node.args[7][0] for node in packs} == {4}
    exact = step_of(model.double())
    for batch in (4, 2, 7):  # packed for a batch of 4, right for all
        x = torch.rand(batch, 3, 8, 7)
        expected = exact(x.double())
        model.float()
        with interpreted():
            actual = gradprune.compile(step_of(model), strict=True, verify=True, dynamic=True)(x)
        model.double()
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.inductor
@pytest.mark.parametrize("forward_only", [True, False])
def test_one_channel_and_a_symbolic_batch(forward_only: bool):
    model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 81, 5)).eval()
    step = torch.no_grad()(lambda x: model(x)) if forward_only else step_of(model)
    compiled = gradprune.compile(step, forward_only=forward_only, strict=True, check="never")
    for batch in (4, 7):
        x = torch.rand(batch, 1, 20, 20)
        torch._dynamo.mark_dynamic(x, 0)
        assert relative_error(compiled(x), step(x)) < TOLERANCE


def test_symbolic_image_size_is_left_alone():
    x = torch.rand(2, 6, 9, 8)
    torch._dynamo.mark_dynamic(x, 2)
    step_graph = captured(step_of(nn.Conv2d(6, 8, 3)), x)
    before = str(step_graph.graph)
    assert not PrepackConvolutions().run(step_graph).changed
    assert str(step_graph.graph) == before


# --- Through Inductor -------------------------------------------------------------------------------------------------


class Norm(nn.BatchNorm2d):
    """Statistics of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        nn.init.normal_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2)


def classifier() -> nn.Module:
    """An image gradient, a folded norm, a depthwise, a grouped and a dense convolution, fused ReLUs."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), Norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)),
    )


def autoencoder() -> nn.Module:
    """Transposed convolutions in the forward pass, plain ones in their gradients."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, padding=1), nn.Tanh()),
        *(nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3 * 16 * 14, 5)),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv3d(6, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # network, shape of its input and how many convolutions a step has
    "classifier": (classifier, (2, 3, 17, 14), 10),
    "autoencoder": (autoencoder, (2, 3, 17, 14), 6),
    "volumes": (volumes, (2, 3, 6, 7, 5), 4),
}

OPTIONS: dict[str, Any] = {"strict": True, "verify": True, "disable": ["winograd-convolutions", "prepack-linears"]}


def problem(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A network in evaluation mode, the same in float64, images and labels."""
    make, shape, _ = NETWORKS[name]
    model = make().eval()
    return model, copy.deepcopy(model).double(), torch.rand(shape), torch.tensor([1, 3])


@pytest.mark.inductor
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_of_the_compiled_step(name: str):
    """Of the first iterates of an attack, which starts somewhere around the clean image."""
    model, exact, x, y = problem(name)
    step = gradprune.compile(step_by_backward(model, F.cross_entropy), **OPTIONS)
    reference = step_by_autograd_grad(exact, F.cross_entropy)
    x_adv = x + EPS * torch.rand_like(x)
    returned = []
    for _ in range(3):
        x_next, gradient = step(x_adv, x, y)
        assert relative_error(gradient, reference(x_adv.double(), x.double(), y)[1]) < TOLERANCE
        returned.append((gradient, gradient.clone()))
        x_adv = x_next
    for gradient, value in returned:  # no call writes to what an earlier one returned
        assert torch.equal(gradient, value)
    report = gradprune.reports(step)[-1]
    packed = [change for change in report.hoisted if change.operator == "gradprune.pack_convolution"]
    assert len(packed) == NETWORKS[name][2]


@pytest.mark.inductor
def test_first_call_with_the_clean_image_as_iterate():
    """One tensor passed as two arguments, with the next call continuing the attack."""
    model, exact, x, y = problem("volumes")
    step = gradprune.compile(step_by_backward(model, F.cross_entropy), **OPTIONS)
    reference = step_by_autograd_grad(exact, F.cross_entropy)
    x_adv = x
    for _ in range(2):
        x_next, gradient = step(x_adv, x, y)
        assert relative_error(gradient, reference(x_adv.double(), x.double(), y)[1]) < TOLERANCE
        x_adv = x_next
    _, gradient = step(x, x, y)
    assert relative_error(gradient, reference(x.double(), x.double(), y)[1]) < TOLERANCE
