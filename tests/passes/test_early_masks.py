from __future__ import annotations

import pytest
import torch
from pass_testing import Builder, apply, aten, captured, find
from torch import fx, nn
from torch.testing import FileCheck

from gradprune.graph.regions import BACKWARD
from gradprune.graph.step_graph import Form, StepGraph
from gradprune.ops import realize, unpack_mask
from gradprune.passes.early_masks import EarlyMasks
from gradprune.passes.pipeline import run_passes, select_passes


def gradient(b: Builder) -> fx.Node:
    """What flows back into the operator at hand."""
    return b.call(aten.neg.default, b.input("gy", 2, 3), backward=True)


def relu_step(form: Form = "step", device: str = "cpu") -> StepGraph:
    """The gradient of ``sum(relu(x)) + sum(abs(x))``, with the mask where autograd computes it."""
    b = Builder(form, device=device)
    x = b.input("x", 2, 3)
    gy = gradient(b)
    r = b.call(aten.relu.default, b.call(aten.sin.default, x))
    y = b.call(aten.exp.default, r)
    mask = b.call(aten.le.Scalar, b.call(aten.alias.default, r), 0, backward=form == "step")
    zero = b.call(aten.full.default, [], 0.0, device=device)
    return b.build(y, b.call(aten.where.self, mask, zero, gy, backward=True))


def test_mask_is_computed_and_stored_in_the_forward_pass():
    step_graph = relu_step()
    applied = apply(EarlyMasks(), step_graph)
    FileCheck().check("%relu_default").check("%exp").check("%alias").check("%le_scalar").check("%where").run(
        applied.before
    )
    after = FileCheck().check("%relu_default").check("le.Scalar](args = (%relu_default, 0)")
    after.check("torch.uint8").check("gradprune.realize").check("%exp").check("gradprune.unpack_mask").check(
        "where.self"
    )
    after.run(applied.after)
    FileCheck().check_not("alias").run(applied.after)
    (change,) = applied.result.narrowed
    assert (change.node, change.operator) == ("le_scalar", "aten.le.Scalar")
    (stored,), (unpacked,) = find(step_graph, realize), find(step_graph, unpack_mask)
    assert BACKWARD not in stored.meta
    assert BACKWARD in unpacked.meta
    assert stored.meta["val"].dtype is torch.uint8
    assert unpacked.meta["val"].dtype is torch.bool


def test_where_booleans_are_cheap_the_mask_is_stored_as_it_is():
    step_graph = relu_step(device="cuda")
    result = EarlyMasks().run(step_graph)
    assert len(result.narrowed) == 1
    after = FileCheck().check("%relu_default").check("%le_scalar").check("realize.default](args = (%le_scalar,)")
    after.check("%exp").check("where.self](args = (%realize_default,").run(str(step_graph.graph))
    FileCheck().check_not("uint8").check_not("unpack_mask").run(str(step_graph.graph))


def test_in_the_model_form_the_partitioner_decides_what_is_kept():
    step_graph = relu_step("model")
    applied = apply(EarlyMasks(), step_graph)
    FileCheck().check("%exp").check("%le_scalar").check("torch.uint8").check("gradprune.unpack_mask").run(applied.after)
    assert find(step_graph, realize) == []
    (unpacked,) = find(step_graph, unpack_mask)
    # It depends on the gradient, so that the partitioner cannot save the boolean mask instead.
    assert BACKWARD in unpacked.args[1].meta


def test_model_form_elsewhere_is_untouched():
    step_graph = relu_step("model", device="cuda")
    before = str(step_graph.graph)
    assert not EarlyMasks().run(step_graph).changed
    assert str(step_graph.graph) == before


def test_mask_of_placeholders_is_untouched():
    b = Builder()
    x, gy = b.input("x", 2, 3), gradient(b)
    mask = b.call(aten.gt.Scalar, x, 0, backward=True)
    assert not apply(EarlyMasks(), b.build(b.call(aten.mul.Tensor, gy, mask, backward=True))).changed


def test_mask_of_an_aliased_placeholder_is_untouched():
    b = Builder()
    x, gy = b.input("x", 2, 3), gradient(b)
    mask = b.call(aten.gt.Scalar, b.call(aten.alias.default, x), 0, backward=True)
    assert not apply(EarlyMasks(), b.build(b.call(aten.mul.Tensor, gy, mask, backward=True))).changed


