from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pass_testing import Builder, aten, captured, find
from torch import fx, nn

from gradprune.graph.invariance import hoisted_values, invariant_nodes
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph
from gradprune.torch_compat.aot import InputMutationAOTOutput, PlainAOTInput, PlainAOTOutput

# --- What stays the same from step to step ----------------------------------------------------------------------------


def test_weights_constants_and_what_is_computed_from_them():
    b = Builder()
    x, w, v = b.input("x", 3, 3), b.weight("w", 3, 3), b.weight("v", 3)
    one = b.call(aten.full.default, [3, 3], 1.0)
    view = b.call(aten.permute.default, w, [1, 0])
    product = b.call(aten.mul.Tensor, view, one)
    total = b.call(aten.add.Tensor, product, v)
    y = b.call(aten.mm.default, x, total)
    z = b.call(aten.mul.Tensor, y, product)
    step_graph = b.build(z)
    assert invariant_nodes(step_graph) == {w, v, one, view, product, total}
    assert x not in invariant_nodes(step_graph)


@pytest.mark.parametrize("role", [role for role in InputRole if role is not InputRole.WEIGHT])
def test_no_other_input_stays_the_same(role: InputRole):
    """The clean images do for one attack, but the next has others."""
    b = Builder()
    other, w = b.input("other", 3, role=role), b.weight("w", 3)
    value = b.call(aten.mul.Tensor, b.call(aten.exp.default, other), w)
    assert invariant_nodes(b.build(b.call(aten.neg.default, value))) == {w}


RANDOM: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "rand_like": lambda b, w: b.call(aten.rand_like.default, w),
    "randn_like": lambda b, w: b.call(aten.randn_like.default, w),
    "bernoulli": lambda b, w: b.call(aten.bernoulli.p, w, 0.5),
    "dropout": lambda b, w: b.item(b.call(aten.native_dropout.default, w, 0.5, True), 0),
    "rand": lambda b, w: b.call(aten.rand.default, [3, 3]),
    "Inductor's seeds": lambda b, w: b.call(torch.ops.prims.inductor_seeds.default, 1, torch.device("cpu")),
}


@pytest.mark.parametrize("operator", RANDOM)
def test_random_numbers_differ_from_step_to_step(operator: str):
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    noise = RANDOM[operator](b, w)
    noisy = b.call(aten.mul.Tensor, b.call(aten.neg.default, noise), w)
    step_graph = b.build(b.call(aten.mm.default, x, noisy))
    assert invariant_nodes(step_graph) == {w}
    assert hoisted_values(step_graph) == []


def test_operator_that_takes_graphs_may_do_anything():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    node = b.graph.call_function(torch.ops.higher_order.invoke_subgraph, (w,))
    node.meta["val"] = w.meta["val"]
    assert invariant_nodes(b.build(b.call(aten.mul.Tensor, node, x))) == {w}


def test_weight_that_is_copied_to_is_written():
    b = Builder()
    x, w, v = b.input("x", 3), b.weight("w", 3), b.weight("v", 3)
    scaled, other = b.call(aten.exp.default, w), b.call(aten.exp.default, v)
    value = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, scaled), other)
    b.call(aten.copy_.default, w, value)
    step_graph = b.build(value)
    assert invariant_nodes(step_graph) == {v, other}
    assert hoisted_values(step_graph) == [other]


def test_weight_that_is_copied_from_is_not_written():
    b = Builder()
    state, w = b.input("state", 3), b.weight("w", 3)
    copy = b.call(aten.copy_.default, state, w)
    assert w in invariant_nodes(b.build(copy))


def test_weight_whose_new_value_is_returned_is_written():
    """Where the graph does not copy it itself, AOTAutograd stores an output into the weight when the step is done."""
    b = Builder()
    x, w, v = b.input("x", 3), b.weight("w", 3), b.weight("v", 3)
    for index, node in enumerate((x, w, v)):
        node.meta["desc"] = PlainAOTInput(index)
    value = b.call(aten.mul.Tensor, b.call(aten.exp.default, w), b.call(aten.exp.default, v))
    y = b.call(aten.mul.Tensor, x, value)
    step_graph = b.build((y, OutputRole.MUTATION), y)
    step_graph.output_node.meta["desc"] = [InputMutationAOTOutput(PlainAOTInput(1)), PlainAOTOutput(0)]
    assert w not in invariant_nodes(step_graph)
    assert [node.all_input_nodes for node in hoisted_values(step_graph)] == [[v]]


def input_gradient(model: Callable[..., Any]) -> Callable[..., Any]:
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    return step


