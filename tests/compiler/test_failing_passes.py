"""A pass that fails, or corrupts the graph: by default the result is eager's and the report says why."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState, in_one_piece, interpret
from tiny import STEPS, backward_step, images, input_gradient, network
from torch import fx

import gradprune
from gradprune import backend
from gradprune.compiler import lower, pruning
from gradprune.compiler.lower import compile_graph
from gradprune.graph.step_graph import OutputRole, StepGraph
from gradprune.inspect.observe import Observer
from gradprune.passes.base import PassResult
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.report import figures
from gradprune.report.recorder import Recorder

pytestmark = [pytest.mark.usefixtures("no_code"), in_one_piece]


def fails(self: object, step_graph: StepGraph) -> Any:
    raise KeyError("boom")


def fails_halfway(self: object, step_graph: StepGraph) -> Any:
    """Leaves a ruin behind: no outputs, half of the nodes gone, no values."""
    step_graph.set_output_values([None] * len(step_graph.outputs))
    for node in list(reversed(step_graph.graph.nodes))[1:20]:
        if not node.users and node.op == "call_function":
            step_graph.graph.erase_node(node)
    for node in step_graph.graph.nodes:
        node.meta.clear()
    raise KeyError("boom")


def corrupts(self: object, step_graph: StepGraph) -> Any:
    """Returns the input in place of its gradient: well-formed, of the right shape, and wrong."""
    values, roles = step_graph.output_values(), step_graph.outputs
    for position, (value, role) in enumerate(zip(values, roles, strict=True)):
        if isinstance(value, fx.Node) and role is not OutputRole.WEIGHT_GRAD and value.meta["val"].dim() == 4:
            with step_graph.graph.inserting_after(value):
                total = step_graph.graph.call_function(torch.ops.aten.sum.default, (value,))
            total.meta["val"] = value.meta["val"].sum()
            values[position] = total
    step_graph.set_output_values(values)
    return PassResult()


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "fails": (fails, r"pass 'dgrad-as-convolution' failed: KeyError\('boom'\)"),
    "fails halfway": (fails_halfway, r"pass 'dgrad-as-convolution' failed: KeyError\('boom'\)"),
    "corrupts": (corrupts, r"pass 'dgrad-as-convolution' left an invalid graph: output \d was"),
}


@pytest.fixture(params=BROKEN)
def message(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pass in the middle of the pipeline is broken; what is said about it."""
    broken, message = BROKEN[request.param]
    monkeypatch.setattr(type(dgrad_as_convolution), "run", broken)
    return message


def one_warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = (record for record in caplog.records if record.name.startswith("gradprune"))
    assert record.levelno == logging.WARNING
    return record.getMessage()


@pytest.mark.parametrize("way", STEPS)
def test_step_falls_back(way: str, message: str, caplog: pytest.LogCaptureFixture):
    model = network()
    step = STEPS[way](model, F.cross_entropy)
    expected = step(*images())
    model.zero_grad()
    state = ModelState.of(model)
    compiled = gradprune.compile(step, verify=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(*images()), expected)
    state.assert_untouched(model)
    (report,) = gradprune.reports(compiled)
    assert report.fallback is not None
    assert re.search(message, report.fallback)
    assert re.search(message, one_warning(caplog))
    assert [record.name for record in report.passes] == ["fold-batch-norm"]  # which came before autograd
    assert "compiled as captured" in str(report)


def test_model_falls_back(message: str, caplog: pytest.LogCaptureFixture):
    model, (_, x, y) = network(), images()
    expected = input_gradient(model, x, y)
    model.zero_grad()
    state = ModelState.of(model)
    compiled = gradprune.compile(model, verify=True)
    torch.testing.assert_close(input_gradient(compiled, x, y), expected)
    state.assert_untouched(model)
    assert re.search(message, one_warning(caplog))
    (report,) = gradprune.reports(compiled)
    assert re.search(message, report.fallback or "")


@pytest.mark.parametrize("form", ["step", "model"])
def test_strict_raises(form: str, message: str):
    model, (x_adv, x, y) = network(), images()
    options = {"strict": True, "verify": True}
    step, compiled_model = gradprune.compile(backward_step(model), **options), gradprune.compile(model, **options)
    state = ModelState.of(model)
    with pytest.raises(gradprune.PassError, match=message):
        step(x_adv, x, y) if form == "step" else input_gradient(compiled_model, x, y)
    state.assert_untouched(model)