def test_mask_of_a_backward_value_is_untouched():
    b = Builder()
    r = b.call(aten.relu.default, b.input("x", 2, 3))
    g = b.call(aten.cos.default, r, backward=True)
    mask = b.call(aten.gt.Scalar, b.call(aten.alias.default, g, backward=True), 0, backward=True)
    assert not apply(EarlyMasks(), b.build(b.call(aten.mul.Tensor, g, mask, backward=True))).changed


def test_mask_that_the_forward_pass_computes_is_left_to_it():
    b = Builder()
    r = b.call(aten.relu.default, b.input("x", 2, 3))
    mask = b.call(aten.le.Scalar, r, 0)
    assert not apply(EarlyMasks(), b.build(r, b.call(aten.mul.Tensor, gradient(b), mask, backward=True))).changed


@pytest.mark.parametrize("through_alias", [False, True])
def test_mask_of_an_activation_that_is_kept_anyway_is_untouched(through_alias: bool):
    b = Builder()
    r = b.call(aten.relu.default, b.input("x", 2, 3))
    kept = b.call(aten.alias.default, r) if through_alias else r
    g = b.call(aten.mul.Tensor, gradient(b), b.call(aten.cos.default, kept, backward=True), backward=True)
    mask = b.call(aten.le.Scalar, r, 0, backward=True)
    assert not apply(EarlyMasks(), b.build(b.call(aten.mul.Tensor, g, mask, backward=True))).changed


def test_values_that_are_no_masks_are_untouched():
    b = Builder()
    r = b.call(aten.relu.default, b.input("x", 2, 3))
    scalar_mask = b.call(aten.any.default, b.call(aten.le.Scalar, r, 0))  # one element: nothing to gain
    g = b.call(aten.mul.Tensor, b.call(aten.cos.default, r, backward=True), scalar_mask, backward=True)
    assert not apply(EarlyMasks(), b.build(g)).changed


def chain(swapped: bool) -> tuple[StepGraph, fx.Node]:
    """Outside of [-1, 1]: two masks of one activation, and the mask that joins them."""
    b = Builder()
    gy, a = gradient(b), b.call(aten.sin.default, b.input("x", 2, 3))
    below = b.call(aten.le.Scalar, a, -1, backward=True)
    above = b.call(aten.ge.Scalar, a, 1, backward=True)
    outside = b.call(aten.bitwise_or.Tensor, *((above, below) if swapped else (below, above)), backward=True)
    return b.build(a, b.call(aten.mul.Tensor, gy, outside, backward=True)), outside


def stored_masks(step_graph: StepGraph) -> list[fx.Node]:
    """The masks behind what is stored: packed by a choice between one and zero and a conversion."""
    return [node.args[0].args[0].args[0] for node in find(step_graph, realize)]


@pytest.mark.parametrize("swapped", [False, True])
def test_chain_of_masks_is_stored_once(swapped: bool):
    step_graph, outside = chain(swapped)
    applied = apply(EarlyMasks(), step_graph)
    assert stored_masks(step_graph) == [outside]
    assert [change.node for change in applied.result.narrowed] == [outside.name]


def test_masks_of_several_activations():
    b = Builder()
    gy, first = gradient(b), b.call(aten.sin.default, b.input("x", 2, 3))
    second = b.call(aten.cos.default, first)
    below = b.call(aten.le.Scalar, first, 0, backward=True)
    both = b.call(aten.bitwise_and.Tensor, b.call(aten.ge.Scalar, second, 0, backward=True), below, backward=True)
    either = b.call(aten.bitwise_or.Tensor, both, below, backward=True)
    g = b.call(aten.mul.Tensor, gy, either, backward=True)
    step_graph = b.build(second, b.call(aten.mul.Tensor, g, below, backward=True))
    apply(EarlyMasks(), step_graph)
    assert set(stored_masks(step_graph)) == {below, either}


def test_captured_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Hardtanh(), nn.Flatten())

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    step_graph = captured(step, torch.rand(2, 3, 8, 8))
    run_passes(step_graph, select_passes(disable=["early-masks", "hoist-invariants"]))  # which free the activations
    apply(EarlyMasks(), step_graph)
    assert [node.target for node in stored_masks(step_graph)] == [aten.le.Scalar, aten.bitwise_or.Tensor]
