"""What is done on a GPU only, on a CPU that is taken for one; no test here knows what CUDA itself does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import interpret, interpreted, relative_error, step_by_autograd_grad
from test_freshness import NOTICED, UNSEEN, Network, Subject, When, check, refreshes, restore
from test_freshness import images as larger_images
from tiny import images, network
from torch import Tensor, fx

import gradprune
from gradprune.compiler import devices
from gradprune.compiler.devices import Later, out_of_cuda_graphs
from gradprune.compiler.hoisted_step import HoistedStep, _steps
from gradprune.runtime import query
from gradprune.runtime.query import Runtime
from gradprune.torch_compat.inductor import inductor_config

PACKING = ("prepack-convolutions", "prepack-linears", "winograd-convolutions")
"""Passes that run on a CPU only."""


@pytest.fixture(autouse=True)
def independent(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "compiled" not in request.fixturenames:
        torch._dynamo.reset()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in which order: comparisons begin, steps begin, and their outcome is waited for."""
    events: list[str] = []
    begin, wait, call = Later.__init__, Later.are_equal, HoistedStep.__call__

    def began(later: Later, differs: Tensor) -> None:
        events.append("compare")
        begin(later, differs)

    def waited(later: Later) -> bool:
        events.append("wait")
        return wait(later)

    def called(step: HoistedStep, args: list[Any]) -> Any:
        if not hasattr(step._step, "is_told"):
            run = step._step

            def told(args: list[Any]) -> Any:
                events.append("step")
                return run(args)

            told.is_told = True  # type: ignore[attr-defined]
            step._step = told
        return call(step, args)

    monkeypatch.setattr(Later, "__init__", began)
    monkeypatch.setattr(Later, "are_equal", waited)
    monkeypatch.setattr(HoistedStep, "__call__", called)
    return events


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class Recorded:
    """A graph whose outputs are in the same memory at every call, which is overwritten before inputs are read."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> None:
        self.run = interpret(gm, inputs, **kwargs)
        self.memory: list[Any] = []

    def __call__(self, args: list[Any]) -> Any:
        for value in self.memory:
            if isinstance(value, Tensor) and value.is_floating_point():
                value.fill_(torch.nan)
        outputs = self.run(args)
        self.memory = [output for output in outputs if isinstance(output, Tensor)]
        return outputs

    _boxed_call = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph = functools.partial(gradprune.backend.compile_graph, inner_compile=Recorded)
    monkeypatch.setattr(gradprune.backend, "compile_graph", compile_graph)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("disable", [(), ("hoist-invariants",)], ids=["divided", "whole"])
def test_outputs_of_a_step_outlive_the_next_call(disable: tuple[str, ...]):
    model = network()
    eager = step_by_autograd_grad(model, F.cross_entropy)
    options = {"mode": "reduce-overhead", "disable": disable, "strict": True}
    step = torch.compile(step_by_autograd_grad(model, F.cross_entropy), backend="gradprune", options=options)
    x_adv, x, y = images()
    for _ in range(3):
        expected = eager(x_adv, x, y)
        x_adv, gradient = step(x_adv, x, y)
        assert relative_error(gradient, expected[1]) < 1e-4
        assert relative_error(x_adv, expected[0]) < 1e-4


def test_copies_share_what_outputs_share():
    memory, given = torch.rand(4, 4), torch.rand(2)
    call = out_of_cuda_graphs(lambda args: [memory, memory.t()[1:], None, given, 3])
    whole, part, nothing, same, number = call([given])
    assert (nothing, number) == (None, 3)
    assert same is given
    assert torch.equal(whole, memory)
    assert torch.equal(part, memory.t()[1:])
    memory.zero_()
    assert whole.all()
    whole.zero_()
    assert not part.any()


def test_nothing_is_copied_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch):
    """Torch says so on a CPU, whatever the mode."""
    monkeypatch.setattr("gradprune.compiler.lower.out_of_cuda_graphs", pytest.fail)
    step = torch.compile(
        step_by_autograd_grad(network(), F.cross_entropy), backend="gradprune", options={"mode": "reduce-overhead"}
    )
    step(*images())


# --- Freshness --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_once() -> Iterator[Subject]:
    with interpreted():
        subject = Subject(Network(), disable=PACKING)
        subject.step(*larger_images())
        yield subject
    torch._dynamo.reset()


@pytest.fixture
def compiled(compiled_once: Subject, on_gpu: None) -> Iterator[Subject]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield compiled_once
    restore(compiled_once.model)


@pytest.mark.parametrize("when", ["within an attack", "between attacks"])
@pytest.mark.parametrize("route", NOTICED)
def test_change_is_noticed(compiled: Subject, route: str, when: When):
    check(compiled, NOTICED[route], when)


@pytest.mark.parametrize("route", UNSEEN)
def test_unseen_change_between_attacks(compiled: Subject, route: str):
    check(compiled, UNSEEN[route], "between attacks")


def gradient_only(model: torch.nn.Module) -> Any:
    step = step_by_autograd_grad(model, F.cross_entropy)
    return lambda x_adv, x, y: (x_adv, step(x_adv, x, y)[1])


@pytest.fixture
def gradients(on_gpu: None) -> Iterator[Subject]:
    """A step that returns no iterate, so that weights are compared at every call."""
    with interpreted():
        yield Subject(Network(), gradient_only, disable=PACKING, check="never")


def test_parameters_are_copied_when_their_values_are_needed_again(gradients: Subject):
    before = refreshes()
    for expected in (1, 2, 2, 2):
        gradients(*larger_images())
        assert refreshes() - before == expected


def test_parameters_that_change_are_not_copied(gradients: Subject):
    before, known = refreshes(), set(_steps)
    gradients(*larger_images())
    (step,) = set(_steps) - known
    for _ in range(3):
        NOTICED["SGD foreach"](gradients.model)
        gradients(*larger_images())
    assert refreshes() - before == 4
    assert step._copies is not None
    assert sum(copy is not None for copy in step._copies) == 2  # the statistics of batch norm


def test_step_begins_before_the_outcome_is_known(gradients: Subject, waits: list[str]):
    for _ in range(3):
        gradients(*larger_images())
    waits.clear()
    gradients(*larger_images())
    assert waits == ["compare", "step", "wait"]


@pytest.mark.parametrize("route", ["data", "numpy", "update of data"])
def test_step_begins_again_if_a_weight_has_changed(gradients: Subject, waits: list[str], route: str):
    for _ in range(3):
        gradients(*larger_images())
    UNSEEN[route](gradients.model)
    waits.clear()
    gradients(*larger_images())
    assert waits == ["compare", "step", "wait", "step"]


def test_one_wait_within_an_attack(compiled: Subject, waits: list[str]):
    x_adv, x, y = larger_images()
    x_adv, _ = compiled(x_adv, x, y)
    waits.clear()
    compiled.reuses(x_adv, x, y)
    assert waits == ["compare", "step", "wait"]
    waits.clear()
    NOTICED["forward pass in training mode"](compiled.model)
    compiled(x_adv, x, y)


def test_what_must_not_run_twice_waits_first(on_gpu: None, waits: list[str]):
    model, total = network(), torch.zeros(())

    def step(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        total.add_(1)
        return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]

    with interpreted():
        compiled = torch.compile(step, backend="gradprune", options={"disable": PACKING, "check": "never"})
        _, x, y = images()
        for _ in range(3):
            compiled(x, y)
        waits.clear()
        model[0].weight.data.mul_(2)
        actual = compiled(x, y)
    assert waits == ["compare", "wait", "step"]
    assert total == 4
    assert relative_error(actual, step(x, y)) < 1e-4


def test_comparison_of_all_types():
    ours = [torch.rand(3), torch.rand(3).half(), torch.rand(2).double(), torch.arange(3), torch.tensor([True])]
    copies = [one.clone() for one in ours]
    assert devices.compare(ours, copies).are_equal()
    for position, value in enumerate([torch.nan, 2, 1e-300, 7, False]):
        changed = list(copies)
        changed[position] = copies[position].clone()
        changed[position][0] = value if value != 1e-300 else copies[position][0] * (1 + 1e-15)
        assert not devices.compare(ours, changed).are_equal()
    eighth = [torch.ones(2).to(torch.float8_e4m3fn), torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)]
    assert devices.compare(eighth, eighth).are_equal()
    assert not devices.compare(eighth, eighth[::-1]).are_equal()


# --- The prologue -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("compile", [True, False])
def test_values_are_written_to_the_memory_of_the_last_ones(compile: bool):
    known = set(_steps)
    with contextlib.nullcontext() if compile else interpreted():
        subject = Subject(Network(), gradient_only, disable=PACKING)
        subject(*larger_images())
    (step,) = set(_steps) - known
    assert step._values
    addresses = [value.data_ptr() for value in step._values]
    NOTICED["SGD foreach"](subject.model)
    subject(*larger_images())
    assert [value.data_ptr() for value in step._values] == addresses


@pytest.mark.usefixtures("on_gpu")
def test_values_that_a_forward_pass_saved_are_not_overwritten():
    model = network()
    compiled = torch.compile(model, backend="gradprune", options={"disable": PACKING, "strict": True})
    _, x, y = images()
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    expected, x.grad = x.grad, None
    loss = F.cross_entropy(compiled(x), y)
    with torch.no_grad():
        model[0].weight.mul_(2)
        compiled(x)
    loss.backward()
    assert expected is not None
    assert x.grad is not None
    assert relative_error(x.grad, expected) < 1e-4


@pytest.mark.usefixtures("on_gpu")
def test_prologue_that_cannot_be_compiled_is_interpreted(monkeypatch: pytest.MonkeyPatch):
    def inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        if gm.graph.find_nodes(op="placeholder")[-1].name.startswith("value_"):
            raise RuntimeError("no kernel")
        return interpret(gm, inputs, **kwargs)

    compile_graph = functools.partial(gradprune.backend.compile_graph, inner_compile=inner_compile)
    monkeypatch.setattr(gradprune.backend, "compile_graph", compile_graph)
    subject = Subject(Network(), disable=PACKING, strict=False)
    subject(*larger_images())
    (report,) = gradprune.reports(subject.step)
    assert report.fallback_kind == "prologue not compiled"
    assert "no kernel" in str(report.fallback)


@pytest.mark.usefixtures("on_gpu")
def test_layout_is_asserted_where_nothing_is_packed(monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []

    def inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        seen.append(inductor_config.size_asserts and inductor_config.alignment_asserts)
        return interpret(gm, inputs, **kwargs)

    compile_graph = functools.partial(gradprune.backend.compile_graph, inner_compile=inner_compile)
    monkeypatch.setattr(gradprune.backend, "compile_graph", compile_graph)
    Subject(Network(), disable=PACKING)(*larger_images())
    assert seen == [True, True]  # the prologue and the step
    torch._dynamo.reset()
    monkeypatch.setattr(devices, "on_gpu", lambda tensor: False)
    Subject(Network())(*larger_images())
    assert seen == [True, True, False]


# --- Streams ----------------------------------------------------------------------------------------------------------


class FakeStream:
    """Notes what it waits for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waits: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waits.append(other.name)

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.waits.append(event)