def test_graph_that_cannot_be_classified(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fails(gm: fx.GraphModule, **settings: Any) -> Any:
        for node in list(gm.graph.nodes)[::-1]:
            if not node.users and node.op != "placeholder":
                gm.graph.erase_node(node)
        raise KeyError("boom")

    monkeypatch.setattr(lower, "capture", fails)
    expected = backward_step(network())(*images())
    compiled = gradprune.compile(backward_step(network()))
    torch.testing.assert_close(compiled(*images()), expected)
    assert "could not be classified: KeyError('boom')" in (gradprune.reports(compiled)[0].fallback or "")
    assert "compiled as captured: the captured graph could not be classified" in one_warning(caplog)
    with pytest.raises(gradprune.PassError, match=r"could not be classified: KeyError\('boom'\)"):
        gradprune.compile(backward_step(network()), strict=True)(*images())


STAGES = {
    "step": [
        (lower, "_run_passes_before_autograd"),
        (lower, "HoistedStep"),
        (pruning, "written_inputs"),
        (pruning, "unrepeatable"),
        (pruning, "_strides_of_gradients"),
        (pruning, "build_step_graph"),
        (pruning, "mark_backward"),
        (pruning, "run_passes"),
        (pruning, "split"),
    ],
    "model": [
        (lower, "_run_passes_before_autograd"),
        (lower, "HoistedStep"),
        (lower, "forward_of"),
        (pruning, "written_inputs"),
        (pruning, "unrepeatable"),
        (pruning, "_strides_of_gradients"),
        (pruning, "build_step_graph"),
        (pruning, "run_passes"),
        (pruning, "save_what_is_overwritten"),
        (pruning, "split"),
    ],
}


@pytest.mark.parametrize(
    ("form", "module", "stage"), [(form, *stage) for form, stages in STAGES.items() for stage in stages]
)
def test_a_stage_that_fails(
    form: str, module: Any, stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Whichever it is: the results are eager's, no weight receives a gradient, the reason is said."""

    def fails(*about: Any, **settings: Any) -> Any:
        raise KeyError("boom")

    model, (x_adv, x, y) = network(), images()
    expected = input_gradient(model, x, y) if form == "model" else backward_step(model)(x_adv, x, y)
    model.zero_grad()
    state = ModelState.of(model)
    monkeypatch.setattr(module, stage, fails)
    compiled = gradprune.compile(model if form == "model" else backward_step(model))
    for _ in range(2):
        result = input_gradient(compiled, x, y) if form == "model" else compiled(x_adv, x, y)
        torch.testing.assert_close(result, expected)
    state.assert_untouched(model)
    (report,) = gradprune.reports(compiled)
    assert "boom" in (report.fallback or "")
    said = [record.getMessage() for record in caplog.records if record.name.startswith("gradprune")]
    assert said
    assert all("boom" in one for one in said)


def step_report(**options: Any) -> tuple[Any, gradprune.Report]:
    compiled = gradprune.compile(backward_step(network()), **options)
    results = compiled(*images())
    (report,) = gradprune.reports(compiled)
    return results, report


@pytest.mark.parametrize("event", ["captured", "classified", "traced", "passed", "pruned", "split", "finished"])
@pytest.mark.parametrize("listener", [Recorder, Observer])
def test_a_listener_that_raises_changes_nothing(
    listener: type, event: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    """Neither the graphs that are compiled nor what they compute; all that comes of it is a warning."""
    graphs: list[str] = []

    def record(gm: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        graphs.append(str(gm.graph))
        return interpret(gm, inputs, **settings)

    monkeypatch.setattr(backend, "compile_graph", functools.partial(compile_graph, inner_compile=record))
    options = {"strict": True, "dump": str(tmp_path)}
    expected, report = step_report(**options)
    assert report.fallback is None
    torch._dynamo.reset()

    def fails(self: object, *about: object) -> None:
        raise KeyError("boom")

    monkeypatch.setattr(listener, event, fails)
    results, report = step_report(**options)
    assert report.fallback is None
    assert graphs[0] == graphs[1]
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    assert "boom" in one_warning(caplog)


def test_a_figure_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fails(step_graph: StepGraph) -> Any:
        raise KeyError("boom")

    monkeypatch.setattr(figures, "count_flops", fails)
    results, report = step_report(strict=True)
    torch.testing.assert_close(results, backward_step(network())(*images()))
    assert report.fallback is None
    assert (report.flops, report.ops) == ({}, {})
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("gradprune")]
    assert len(warnings) == 2
    assert all("are missing in a report" in warning for warning in warnings)
    assert "hoist-invariants" in str(report)


# --- What torch no longer notes ---------------------------------------------------------------------------------------


def without(key: str, *ops: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Takes something from what is noted on nodes, before passes see the graph."""

    def lose(monkeypatch: pytest.MonkeyPatch) -> None:
        original = pruning.PruningPass.__call__

        def call(self: pruning.PruningPass, graph: fx.Graph) -> None:
            for node in graph.nodes:
                if not ops or node.op in ops:
                    node.meta.pop(key, None)
            original(self, graph)

        monkeypatch.setattr(pruning.PruningPass, "__call__", call)

    return lose


def without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    original = lower.compile_graph

    def compile_graph(gm: fx.GraphModule, *args: Any, **options: Any) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            node._dynamo_source = None
        return original(gm, *args, inner_compile=interpret, **options)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)


@pytest.mark.parametrize(
    ("lose", "named", "kind"),
    [
        (without("desc"), "'desc'", "compiled as captured"),
        (without("desc", "placeholder"), "'desc'", "passes failed, compiled as captured"),
        (without_sources, "'_dynamo_source'", "compiled as captured"),
        (without("from_node"), "'from_node'", "passes failed, compiled as captured"),
    ],
)
def test_lost_information_is_named(
    lose: Callable[[pytest.MonkeyPatch], None],
    named: str,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    expected = backward_step(network())(*images())
    lose(monkeypatch)
    results, report = step_report()
    torch.testing.assert_close(results, expected)
    assert named in (report.fallback or "")
    assert report.fallback_kind == kind
    assert f"{kind}: " in str(report)
    assert named in one_warning(caplog)
    torch._dynamo.reset()
    with pytest.raises(gradprune.PassError, match=named):
        step_report(strict=True)
