"""What was compiled is compared with eager at its first call: faults are found, rounding is not taken for one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import in_one_piece
from tiny import backward_step, images, input_gradient, network
from torch import Tensor, fx, nn

import gradprune
from gradprune.compiler import first_call, lower, pruning
from gradprune.passes.pipeline import PASS_NAMES, PassRecord

pytestmark = [pytest.mark.usefixtures("no_code"), in_one_piece]

aten = torch.ops.aten

WRONG = "is not what the captured graph computes"


def compiled_step(model: nn.Module, **options: Any) -> Any:
    return torch.compile(backward_step(model), backend="gradprune", options={"check": "first", **options})


def outcome(compiled: Any) -> str:
    (report,) = gradprune.reports(compiled)
    return report.check


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record for record in caplog.records if record.name.startswith("gradprune")]
    return [record.getMessage() for record in found if record.levelno >= logging.WARNING]


# --- Faults -----------------------------------------------------------------------------------------------------------


def replaced(node: fx.Node, target: Any, *others: Any) -> None:
    """Have everything that reads a node read a function of it instead."""
    with node.graph.inserting_after(node):
        changed = node.graph.call_function(target, (node, *others))
    changed.meta = {**node.meta, "val": node.meta["val"].clone()}
    node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)


def of_shape(graph: fx.Graph, *shape: int) -> fx.Node:
    """The first input of a shape that is read."""
    return next(node for node in graph.find_nodes(op="placeholder") if node.users and node.meta["val"].shape == shape)


def sign(graph: fx.Graph) -> None:
    """The gradient points the other way."""
    returned = [value for value in graph.output_node().args[0] if isinstance(value, fx.Node)]  # type: ignore[union-attr]
    replaced([value for value in returned if value.meta["val"].shape == (2, 3, 4, 4)][-1], aten.neg.default)


def mask(graph: fx.Graph) -> None:
    """The gradient passes where it should not."""
    for node in graph.nodes:
        if node.target is aten.le.Scalar:
            node.target = aten.ge.Scalar
        elif node.target is aten.relu.default:
            node.target = aten.neg.default
            return


def stale_weight(graph: fx.Graph) -> None:
    """A weight as it was before an update."""
    replaced(of_shape(graph, 4, 3, 3, 3), aten.mul.Tensor, 0.8)


def dropped_bias(graph: fx.Graph) -> None:
    replaced(of_shape(graph, 5), aten.mul.Tensor, 0)


FAULTS = {fault.__name__: fault for fault in (sign, mask, stale_weight, dropped_bias)}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[fx.Graph], None]], None]:
    """Call it with a pass and a fault, and the pass makes it from then on."""

    def plant(name: str, fault: Callable[[fx.Graph], None]) -> None:
        original = pruning.run_passes

        def run_passes(graph: Any, passes: Any, *, observe: Callable[[PassRecord], None], **options: Any) -> Any:
            def and_fail(record: PassRecord) -> None:
                observe(record)
                if record.name == name:
                    fault(graph.graph)

            return original(graph, passes, observe=and_fail, **options)

        monkeypatch.setattr(pruning, "run_passes", run_passes)

    return plant


LATE = PASS_NAMES[1:]
CASES = [*((name, "sign") for name in LATE), *(("shape-only-operands", fault) for fault in FAULTS if fault != "sign")]


@pytest.mark.parametrize("form", ["step", "model"])
@pytest.mark.parametrize(("name", "fault"), CASES)
def test_faults_are_found(name: str, fault: str, form: str, plant: Any, caplog: pytest.LogCaptureFixture):
    model, (x_adv, x, y) = network(), images()
    plant(name, FAULTS[fault])
    compiled = compiled_step(model) if form == "step" else gradprune.accelerate(model, check="first")
    for start in (x_adv, x.clone()):
        if form == "step":
            torch.testing.assert_close(compiled(start, x, y), backward_step(network())(start, x, y))
        else:
            torch.testing.assert_close(input_gradient(compiled, start, y), input_gradient(network(), start, y))
    (report,) = gradprune.reports(compiled)
    (message,) = warnings_of(caplog)
    assert WRONG in report.check
    assert report.fallback_kind == "computed wrongly, runs eagerly"
    assert WRONG in str(report)
    assert WRONG in message
    assert all(parameter.grad is None for parameter in model.parameters())
    torch._dynamo.reset()
    with pytest.raises(gradprune.PassError, match=WRONG):
        compiled_step(model, strict=True)(x_adv, x, y)


def test_folding_wrongly_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    original = lower.run_passes

    def run_passes(captured: Any, passes: Any, **options: Any) -> Any:
        records = original(captured, passes, **options)
        for node in captured.graph.find_nodes(op="call_function", target=torch.sub):
            node.target = torch.add
        for node in captured.graph.find_nodes(op="call_function", target=torch.neg):
            node.target = torch.abs
        return records

    monkeypatch.setattr(lower, "run_passes", run_passes)
    step = compiled_step(network())
    torch.testing.assert_close(step(*images()), backward_step(network())(*images()))
    assert WRONG in outcome(step)


def test_a_model_that_is_compiled_by_torch_alone_leaves_gradients_of_weights(plant: Any):
    model, (x_adv, _, y) = network(), images()
    plant("select-outputs", sign)
    compiled = torch.compile(model, backend="gradprune", options={"check": "first"})
    torch.testing.assert_close(input_gradient(compiled, x_adv, y), input_gradient(network(), x_adv, y))
    assert WRONG in outcome(compiled)
    assert all(parameter.grad is None for parameter in model.parameters())


class Centred(nn.Module):
    """A buffer that is written and then read in one pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.last((h - self.mean).tanh() * (1 + self.mean.norm()))


