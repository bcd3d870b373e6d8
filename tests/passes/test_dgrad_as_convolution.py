from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pass_testing import Applied, Builder, apply, aten, captured, find
from torch.testing import FileCheck

from gradprune.graph.step_graph import StepGraph
from gradprune.passes.base import Tier
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.select_outputs import SelectOutputs

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # shapes of input and weight, and the convolution's options
    "1d": ((2, 3, 9), (4, 3, 3), {}),
    "2d": ((2, 3, 7, 8), (4, 3, 3, 3), {"padding": 1}),
    "3d": ((2, 2, 5, 6, 5), (3, 2, 2, 3, 2), {"stride": 2}),
    "one by one": ((2, 3, 5, 5), (4, 3, 1, 1), {}),
    "stride": ((2, 3, 8, 9), (4, 3, 3, 3), {"stride": (2, 3), "padding": 1}),
    "stride of one by one": ((2, 3, 8, 8), (4, 3, 1, 1), {"stride": 2}),
    "dilation": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilation": 2, "padding": 2}),
    "stride and dilation": ((2, 3, 12, 12), (4, 3, 3, 3), {"stride": 2, "dilation": 3, "padding": 1}),
    "stride above the kernel": ((1, 2, 11, 11), (3, 2, 2, 2), {"stride": 4}),
    "groups": ((2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2}),
    "depthwise": ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
    "padding beyond the kernel": ((1, 2, 4, 4), (3, 2, 2, 2), {"padding": 3}),
    "even kernel": ((1, 2, 7, 7), (3, 2, 4, 4), {"stride": 2, "padding": 1}),
}

TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((2, 3, 5), (3, 4, 3), {"stride": 2}),
    "2d": ((2, 3, 4, 5), (3, 4, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "3d": ((1, 2, 3, 3, 3), (2, 2, 2, 2, 2), {"stride": 2}),
    "groups": ((2, 4, 5, 5), (4, 3, 3, 3), {"groups": 2}),
    "dilation": ((1, 2, 5, 5), (2, 3, 3, 3), {"dilation": 2, "stride": 3, "output_padding": 2}),
}


def narrowed_step(x: torch.Tensor, w: torch.Tensor, options: dict[str, Any], transposed: bool = False) -> StepGraph:
    """A captured step that takes the input gradient of one convolution, narrowed to it."""
    functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d) if transposed else ()
    convolution = (functions or (F.conv1d, F.conv2d, F.conv3d))[x.dim() - 3]

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(convolution(x, w, **options).sin().sum(), x)[0]

    step_graph = captured(step, x, w)
    SelectOutputs().run(step_graph)
    NarrowOutputs().run(step_graph)
    return step_graph


def check_rewritten(applied: Applied) -> None:
    FileCheck().check("aten.convolution_backward").run(applied.before)
    FileCheck().check_count("aten.convolution.default", 2, exactly=True).run(applied.after)
    FileCheck().check_not("convolution_backward").check_not("getitem").run(applied.after)
    assert len(applied.result.narrowed) == 1
    assert applied.result.skipped == []


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_input_gradient_is_a_transposed_convolution(case: str):
    input_shape, weight_shape, options = CONVOLUTIONS[case]
    step_graph = narrowed_step(torch.rand(input_shape), torch.rand(weight_shape), options)
    check_rewritten(apply(dgrad_as_convolution, step_graph))
    transposed = [node.args[6] for node in find(step_graph, aten.convolution.default)]
    assert transposed == [False, True]


@pytest.mark.parametrize("case", TRANSPOSED)
def test_input_gradient_of_a_transposed_convolution_is_a_plain_one(case: str):
    input_shape, weight_shape, options = TRANSPOSED[case]
    step_graph = narrowed_step(torch.rand(input_shape), torch.rand(weight_shape), options, transposed=True)
    check_rewritten(apply(dgrad_as_convolution, step_graph))
    transposed = [node.args[6] for node in find(step_graph, aten.convolution.default)]
    assert transposed == [True, False]


def test_transposed_convolution_with_more_output_padding_than_stride_is_left_alone_and_reported():
    """A plain convolution would return a row for every further stride that fits into the padding."""
    options = {"dilation": 2, "padding": 1, "output_padding": 1}
    step_graph = narrowed_step(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 2, 2), options, transposed=True)
    applied = apply(dgrad_as_convolution, step_graph)
    assert not applied.changed
    assert "dimension 0 has an output padding of 1" in applied.result.skipped[0].reason


