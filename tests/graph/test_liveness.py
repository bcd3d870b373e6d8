from __future__ import annotations

import torch
from pass_testing import Builder, aten, captured
from torch import nn

from gradprune.graph.liveness import base, peak_bytes, saved_nodes, tensor_bytes, total_bytes
from gradprune.passes.pipeline import PIPELINE, run_passes

FLOAT = 4


def test_bytes_of_a_tensor():
    assert tensor_bytes(torch.empty(2, 3)) == 6 * FLOAT
    assert tensor_bytes(torch.empty(2, 3, dtype=torch.bool)) == 6
    assert tensor_bytes(torch.empty(1, 3).expand(100, 3)) == 3 * FLOAT
    assert tensor_bytes(torch.empty(0)) == 0
    assert tensor_bytes((torch.empty(2),)) == 0
    assert tensor_bytes(None) == 0


def test_a_view_belongs_to_the_node_whose_memory_it_shows():
    b = Builder()
    x = b.input("x", 2, 3)
    value = b.call(aten.sin.default, x)
    view = b.call(aten.view.default, b.call(aten.permute.default, value, [1, 0]), [3, 2])
    assert base(view) is value
    assert base(b.call(aten.expand.default, x, [2, 3])) is x
    assert base(b.call(aten.clone.default, view)).target is aten.clone.default
    assert base(x) is x


def test_saved_is_what_backward_reads_of_forward():
    b = Builder()
    x, w, gy = b.input("x", 2, 3), b.weight("w", 3, 5), b.input("gy", 2, 5)
    hidden = b.call(aten.sin.default, x)
    view = b.call(aten.view.default, hidden, [2, 3])
    wt = b.call(aten.permute.default, b.call(aten.neg.default, w), [1, 0])  # of weights alone: not counted
    unread = b.call(aten.mm.default, view, w)
    g = b.call(aten.mm.default, gy, wt, backward=True)
    g = b.call(aten.mul.Tensor, g, b.call(aten.cos.default, view, backward=True), backward=True)
    g = b.call(aten.mul.Tensor, g, x, backward=True)  # the caller's own: not counted
    step_graph = b.build(unread, g)
    assert saved_nodes(step_graph) == [hidden]
    assert total_bytes(saved_nodes(step_graph)) == 6 * FLOAT


def test_peak_of_a_chain_holds_two_values():
    b = Builder()
    value = b.input("x", 10)
    for _ in range(4):
        value = b.call(aten.sin.default, value)
    assert peak_bytes(b.build(value)) == 2 * 10 * FLOAT


def test_peak_counts_what_waits_for_its_last_use():
    b = Builder()
    first = b.call(aten.sin.default, b.input("x", 10))
    second = b.call(aten.cos.default, b.call(aten.view.default, first, [2, 5]))
    third = b.call(aten.cos.default, second)
    # ``first`` waits, through its view, while the third one is made.
    last = b.call(aten.add.Tensor, third, b.call(aten.view.default, first, [2, 5]))
    assert peak_bytes(b.build(last)) == 3 * 10 * FLOAT


def test_peak_counts_items_of_a_tuple_once():
    b = Builder()
    pooled = b.call(aten.max_pool2d_with_indices.default, b.input("x", 1, 1, 4, 4), [2, 2])
    values, indices = b.item(pooled, 0), b.item(pooled, 1)
    assert peak_bytes(b.build(values, indices)) == 4 * FLOAT + 4 * 8


def test_pruning_frees_the_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        model(x).sum().backward()
        return x.grad

    step_graph = captured(step, torch.rand(2, 3, 10, 10))
    saved, peak = total_bytes(saved_nodes(step_graph)), peak_bytes(step_graph)
    run_passes(step_graph, PIPELINE)
    masks = 2 * 8 * (8 * 8 + 6 * 6)
    assert total_bytes(saved_nodes(step_graph)) == masks
    assert saved >= FLOAT * masks
    assert peak_bytes(step_graph) < peak