def test_a_buffer_that_the_backward_pass_reads_too_late_is_found(monkeypatch: pytest.MonkeyPatch):
    """Which happens unless what is overwritten is saved."""
    x, y = torch.rand(4, 12), torch.tensor([0, 1, 2, 3])
    model, eager = Centred(), Centred()
    monkeypatch.setattr(pruning, "save_what_is_overwritten", lambda graph: None)
    fast = gradprune.accelerate(model, check="first")
    for _ in range(2):
        torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(eager, x, y))
        torch.testing.assert_close(model.mean, eager.mean)
    assert WRONG in outcome(fast)


# --- No faults --------------------------------------------------------------------------------------------------------


def test_right_results(caplog: pytest.LogCaptureFixture):
    model, (x_adv, x, y) = network(), images()
    step, fast = compiled_step(model, strict=True), gradprune.accelerate(model, check="first", strict=True)
    assert gradprune.reports(step) == []
    step(x_adv, x, y)
    input_gradient(fast, x_adv, y)
    for compiled in (step, fast):
        assert outcome(compiled).startswith("compared with eager: largest difference")
        assert outcome(compiled) in str(gradprune.reports(compiled)[0])
        assert gradprune.reports(compiled)[0].to_dict()["check"] == outcome(compiled)
    assert warnings_of(caplog) == []