def test_channels_last():
    x = torch.rand(2, 4, 6, 6).to(memory_format=torch.channels_last)
    step_graph = narrowed_step(x, torch.rand(4, 4, 3, 3).to(memory_format=torch.channels_last), {"stride": 2})
    check_rewritten(apply(dgrad_as_convolution, step_graph))


def hand_built(mask: list[bool], used: tuple[int, ...], size: int = 8, **options: Any) -> StepGraph:
    b = Builder()
    gy, x, w = b.input("gy", 2, 4, 4, 4), b.input("x", 2, 3, size, size), b.weight("w", 4, 3, 3, 3)
    stride, padding = options.get("stride", [2, 2]), options.get("padding", [1, 1])
    backward = b.call(
        aten.convolution_backward.default, gy, x, w, [4], stride, padding, [1, 1], False, [0, 0], 1, mask, backward=True
    )
    return b.build(*(b.item(backward, index) for index in used))


def test_text_before_and_after():
    applied = apply(dgrad_as_convolution, hand_built([True, False, False], (0,)))
    FileCheck().check("convolution_backward.default](args = (%gy, %x, %w, [4], [2, 2], [1, 1]").run(applied.before)
    FileCheck().check(
        "convolution.default](args = (%gy, %w, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1), kwargs = {})"
    ).check("return (convolution_default,)").run(applied.after)


def test_one_number_may_stand_for_all_dimensions():
    applied = apply(dgrad_as_convolution, hand_built([True, False, False], (0,), stride=[2], padding=[1]))
    FileCheck().check("None, [2, 2], [1, 1], [1, 1], True, [1, 1], 1)").run(applied.after)


@pytest.mark.parametrize("used", [(1,), (0, 1), (0, 2), (0, 1, 2)])
def test_convolution_whose_weight_gradient_is_used_is_untouched(used: tuple[int, ...]):
    step_graph = hand_built([index in used for index in range(3)], used)
    applied = apply(dgrad_as_convolution, step_graph)
    assert not applied.changed
    assert applied.result.skipped == []


def test_output_padding_that_torch_does_not_allow_is_left_alone_and_reported():
    """An input of 9 would need an output padding of 2 at stride 2; no real convolution is like that."""
    step_graph = hand_built([True, False, False], (0,))
    (placeholder,) = (node for node in step_graph.inputs if node.name == "x")
    with placeholder.meta["val"].fake_mode:
        placeholder.meta["val"] = torch.empty(2, 3, 9, 9)
    before = str(step_graph.graph)
    result = dgrad_as_convolution.run(step_graph)
    assert str(step_graph.graph) == before
    assert not result.changed
    assert "dimension 0 needs an output padding of 2" in result.skipped[0].reason


def test_operand_of_unknown_shape_is_left_alone_and_reported():
    step_graph = hand_built([True, False, False], (0,))
    (placeholder,) = (node for node in step_graph.inputs if node.name == "gy")
    del placeholder.meta["val"]
    result = dgrad_as_convolution.run(step_graph)
    assert not result.changed
    assert "no known shape" in result.skipped[0].reason


def dynamic_step(stride: int) -> StepGraph:
    """A step whose height and width are symbolic."""

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(F.conv2d(x, w, stride=stride, padding=1).sin().sum(), x)[0]

    x = torch.rand(2, 3, 12, 12)
    torch._dynamo.mark_dynamic(x, (2, 3), min=8, max=64)
    step_graph = captured(step, x, torch.rand(4, 3, 3, 3))
    SelectOutputs().run(step_graph)
    NarrowOutputs().run(step_graph)
    return step_graph


def test_symbolic_sizes_are_left_alone_and_reported():
    step_graph = dynamic_step(stride=2)
    before = str(step_graph.graph)
    result = dgrad_as_convolution.run(step_graph)
    assert str(step_graph.graph) == before
    assert not result.changed
    assert "symbolic size" in result.skipped[0].reason
    assert result.skipped[0].source.rpartition(":")[0] == __file__


def test_symbolic_sizes_whose_padding_is_known_are_rewritten():
    """At stride 1 the output padding is zero whatever the size."""
    step_graph = dynamic_step(stride=1)
    result = dgrad_as_convolution.run(step_graph)
    assert result.skipped == []
    FileCheck().check("True, [0, 0], 1)").run(str(step_graph.graph))


def test_graph_without_a_convolution_is_untouched():
    b = Builder()
    assert not apply(dgrad_as_convolution, b.build(b.call(aten.relu.default, b.input("x", 2)))).changed


def test_it_may_round_differently():
    assert dgrad_as_convolution.tier is Tier.REORDERS_FLOAT
