"""Random networks: pruning changes no number, leaves no weight gradient and nothing dead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import SHIPPED_WORTH_FLOPS, interpret
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_networks import Network, networks, wide_networks
from torch import fx, nn

import gradprune
from gradprune import Options, Report
from gradprune.compiler import pruning
from gradprune.compiler.lower import compile_graph
from gradprune.graph.step_graph import StepGraph
from gradprune.ops import winograd
from gradprune.passes import prepack_convolutions, winograd_convolutions
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


# --- In float32, by kernels of their own ------------------------------------------------------------------------------


def errors_in_float32(network: Network, way: str, compiled: Callable[[Any], Any]) -> tuple[float, float]:
    """Distance to float64 of the compiled and of the eager gradient in float32, in the Euclidean norm."""
    exact = STEPS[way](copy.deepcopy(network.module), network.input(seed=1))[0]
    module, x = copy.deepcopy(network.module).float(), network.input(seed=1).float()
    eager = STEPS[way](copy.deepcopy(module), x)[0]
    ours = compiled(lambda x: STEPS[way](module, x)[0])(x)
    assert all(parameter.grad is None for parameter in module.parameters())
    return tuple(float((value.double() - exact).norm() / (exact.norm() + 1e-30)) for value in (ours, eager))  # type: ignore[return-value]


def no_further_than_eager(errors: list[tuple[float, float]]) -> bool:
    """Most are as close to float64 as eager is; an input that rounds across a kink may throw either off."""
    return sum(ours <= 4 * eager + 1e-5 for ours, eager in errors) >= 0.85 * len(errors)


def collect(strategy: Any, examples: int, compiled: Callable[[Any], Any]) -> list[tuple[float, float]]:
    errors: list[tuple[float, float]] = []

    @settings(PROFILE, max_examples=examples)
    @given(strategy, st.sampled_from(sorted(STEPS)))
    def each(network: Network, way: str) -> None:
        assume(way != "func.grad" or not network.writes_buffers)
        torch._dynamo.reset()
        errors.append(errors_in_float32(network, way, compiled))

    each()
    return errors


def compiled_strictly(step: Any) -> Any:
    return gradprune.compile(step, strict=True, verify=True)


@pytest.mark.usefixtures("no_code")
def test_float32_is_no_further_from_float64_than_eager_is():
    """With packed weights, as far as this processor has them: in float64 nothing is packed."""
    assert no_further_than_eager(collect(networks(), 24, compiled_strictly))


@pytest.mark.inductor
def test_compiled_by_inductor():
    assert no_further_than_eager(collect(networks(), 6, compiled_strictly))


@pytest.mark.inductor
@pytest.mark.parametrize("kernel", ["winograd", "packed", "as shipped"])
def test_wide_networks(kernel: str, monkeypatch: pytest.MonkeyPatch):
    """Each kernel forced in turn, and then whatever the shipped thresholds and this machine's timings choose."""
    if kernel == "as shipped":
        monkeypatch.setattr(prepack_convolutions, "WORTH_FLOPS", SHIPPED_WORTH_FLOPS)
    else:
        monkeypatch.setattr(winograd_convolutions, "_is_worth_it", lambda convolution: kernel == "winograd")
    names = set()

    def compiled(step: Any) -> Any:
        fast = compiled_strictly(step)

        def run(x: torch.Tensor) -> torch.Tensor:
            gradient = fast(x)
            names.update(change.operator for report in gradprune.reports(fast) for change in report.hoisted)
            return gradient

        return run

    assert no_further_than_eager(collect(wide_networks(), 5, compiled))
    if kernel == "winograd" and winograd.is_available():
        assert "gradprune.winograd_weight" in names
    if kernel == "packed" and torch.backends.mkldnn.is_available():
        assert "gradprune.pack_convolution" in names
        assert "gradprune.winograd_weight" not in names


def test_the_oracle_sees_dead_nodes():
    graph = fx.Graph()
    x = graph.placeholder("x")
    dead = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output((x,))
    with pytest.raises(AssertionError):
        Compiler.assert_all_alive(graph)
    graph.erase_node(dead)
    Compiler.assert_all_alive(graph)
