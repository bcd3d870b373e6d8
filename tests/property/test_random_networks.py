"""Random networks: pruning changes no number, leaves no weight gradient and nothing dead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import interpret
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_networks import Network, networks
from torch import fx, nn

from gradprune import Options, Report
from gradprune.compiler import pruning
from gradprune.compiler.lower import compile_graph
from gradprune.graph.step_graph import StepGraph
from gradprune.passes.pipeline import run_passes
from gradprune.report.recorder import Recorder
from gradprune.torch_compat import dynamo

Result = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[nn.Module, torch.Tensor], Result]


def by_backward(model: nn.Module, x: torch.Tensor) -> Result:
    x = x.detach().requires_grad_(True)
    loss = model(x).square().mean()
    loss.backward()
    return x.grad, loss.detach()


def by_autograd_grad(model: nn.Module, x: torch.Tensor) -> Result:
    x = x.detach().requires_grad_(True)
    loss = model(x).square().mean()
    return torch.autograd.grad(loss, x)[0], loss.detach()


def by_func_grad(model: nn.Module, x: torch.Tensor) -> Result:
    return torch.func.grad_and_value(lambda z: model(z).square().mean())(x)


STEPS: dict[str, Step] = {"backward": by_backward, "autograd.grad": by_autograd_grad, "func.grad": by_func_grad}


class Compiler:
    """The backend with every check on and an inner compiler that interprets; keeps reports and final graphs."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.graphs: list[StepGraph] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        options = Options(strict=True, verify=True)
        recorder = Recorder()
        with mock.patch.object(pruning, "run_passes", self._run_passes):
            compiled = compile_graph(gm, example_inputs, options, [recorder], inner_compile=interpret)
        self.reports.append(recorder.report)
        return compiled

    def _run_passes(self, step_graph: StepGraph, *args: Any, **kwargs: Any) -> Any:
        records = run_passes(step_graph, *args, **kwargs)
        self.graphs.append(step_graph)
        self.assert_all_alive(step_graph.graph)
        return records

    @staticmethod
    def assert_all_alive(graph: fx.Graph) -> None:
        """Every operator that may be erased has an output that depends on it."""
        alive = {graph.output_node()}
        for node in reversed(graph.nodes):
            if node in alive or (node.op == "call_function" and _has_an_effect(node)):
                alive.add(node)
                alive.update(node.all_input_nodes)
        dead = [node for node in graph.nodes if node.op not in ("placeholder", "output") and node not in alive]
        assert dead == []


def _has_an_effect(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def compiled_by(compiler: Compiler, run: Callable[..., Any], *args: Any) -> Any:
    torch._dynamo.reset()
    for flag in dynamo.TRACED_FLAGS:
        dynamo.scope_to_backend(flag, compiler)
    try:
        return torch.compile(run, backend=compiler, fullgraph=True)(*args)
    finally:
        for flag in dynamo.TRACED_FLAGS:
            dynamo.forget_backend(flag, compiler)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 1e-12 of the largest element, which itself may be zero but for rounding."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale + 1e-16)


def check(network: Network, compiler: Compiler, eager: nn.Module, actual: Result, expected: Result) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)
    assert all(parameter.grad is None for parameter in network.module.parameters())
    for one, other in zip(network.module.buffers(), eager.buffers(), strict=True):
        assert_equal(one.double(), other.double())
    (report,) = compiler.reports
    assert report.fallback is None
    assert report.flops["after"]["weight_grad"] == 0
    assert report.flops["after"]["input_grad"] == report.flops["before"]["input_grad"]
    assert len(compiler.graphs) == 1


PROFILE = settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # no shrinking: every example is a compilation
    suppress_health_check=list(HealthCheck),
)


@PROFILE
@given(networks(), st.sampled_from(sorted(STEPS)))
def test_step(network: Network, way: str):
    assume(way != "func.grad" or not network.writes_buffers)  # torch.func.grad refuses to
    compiler, x = Compiler(), network.input(seed=1)
    eager = copy.deepcopy(network.module)
    expected = STEPS[way](eager, x)
    actual = compiled_by(compiler, STEPS[way], network.module, x)
    check(network, compiler, eager, actual, expected)


@PROFILE
@given(networks())
def test_model(network: Network):
    compiler, eager = Compiler(), copy.deepcopy(network.module)

    def attack(model: Callable[[torch.Tensor], torch.Tensor]) -> Result:
        x = network.input(seed=1).requires_grad_(True)
        loss = model(x).square().mean()
        loss.backward()
        return x.grad, loss.detach()

    expected = attack(eager)
    torch._dynamo.reset()
    actual = attack(torch.compile(network.module, backend=compiler, fullgraph=True))
    check(network, compiler, eager, actual, expected)


def test_the_oracle_sees_dead_nodes():
    graph = fx.Graph()
    x = graph.placeholder("x")
    dead = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output((x,))
    with pytest.raises(AssertionError):
        Compiler.assert_all_alive(graph)
    graph.erase_node(dead)
    Compiler.assert_all_alive(graph)