def test_signs_of_rounding_are_no_fault():
    """At the clean image, the gradient of the divergence from the clean prediction is nothing but rounding."""
    model, (_, x, _) = network(), images()
    target = model(x).softmax(1).detach()

    def step(x_adv: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.kl_div(model(x_adv).log_softmax(1), target, reduction="sum")
        return x_adv.detach() + 0.01 * torch.autograd.grad(loss, x_adv)[0].sign()

    compiled = torch.compile(step, backend="gradprune", options={"check": "first", "strict": True})
    compiled(x)
    assert outcome(compiled).startswith("compared")


def test_reduced_precision_is_no_fault():
    model, (x_adv, x, y) = network(), images()
    step = compiled_step(model, strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        step(x_adv, x, y)
    assert outcome(step).startswith("compared")


def test_what_is_not_finite_is_no_fault():
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        value = (x / 0.0).sum() + x.sqrt().sum()
        return value.detach(), torch.autograd.grad(value, x)[0]

    compiled = torch.compile(step, backend="gradprune", options={"check": "first", "strict": True})
    compiled(torch.tensor([-1.0, 0.0, 1.0]))
    assert outcome(compiled).startswith("compared")


def test_what_is_written_is_written_once():
    """Statistics of a norm in training mode, and a perturbation that is changed in place."""
    model, eager, (x_adv, x, y) = network(training=True), network(training=True), images()
    fast = gradprune.accelerate(model, check="first", strict=True)
    for one in (fast, eager):
        input_gradient(one, x_adv, y)
    assert outcome(fast).startswith("compared")
    for actual, expected in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)

    def step(delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        leaf = delta.detach().requires_grad_(True)
        gradient = torch.autograd.grad(F.cross_entropy(network(x + leaf), y), leaf)[0]
        delta.add_(0.1 * gradient.sign())
        return gradient

    network_ = network()
    step.__globals__["network"], kept = network_, network
    try:
        one, other = torch.zeros_like(x), torch.zeros_like(x)
        compiled = torch.compile(step, backend="gradprune", options={"check": "first", "strict": True})
        torch.testing.assert_close(compiled(one, x, y), step(other, x, y))
        torch.testing.assert_close(one, other)
    finally:
        step.__globals__["network"] = kept
    assert outcome(compiled).startswith("compared")


def test_nobody_notices(monkeypatch: pytest.MonkeyPatch):
    """Hooks of the caller's run as often as in eager, the random state stays, and nothing is kept."""
    model, (x_adv, _, y) = network(), images()
    fast, calls = gradprune.accelerate(model, check="first"), list[int]()
    x_adv = x_adv.requires_grad_(True)
    x_adv.register_hook(lambda gradient: calls.append(1))
    state = torch.get_rng_state()
    F.cross_entropy(fast(x_adv), y).backward()
    assert calls == [1]
    assert torch.equal(state, torch.get_rng_state())
    assert outcome(fast).startswith("compared")


# --- What is not compared ---------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for every comparison."""
    calls: list[int] = []
    original = first_call.FirstCall._compare
    monkeypatch.setattr(first_call.FirstCall, "_compare", lambda self, args: (calls.append(1), original(self, args))[1])
    return calls


def test_random_operators(compared: list[int]):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(48, 5))
    fast = gradprune.accelerate(model, check="first")
    input_gradient(fast, images()[0], images()[2])
    assert "random" in outcome(fast)
    model.eval()
    input_gradient(fast, images()[0], images()[2])
    assert compared == [1]


def test_attention_without_dropout_is_not_random():
    graph = fx.Graph()
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q = graph.placeholder("q")
    node = graph.call_function(operator, (q, q, q))
    graph.output((node,))
    assert first_call.unrepeatable(graph) == ""
    node.args = (q, q, q, 0.5)
    assert "random" in first_call.unrepeatable(graph)


def test_transforms_and_hooks_on_saved_tensors(compared: list[int]):
    model, (x_adv, _, y) = network(), images()
    fast = gradprune.accelerate(model, check="first")
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value):
        input_gradient(fast, x_adv, y)
    assert compared == []
    assert "hooks" in outcome(fast)


def test_options(compared: list[int]):
    model, arguments = network(), images()
    never = compiled_step(model, check="never")
    never(*arguments)
    assert (outcome(never), compared) == ("", [])
    torch._dynamo.reset()
    always = compiled_step(model, check="always")
    for count in (1, 2, 3):
        always(*arguments)
        assert len(compared) == count
    torch._dynamo.reset()
    first = compiled_step(model)
    for _ in range(3):
        first(*arguments)
    assert len(compared) == 4
    with pytest.raises(gradprune.OptionError, match="'check' must be one of auto, first, always, never"):
        gradprune.compile(lambda x: x, check="sometimes")


def test_an_eager_step_that_takes_long_beside_the_compilation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_call, "SHARE", 0.0)
    step = compiled_step(network(), check="auto")
    step(*images())
    assert "check='first'" in outcome(step)


def test_want_of_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def fails(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("the device is full")

    step = compiled_step(network(), strict=True)
    with monkeypatch.context() as patched:
        patched.setattr(first_call._Call, "run", fails)
        torch.testing.assert_close(step(*images()), backward_step(network())(*images()))
    assert "the device is full" in outcome(step)
    assert warnings_of(caplog) == []