def written(step_graph: StepGraph) -> set[fx.Node]:
    return set(step_graph.weights()) - invariant_nodes(step_graph)


def test_running_statistics_in_training_are_written():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    step_graph = captured(input_gradient(model), torch.rand(5, 3))
    assert {tuple(node.meta["val"].shape) for node in written(step_graph)} == {(4,), ()}
    assert len(written(step_graph)) == 3
    assert written(captured(input_gradient(model.eval()), torch.rand(5, 3))) == set()


def test_weight_updated_by_the_step_is_written():
    layer, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(other(layer(x).tanh()).square().sum(), x)
        with torch.no_grad():
            layer.weight.mul_(0.5)
        return gradient

    step_graph = captured(step, torch.rand(3, 3))
    (node,) = written(step_graph)
    assert any(user.target is aten.mul.Tensor for user in node.users)


# --- What the step returns --------------------------------------------------------------------------------------------


def test_what_the_step_returns_is_its_own_each_time():
    """A caller may write to it, or keep it while the next step runs."""
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.exp.default, w)
    step_graph = b.build(b.call(aten.mul.Tensor, x, value), value)
    assert invariant_nodes(step_graph) == {w}
    assert hoisted_values(step_graph) == []


def test_what_a_returned_view_is_a_view_of():
    b = Builder()
    x, w = b.input("x", 2, 3), b.weight("w", 2, 3)
    value = b.call(aten.exp.default, w)
    view = b.call(aten.permute.default, b.call(aten.unsqueeze.default, value, 0), [2, 1, 0])
    step_graph = b.build(b.call(aten.mul.Tensor, x, value), view)
    assert invariant_nodes(step_graph) == {w}
    assert hoisted_values(step_graph) == []


def test_what_a_returned_item_of_several_views_is_a_view_of():
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 4)
    value = b.call(aten.exp.default, w)
    halves = b.call(aten.split.Tensor, value, 2)
    step_graph = b.build(b.call(aten.mul.Tensor, x, value), b.item(halves, 0))
    assert hoisted_values(step_graph) == []


def test_what_is_computed_from_what_the_step_returns():
    """It is computed ahead all the same, from weights; the view of it costs nothing where it is computed anyway."""
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    returned = b.call(aten.exp.default, w)
    view = b.call(aten.permute.default, returned, [1, 0])
    value = b.call(aten.neg.default, view)
    y = b.call(aten.mm.default, b.call(aten.mm.default, x, view), value)
    step_graph = b.build(y, returned)
    assert returned not in invariant_nodes(step_graph)
    assert hoisted_values(step_graph) == [value]


def test_copy_of_what_the_step_returns():
    """What is computed from it has memory of its own."""
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.exp.default, w)
    returned = b.call(aten.clone.default, value)
    step_graph = b.build(b.call(aten.mul.Tensor, x, value), returned)
    assert invariant_nodes(step_graph) == {w, value}
    assert hoisted_values(step_graph) == [value]


def test_weight_that_is_returned_stays_what_it_is():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    step_graph = b.build(b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w)), w)
    assert w in invariant_nodes(step_graph)
    assert len(hoisted_values(step_graph)) == 1


def test_output_that_is_none():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.exp.default, w)
    step_graph = b.build((None, OutputRole.WEIGHT_GRAD), b.call(aten.mul.Tensor, x, value))
    assert hoisted_values(step_graph) == [value]


# --- What is worth computing ahead ------------------------------------------------------------------------------------


def test_values_are_hoisted_before_their_views():
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    value = b.call(aten.flip.default, b.call(aten.permute.default, w, [1, 0]), [0])
    turned = b.call(aten.permute.default, b.call(aten.unsqueeze.default, value, 0), [0, 2, 1])
    assert hoisted_values(b.build(b.call(aten.mul.Tensor, x, turned))) == [value]


def test_values_are_in_graph_order():
    b = Builder()
    y, w = b.input("x", 3), b.weight("w", 3)
    values = [b.call(aten.add.Tensor, w, number) for number in range(8)]
    for value in reversed(values):
        y = b.call(aten.mul.Tensor, y, value)
    assert hoisted_values(b.build(y)) == values


def test_only_what_the_step_reads_is_hoisted():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    inner = b.call(aten.exp.default, w)
    value = b.call(aten.add.Tensor, inner, 1.0)
    b.call(aten.neg.default, value)  # read by nothing
    assert hoisted_values(b.build(b.call(aten.mul.Tensor, x, value))) == [value]


def test_value_that_is_read_by_the_step_and_by_another_value():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    inner = b.call(aten.exp.default, w)
    value = b.call(aten.add.Tensor, inner, 1.0)
    step_graph = b.build(b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, value), inner))
    assert hoisted_values(step_graph) == [inner, value]


