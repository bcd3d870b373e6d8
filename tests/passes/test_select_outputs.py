from __future__ import annotations

import torch
from pass_testing import Builder, apply, aten, captured
from torch import nn
from torch.testing import FileCheck

from gradprune.graph.step_graph import OutputRole, StepGraph
from gradprune.passes.select_outputs import SelectOutputs


def linear_step(weight_role: OutputRole) -> StepGraph:
    """Gradients of ``x @ w`` with respect to ``x`` and ``w``."""
    b = Builder()
    x, w, gy = b.input("x", 4, 3), b.weight("w", 3, 5), b.input("gy", 4, 5)
    wt = b.call(aten.permute.default, w, [1, 0])
    gx = b.call(aten.mm.default, gy, wt, backward=True)
    xt = b.call(aten.permute.default, x, [1, 0], backward=True)
    gw = b.call(aten.mm.default, xt, gy, backward=True)
    return b.build((gx, OutputRole.INPUT_GRAD), (gw, weight_role))


def test_weight_gradient_and_all_that_it_alone_needs_go():
    step_graph = linear_step(OutputRole.WEIGHT_GRAD)
    applied = apply(SelectOutputs(), step_graph)
    FileCheck().check("%mm_default_1").check("return (mm_default, mm_default_1)").run(applied.before)
    FileCheck().check("mm.default](args = (%gy, %permute_default)").check("return (mm_default, None)").run(
        applied.after
    )
    FileCheck().check_not("%permute_default_1").check_not("%mm_default_1").run(applied.after)
    assert {change.node for change in applied.result.removed} == {"mm_default_1", "permute_default_1"}


def test_weight_gradient_that_is_read_stays_and_is_reported():
    step_graph = linear_step(OutputRole.KEPT_WEIGHT_GRAD)
    step_graph.kept_because[1] = "the step prints it"
    applied = apply(SelectOutputs(), step_graph)
    assert not applied.changed
    (skipped,) = applied.result.skipped
    assert (skipped.node, skipped.operator, skipped.reason) == ("mm_default_1", "aten.mm", "the step prints it")


def test_value_with_two_roles_is_dropped_in_one_place_only():
    b = Builder()
    product = b.call(aten.mul.Tensor, b.input("x", 2), b.weight("w", 2))
    step_graph = b.build(product, (product, OutputRole.WEIGHT_GRAD))
    applied = apply(SelectOutputs(), step_graph)
    FileCheck().check("%mul_tensor").check("return (mul_tensor, None)").run(applied.after)


def test_graph_without_weight_gradients_is_untouched():
    b = Builder()
    step_graph = b.build(b.call(aten.relu.default, b.input("x", 2)))
    assert not apply(SelectOutputs(), step_graph).changed


def test_backward_call_in_a_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        model(x).square().sum().backward()
        return x.grad

    applied = apply(SelectOutputs(), captured(step, torch.rand(4, 3)))
    FileCheck().check_count("aten.mm.default", 2, exactly=True).run(applied.before)
    FileCheck().check_count("aten.mm.default", 1, exactly=True).check_not("sum.dim").run(applied.after)
    assert {change.source.rpartition(":")[0] for change in applied.result.removed} == {__file__}


def test_joint_graph_of_a_model_keeps_its_list_of_outputs():
    applied = apply(SelectOutputs(), captured(nn.Linear(3, 2), torch.rand(4, 3, requires_grad=True)))
    FileCheck().check("return [addmm, ").run(applied.before)
    FileCheck().check("return [addmm, None, None, mm]").run(applied.after)
