"""Weights of convolutions are converted ahead. Run on a CPU by pretending that it is a GPU."""

from __future__ import annotations

import pytest
import torch
from pass_testing import apply, captured, find, step_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradprune.graph.invariance import hoisted_values
from gradprune.passes import channels_last_weights as module
from gradprune.passes.channels_last_weights import channels_last_weights
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.select_outputs import SelectOutputs
from gradprune.torch_compat.inductor import computes_in_channels_last

aten = torch.ops.aten


def attacked(model: nn.Module, x: torch.Tensor):
    step_graph = captured(step_of(model), x)
    for rewrite in (SelectOutputs(), NarrowOutputs(), dgrad_as_convolution):
        rewrite.run(step_graph)
    return step_graph


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).double()


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, "computes_in_channels_last", lambda graph: True)


@pytest.mark.usefixtures("on_a_gpu")
def test_forward_and_input_gradient_share_one_converted_weight():
    step_graph = attacked(network(), torch.randn(2, 8, 9, 9, dtype=torch.float64))
    applied = apply(channels_last_weights, step_graph)
    assert len(applied.result.narrowed) == 4
    assert len(find(step_graph, aten.clone.default)) == 4
    HoistInvariants().run(step_graph)
    clones = find(step_graph, aten.clone.default)
    assert hoisted_values(step_graph) == clones
    assert len(clones) == 2
    for clone in clones:
        assert clone.meta["val"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("on_a_gpu")
def test_weights_that_are_so_already_are_left():
    model = network().to(memory_format=torch.channels_last)
    assert not apply(channels_last_weights, attacked(model, torch.randn(2, 8, 9, 9, dtype=torch.float64))).changed


@pytest.mark.usefixtures("on_a_gpu")
def test_other_numbers_of_dimensions_are_left():
    assert not apply(channels_last_weights, attacked(nn.Conv1d(4, 4, 3), torch.randn(2, 4, 9))).changed


@pytest.mark.usefixtures("on_a_gpu")
def test_what_inductor_computes_in_another_order_is_left(monkeypatch):
    monkeypatch.setattr(module, "computes_in_channels_last", lambda graph: False)
    assert not apply(channels_last_weights, attacked(network(), torch.randn(2, 8, 9, 9, dtype=torch.float64))).changed


def test_a_cpu_is_left():
    assert not apply(channels_last_weights, attacked(network(), torch.randn(2, 8, 9, 9, dtype=torch.float64))).changed


def test_inductor_is_asked_about_tensors_on_a_gpu():
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x, weight = torch.randn(8, 128, 28, 28, device="cuda"), torch.randn(256, 128, 3, 3, device="cuda")
        nodes = graph.placeholder("x"), graph.placeholder("weight")
        arguments = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        call = graph.call_function(aten.convolution.default, (*nodes, None, *arguments))
        for node, value in zip((*nodes, call), (x, weight, aten.convolution(x, weight, None, *arguments)), strict=True):
            node.meta["val"] = value
    graph.output((call,))
    assert computes_in_channels_last(graph)
