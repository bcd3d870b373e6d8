"""Image gradients are computed for blocks of pixels. Run on a CPU by pretending that it is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pass_testing import apply, captured, find, step_of
from torch import Tensor, nn

from gradprune.graph.cost import count_flops
from gradprune.graph.invariance import hoisted_values
from gradprune.graph.step_graph import StepGraph
from gradprune.ops import subpixel_weight
from gradprune.passes import blocked_image_gradients as module
from gradprune.passes.blocked_image_gradients import blocked_image_gradients
from gradprune.passes.channels_last_weights import channels_last_weights
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.pipeline import PIPELINE
from gradprune.passes.select_outputs import SelectOutputs

aten = torch.ops.aten

Make = Callable[[], tuple[Callable[[], Tensor], Callable[[], Tensor]]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """What would have been timed; blocks win."""
    results: list[tuple[Tensor, Tensor]] = []

    def is_faster(what: str, make: Make, device: torch.device) -> bool:
        candidate, baseline = make()
        results.append((candidate(), baseline()))
        return True

    monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(module, "is_faster", is_faster)
    return results


def attacked(*convolution: int, channels: int = 3, size: int = 16, stride: int = 2, **options: int) -> StepGraph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 8, *convolution, stride=stride, **options), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).double()
    x = torch.rand(2, channels, size, size + 3, dtype=torch.float64)
    step_graph = captured(step_of(model), x)
    for rewrite in (SelectOutputs(), NarrowOutputs(), dgrad_as_convolution):
        rewrite.run(step_graph)
    return step_graph


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 2, 3), (3, 1, 1), (4, 4, 0), (5, 3, 2)])
def test_equals_the_transposed_convolution(
    measured: list[tuple[Tensor, Tensor]], channels: int, kernel: int, stride: int, padding: int
):
    graph = attacked(kernel, channels=channels, stride=stride, padding=padding)
    before = count_flops(graph)
    applied = apply(blocked_image_gradients, graph)  # evaluates both graphs and compares
    assert len(applied.result.narrowed) == 1
    assert count_flops(graph) == before  # of what is asked for, not of what zeros are multiplied with
    transposed = [node for node in find(graph, aten.convolution.default) if node.args[6]]
    assert len(transposed) == 1  # of the convolution behind the first
    HoistInvariants().run(graph)
    assert find(graph, subpixel_weight)[0] not in hoisted_values(graph)  # but the copy of it in another order
    (candidate, baseline) = measured[0]
    assert baseline.shape[1] == channels
    assert candidate.shape[1] >= 9 * channels


def test_what_is_not_faster_stays(measured: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "is_faster", lambda *arguments: False)
    assert not apply(blocked_image_gradients, attacked(7, padding=3)).changed


def test_many_channels_stay(measured: list[tuple[Tensor, Tensor]]):
    assert not apply(blocked_image_gradients, attacked(7, channels=5, padding=3)).changed
    assert not measured


def test_a_cpu_is_left_to_packed_weights():
    assert not apply(blocked_image_gradients, attacked(7, padding=3)).changed


def test_comes_before_weights_are_converted():
    names = [step.name for step in PIPELINE]
    assert names.index(blocked_image_gradients.name) < names.index(channels_last_weights.name)
