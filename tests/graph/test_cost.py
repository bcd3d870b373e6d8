from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pass_testing import Builder, aten, captured
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gradprune.graph.cost import FLOP_CLASSES, count_flops, node_flops
from gradprune.graph.step_graph import OutputRole, StepGraph
from gradprune.passes.pipeline import PIPELINE, run_passes


def step_of(model: nn.Module, x: torch.Tensor) -> StepGraph:
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        model(x).square().sum().backward()
        return x.grad

    return captured(step, x)


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    # the model, its input's shape, and 2 x multiply-adds of one forward pass
    "linear": (lambda: nn.Linear(5, 7), (3, 5), 2 * 3 * 5 * 7),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6), 2 * 2 * 4 * 36 * 3 * 9),
    "stride": (lambda: nn.Conv2d(3, 4, 2, stride=2), (2, 3, 6, 6), 2 * 2 * 4 * 9 * 3 * 4),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (1, 4, 5, 5), 2 * 6 * 25 * 2 * 9),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (1, 3, 5, 5), 2 * 3 * 25 * 4 * 4),
    "one dimension": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 8), 2 * 2 * 4 * 6 * 3 * 3),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["step", "model"])
def test_each_gradient_costs_what_the_forward_pass_costs(name: str, form: str):
    make, shape, expected = MODELS[name]
    x = torch.rand(shape)
    step_graph = step_of(make(), x) if form == "step" else captured(make(), x.requires_grad_())
    assert count_flops(step_graph) == {"forward": expected, "input_grad": expected, "weight_grad": expected, "other": 0}
    run_passes(step_graph, PIPELINE)
    assert count_flops(step_graph) == {"forward": expected, "input_grad": expected, "weight_grad": 0, "other": 0}


def test_totals_agree_with_torch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(5, 2))
    x = torch.rand(2, 3, 9, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert sum(count_flops(step_of(model, x)).values()) == counter.get_total_flops()


def test_classes():
    step_graph = step_of(nn.Linear(5, 7), torch.rand(3, 5))
    assert tuple(count_flops(step_graph)) == FLOP_CLASSES


def test_attention():
    """Two products forward; backward those two differentiated by both operands, and the scores again."""

    def step(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query = query.detach().requires_grad_(True)
        attended = F.scaled_dot_product_attention(query, key, key)
        return torch.autograd.grad(attended.sin().sum(), query)[0]

    product = 2 * 2 * 5 * 7 * 8
    flops = count_flops(captured(step, torch.rand(2, 1, 5, 8), torch.rand(2, 1, 7, 8)))
    assert flops == {"forward": 2 * product, "input_grad": 5 * product, "weight_grad": 0, "other": 0}


def test_products_of_weights_alone_are_other():
    b = Builder()
    u, v, x = b.weight("u", 3, 4), b.weight("v", 4, 5), b.input("x", 2, 3)
    product = b.call(aten.mm.default, u, v)
    y = b.call(aten.mm.default, x, product)
    assert count_flops(b.build(y)) == {"forward": 60, "input_grad": 0, "weight_grad": 0, "other": 120}


def test_weight_gradient_that_is_read_counts_as_one():
    b = Builder()
    x, gy = b.input("x", 4, 3), b.input("gy", 4, 5)
    gw = b.call(aten.mm.default, b.call(aten.permute.default, x, [1, 0], backward=True), gy, backward=True)
    step_graph = b.build((gw, OutputRole.KEPT_WEIGHT_GRAD))
    assert count_flops(step_graph)["weight_grad"] == 120


def test_weight_gradient_inside_a_convolution_backward_counts_wherever_it_goes():
    """The loss of a second-order attack may depend on a weight gradient; it costs the same all the same."""
    b = Builder()
    gy, x, w = b.input("gy", 1, 2, 4, 4), b.input("x", 1, 3, 6, 6), b.weight("w", 2, 3, 3, 3)
    pairs = [1, 1], [0, 0], [1, 1]
    mask = [True, True, False]
    whole = b.call(aten.convolution_backward.default, gy, x, w, [2], *pairs, False, [0, 0], 1, mask, backward=True)
    total = b.call(aten.sum.default, b.item(whole, 1), backward=True)
    step_graph = b.build(b.item(whole, 0), total)
    each = 2 * 2 * 16 * 3 * 9
    assert count_flops(step_graph) == {"forward": 0, "input_grad": each, "weight_grad": each, "other": 0}


def test_elementwise_operators_cost_nothing():
    b = Builder()
    assert node_flops(b.call(aten.tanh.default, b.input("x", 3))) == 0
