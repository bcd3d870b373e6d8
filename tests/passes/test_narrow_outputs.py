from __future__ import annotations

import pytest
import torch
from pass_testing import Builder, apply, aten, captured, find
from torch import nn
from torch.testing import FileCheck

from gradprune.graph.step_graph import OutputRole, StepGraph
from gradprune.passes.narrow_outputs import NarrowOutputs, used_outputs
from gradprune.passes.select_outputs import SelectOutputs


def convolution_backward(*used: int) -> StepGraph:
    """A whole convolution backward of which some outputs are returned."""
    b = Builder()
    gy, x, w = b.input("gy", 2, 4, 6, 6), b.input("x", 2, 3, 6, 6), b.weight("w", 4, 3, 3, 3)
    both = [1, 1]
    backward = b.call(
        aten.convolution_backward.default, gy, x, w, [4], both, both, both, False, [0, 0], 1, [True] * 3, backward=True
    )
    items = [b.item(backward, index) for index in range(3)]
    return b.build(*(items[index] for index in used))


@pytest.mark.parametrize(
    ("used", "mask"),
    [
        ((0,), "[True, False, False]"),
        ((1,), "[False, True, False]"),
        ((0, 2), "[True, False, True]"),
    ],
)
def test_mask_asks_for_what_is_used(used: tuple[int, ...], mask: str):
    step_graph = convolution_backward(*used)
    applied = apply(NarrowOutputs(), step_graph)
    FileCheck().check("[True, True, True]").run(applied.before)
    FileCheck().check(mask).check_count("operator.getitem", len(used), exactly=True).run(applied.after)
    (node,) = find(step_graph, aten.convolution_backward.default)
    assert [value is not None for value in node.meta["val"]] == [index in used for index in range(3)]
    (change,) = applied.result.narrowed
    assert change.operator == "aten.convolution_backward"
    assert change.reason == f"only outputs {list(used)} are used"


def test_everything_used_is_untouched():
    assert not apply(NarrowOutputs(), convolution_backward(0, 1, 2)).changed


def test_narrowing_frees_what_only_a_dead_output_needed():
    """One sweep is enough: the second backward dies with the first one's unused output."""
    step_graph = convolution_backward()
    assert used_outputs(find(step_graph, aten.convolution_backward.default)[0]) == frozenset({0, 1, 2})
    applied = apply(NarrowOutputs(), step_graph)
    FileCheck().check_not("call_function").run(applied.after)
    removed = [change.operator for change in applied.result.removed]
    assert removed == ["aten.convolution_backward", "getitem", "getitem", "getitem"]


def test_node_used_as_a_whole_is_untouched():
    b = Builder()
    backward = b.call(
        aten.native_layer_norm_backward.default,
        *(b.input("gy", 4, 6), b.input("x", 4, 6), [6], b.input("mean", 4, 1), b.input("rstd", 4, 1)),
        *(b.weight("w", 6), b.weight("bias", 6), [True, True, True]),
    )
    b.graph.output((backward,))
    step_graph = StepGraph(b.graph, "step", b.roles, [OutputRole.UPDATE])
    assert used_outputs(backward) is None
    before = str(b.graph)
    assert not NarrowOutputs().run(step_graph).changed
    assert str(b.graph) == before


def test_unknown_backward_operator_is_kept_whole_and_reported():
    library = torch.library.Library("gradprune_tests", "FRAGMENT")
    library.define("twofold_backward(Tensor gy) -> (Tensor, Tensor)")
    library.impl("twofold_backward", lambda gy: (gy + 1, gy + 2), "CompositeExplicitAutograd")
    b = Builder()
    backward = b.call(torch.ops.gradprune_tests.twofold_backward.default, b.input("gy", 2))
    applied = apply(NarrowOutputs(), b.build(b.item(backward, 1)))
    assert not applied.changed
    (skipped,) = applied.result.skipped
    assert skipped.operator == "gradprune_tests.twofold_backward"
    assert skipped.reason == "outputs [1] of 2 are used, but no narrowing rule for this operator"


def test_operator_that_cannot_be_narrowed_is_reported_with_its_reason():
    b = Builder()
    x, w = b.input("x", 2, 3), b.weight("w", 1)
    backward = b.call(aten._prelu_kernel_backward.default, b.input("gy", 2, 3), x, w)
    applied = apply(NarrowOutputs(), b.build(b.item(backward, 0)))
    assert not applied.changed
    assert "together" in applied.result.skipped[0].reason


def test_operator_of_which_everything_is_used_is_not_reported():
    b = Builder()
    backward = b.call(aten._prelu_kernel_backward.default, b.input("gy", 2, 3), b.input("x", 2, 3), b.weight("w", 1))
    applied = apply(NarrowOutputs(), b.build(b.item(backward, 0), b.item(backward, 1)))
    assert applied.result.skipped == []


def test_forward_operator_with_unused_outputs_is_not_reported():
    b = Builder()
    pooled = b.call(aten.max_pool2d_with_indices.default, b.input("x", 1, 1, 4, 4), [2, 2])
    applied = apply(NarrowOutputs(), b.build(b.item(pooled, 0)))
    assert not applied.changed
    assert applied.result.skipped == []


def test_unused_random_operator_stays():
    b = Builder()
    x = b.input("x", 3)
    b.call(aten.rand_like.default, x)
    applied = apply(NarrowOutputs(), b.build(b.call(aten.relu.default, x)))
    assert not applied.changed


def test_joint_graph_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    step_graph = captured(model, torch.rand(2, 3, 6, 6, requires_grad=True))
    SelectOutputs().run(step_graph)
    applied = apply(NarrowOutputs(), step_graph)
    FileCheck().check_count("[True, True, True]", 2, exactly=True).run(applied.before)
    FileCheck().check_count("[True, False, False]", 2, exactly=True).check_not("[True, True, True]").run(applied.after)


def test_layer_norm():
    b = Builder()
    gy, x, w = b.input("gy", 4, 6), b.input("x", 4, 6), b.weight("w", 6)
    statistics = b.input("mean", 4, 1), b.input("rstd", 4, 1)
    mask = [True, True, True]
    backward = b.call(aten.native_layer_norm_backward.default, gy, x, [6], *statistics, w, w, mask)
    applied = apply(NarrowOutputs(), b.build(b.item(backward, 0)))
    FileCheck().check("layer_norm_backward").check_same("[True, False, False]").run(applied.after)