class Held:
    """A tensor on a GPU that knows which streams use it."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.streams: list[str] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.streams.append(stream.name)


def test_streams_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, second, held = FakeStream("first"), FakeStream("second"), Held()
    order = devices.StreamOrder(held.device)

    def on(stream: FakeStream) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    on(first)
    order.before_making()
    order.made()
    order.before_use([held])  # type: ignore[list-item]
    assert first.waits == []
    on(second)
    for _ in range(2):
        order.before_use([held])  # type: ignore[list-item]
    assert second.waits == ["event of first"]
    assert held.streams == ["second"]
    on(first)
    order.before_making()
    order.made()
    assert first.waits == ["second"]
    on(second)
    order.before_making()
    order.made()
    assert second.waits == ["event of first", "first"]


def test_recording_waits_for_nothing_outside_of_it(monkeypatch: pytest.MonkeyPatch):
    first, second = FakeStream("first"), FakeStream("second")
    order = devices.StreamOrder(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    order.made()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: second)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    order.before_use([])
    assert second.waits == []


def test_step_keeps_the_order(monkeypatch: pytest.MonkeyPatch, on_gpu: None):
    events: list[str] = []

    class Order:
        def before_making(self) -> None:
            events.append("before making")

        def made(self) -> None:
            events.append("made")

        def before_use(self, tensors: Sequence[Tensor]) -> None:
            events.append("before use")

    monkeypatch.setattr(devices, "stream_orders", lambda values: [Order()])
    with interpreted():
        subject = Subject(Network(), disable=PACKING, check="never")
        x_adv, x, y = larger_images()
        x_adv, _ = subject(x_adv, x, y)
        assert events == ["before use", "before making", "made"]
        subject(x_adv, x, y)
    assert events == ["before use", "before making", "made", "before use"]


# --- Precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_without_instructions_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(query, "computes_in_bfloat16", lambda device: False)
    query._warn_of_bfloat16.cache_clear()
    _, x, _ = images()
    for autocast in (torch.float16, None, torch.bfloat16, torch.bfloat16):
        with Runtime(compile=False, autocast=autocast).attack(network(), x):
            pass
    query._warn_of_bfloat16.cache_clear()
    assert [record.levelname for record in caplog.records if "bfloat16" in record.message] == ["WARNING"]


def test_bfloat16_is_asked_for_on_the_device_that_is_used(monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert devices.computes_in_bfloat16(torch.device("cpu"))
    assert not devices.computes_in_bfloat16(torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]
