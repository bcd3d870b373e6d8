from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pass_testing import Builder, aten, captured, find
from torch import nn

from gradprune.graph.regions import backward_nodes, descendants, weight_gradient_nodes, weight_only_nodes
from gradprune.graph.step_graph import OutputRole, StepGraph

model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def by_backward(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_(True)
    model(x).square().sum().backward()
    return x.detach() + x.grad.exp()


def by_autograd_grad(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    return x.detach() + gradient.exp()


def by_func_grad(x: torch.Tensor) -> torch.Tensor:
    gradient = torch.func.grad(lambda z: model(z).square().sum())(x)
    return x + gradient.exp()


@pytest.mark.parametrize("step", [by_backward, by_autograd_grad, by_func_grad])
def test_backward_pass_of_a_step(step: Callable):
    step_graph = captured(step, torch.rand(2, 3))
    backward = backward_nodes(step_graph)
    assert not backward.intersection(find(step_graph, aten.addmm.default))
    assert backward.issuperset(find(step_graph, aten.mm.default))
    assert not backward.intersection(find(step_graph, aten.tanh.default))
    # The update that follows belongs to neither pass.
    assert not backward.intersection(find(step_graph, aten.exp.default))
    weight_products = [node for node in find(step_graph, aten.mm.default) if node in weight_gradient_nodes(step_graph)]
    assert len(weight_products) == (2 if step is by_backward else 0)


def test_backward_pass_of_a_model_is_what_depends_on_a_tangent():
    step_graph = captured(model, torch.rand(2, 3, requires_grad=True))
    backward = backward_nodes(step_graph)
    (tangent,) = (node for node in step_graph.inputs if node.name.startswith("tangents"))
    assert backward == descendants(step_graph, {tangent}) - {tangent}
    assert len(backward.intersection(find(step_graph, aten.mm.default))) == 4


def by_hand() -> tuple[Builder, dict[str, torch.fx.Node]]:
    b = Builder()
    x, w = b.input("x", 2, 3), b.weight("w", 3, 3)
    nodes = {"wt": b.call(aten.permute.default, w, [1, 0]), "constant": b.call(aten.full.default, [3, 3], 1.0)}
    nodes["packed"] = b.call(aten.mul.Tensor, nodes["wt"], nodes["constant"])
    nodes["y"] = b.call(aten.mm.default, x, nodes["packed"])
    nodes["shared"] = b.call(aten.cos.default, nodes["y"], backward=True)
    nodes["gx"] = b.call(aten.mm.default, nodes["shared"], w, backward=True)
    nodes["xt"] = b.call(aten.permute.default, x, [1, 0], backward=True)
    nodes["gw"] = b.call(aten.mm.default, nodes["xt"], nodes["shared"], backward=True)
    return b, nodes


def finished(b: Builder, nodes: dict[str, torch.fx.Node], role: OutputRole) -> StepGraph:
    return b.build((nodes["gx"], OutputRole.INPUT_GRAD), (nodes["gw"], role))


def test_values_of_weights_and_constants_alone():
    b, nodes = by_hand()
    step_graph = finished(b, nodes, OutputRole.WEIGHT_GRAD)
    names = {node.name for node in weight_only_nodes(step_graph)}
    assert names == {"w", *(nodes[name].name for name in ("wt", "constant", "packed"))}


@pytest.mark.parametrize("role", [OutputRole.WEIGHT_GRAD, OutputRole.KEPT_WEIGHT_GRAD])
def test_nodes_that_lead_to_weight_gradients_alone(role: OutputRole):
    b, nodes = by_hand()
    assert weight_gradient_nodes(finished(b, nodes, role)) == {nodes["xt"], nodes["gw"]}


def test_weight_gradient_that_an_update_needs_is_none_of_them():
    b, nodes = by_hand()
    total = b.call(aten.sum.default, nodes["gw"])
    step_graph = b.build((nodes["gw"], OutputRole.KEPT_WEIGHT_GRAD), total)
    assert weight_gradient_nodes(step_graph) == {nodes["gx"]}