VIEWS: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "permute": lambda b, w: b.call(aten.permute.default, w, [1, 0]),
    "view": lambda b, w: b.call(aten.view.default, w, [4, 4]),
    "slice": lambda b, w: b.call(aten.slice.Tensor, w, 0, 0, 4),
    "expand": lambda b, w: b.call(aten.expand.default, w, [4, 4]),
    "alias": lambda b, w: b.call(aten.alias.default, w),
    "several": lambda b, w: b.call(aten.permute.default, b.call(aten.alias.default, w), [1, 0]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_view_of_a_weight_is_not_hoisted(view: str):
    """It costs nothing, and the weight is in memory already."""
    b = Builder()
    x, w = b.input("x", 4, 4), b.weight("w", 4, 4)
    value = VIEWS[view](b, w)
    step_graph = b.build(b.call(aten.mm.default, x, value))
    assert value in invariant_nodes(step_graph)
    assert hoisted_values(step_graph) == []


@pytest.mark.parametrize("split", [aten.split.Tensor, aten.unbind.int])
def test_part_of_a_weight_is_not_hoisted(split: Any):
    b = Builder()
    x, w = b.input("x", 4), b.weight("w", 1, 4)
    parts = b.call(split, w, *([1] if split is aten.split.Tensor else []))
    step_graph = b.build(b.call(aten.mul.Tensor, x, b.item(parts, 0)))
    assert hoisted_values(step_graph) == []


def test_constants_are_not_hoisted():
    b = Builder()
    x = b.input("x", 3)
    b.weight("w", 3)
    constant = b.call(aten.neg.default, b.call(aten.full.default, [3], 2.0))
    step_graph = b.build(b.call(aten.mul.Tensor, x, constant))
    assert constant in invariant_nodes(step_graph)
    assert hoisted_values(step_graph) == []


def test_constant_combined_with_a_weight_is_hoisted():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.add.Tensor, b.call(aten.full.default, [3], 2.0), w)
    assert hoisted_values(b.build(b.call(aten.mul.Tensor, x, value))) == [value]


def test_item_of_an_operator_with_several_results_is_hoisted():
    """What it is taken from is a tuple, which no graph can take as an input."""
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    both = b.call(aten.var_mean.correction, w, [1], keepdim=True)
    variance, mean = b.item(both, 0), b.item(both, 1)
    y = b.call(aten.mul.Tensor, b.call(aten.sub.Tensor, x, mean), variance)
    assert hoisted_values(b.build(y)) == [variance, mean]


def test_returned_item_of_an_operator_with_several_results():
    """It is computed at each step, and so is the tuple it is taken from."""
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    both = b.call(aten.var_mean.correction, w, [1], keepdim=True)
    variance, mean = b.item(both, 0), b.item(both, 1)
    assert hoisted_values(b.build(b.call(aten.mul.Tensor, x, variance), mean)) == [variance]


def test_values_are_hoisted_before_their_parts():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 6)
    value = b.call(aten.exp.default, w)
    parts = b.call(aten.split.Tensor, value, 3)
    y = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, b.item(parts, 1)), b.item(parts, 0))
    assert hoisted_values(b.build(y)) == [value]


def test_graph_without_weights():
    b = Builder()
    x = b.input("x", 3)
    step_graph = b.build(b.call(aten.exp.default, x))
    assert invariant_nodes(step_graph) == set()
    assert hoisted_values(step_graph) == []


def test_analysis_changes_nothing():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    step_graph = b.build(b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w)))
    before = str(step_graph.graph)
    hoisted_values(step_graph)
    assert str(step_graph.graph) == before


# --- Captured steps ---------------------------------------------------------------------------------------------------


def test_linear_layers_have_nothing_but_views():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    step_graph = captured(input_gradient(model), torch.rand(5, 3))
    assert find(step_graph, aten.permute.default)
    assert hoisted_values(step_graph) == []


def test_casts_of_autocast_are_hoisted():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    step_graph = captured(input_gradient(forward), torch.rand(5, 3))
    hoisted = hoisted_values(step_graph)
    assert {node.meta["val"].dtype for node in hoisted} == {torch.bfloat16}
    assert {node.all_input_nodes[0] for node in hoisted} == set(step_graph.weights())


def test_dropout_of_a_weight_is_not_hoisted():
    layer = nn.Linear(3, 4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.dropout(layer.weight.exp(), 0.5))

    step_graph = captured(input_gradient(forward), torch.rand(5, 3))
    (exp,) = find(step_graph, aten.exp.default)
    assert hoisted_values(step_graph) == [exp]
