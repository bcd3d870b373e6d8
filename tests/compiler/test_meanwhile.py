"""The option ``background``: eager calls until another process has compiled the step, and the same step then."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import in_one_piece
from tiny import backward_step, images, input_gradient, network
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._inductor.utils import fresh_cache

import gradprune
from gradprune.attacks import PGD
from gradprune.compiler import apart, first_call, lower
from gradprune.errors import OptionError
from gradprune.passes import prepack_convolutions
from gradprune.runtime import Runtime
from gradprune.torch_compat import artifacts

pytestmark = [pytest.mark.inductor, in_one_piece]


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    with fresh_cache(), functorch_config.patch(enable_autograd_cache=True):
        yield
        apart._give_up_all()
        apart._unfinished.clear()


def in_background(step: Callable[..., Any], **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(step, backend="gradprune", dynamic=False, options={"background": True, **options})


def stored() -> list[Path]:
    return sorted(artifacts.path_of("").parent.glob("*.json"))


def without_comments(code: str) -> list[str]:
    return [line for line in code.splitlines() if not line.lstrip().startswith("#")]


def test_calls_are_eager_until_it_is_compiled_and_then_as_if_compiled_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepack_convolutions, "WORTH_FLOPS", 1e9)  # as in the other process, such small ones stay
    model = network()
    step = backward_step(model)
    expected = backward_step(network())(*images())
    compiled = in_background(step, check="first")
    state = torch.get_rng_state()
    first = compiled(*images())
    assert all(torch.equal(one, other) for one, other in zip(first, expected, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    report = gradprune.reports(compiled)[-1]  # waits
    assert report.is_stored
    assert report.hoisted
    second = compiled(*images())
    assert "compared with eager" in report.check
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    torch.testing.assert_close(compiled(*images())[1], step(*images())[1], rtol=1e-4, atol=1e-6)
    (file,) = stored()
    meanwhile = json.loads(file.read_text())
    file.unlink()
    torch._dynamo.reset()
    torch.compile(backward_step(network()), backend="gradprune", dynamic=False, options={"check": "first"})(*images())
    (file,) = stored()
    at_once = json.loads(file.read_text())
    assert without_comments(at_once["code"]) == without_comments(meanwhile["code"])
    assert at_once["parts"] == meanwhile["parts"]
    assert at_once["notes"]["report"]["figures"] == meanwhile["notes"]["report"]["figures"]


def test_what_the_other_process_cannot_do_is_done_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(apart, "PROGRAM", "import sys; sys.stdin.read(); raise SystemExit('not today')")
    compiled = in_background(backward_step(network()))
    first = compiled(*images())
    with caplog.at_level(logging.WARNING):
        (report,) = gradprune.reports(compiled)
    assert "compiled now: not today" in caplog.text
    assert report.hoisted
    assert report.kernels
    torch.testing.assert_close(compiled(*images()), first, rtol=1e-4, atol=1e-6)
    assert len(stored()) == 1


def test_what_was_compiled_there_and_is_wrong_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_call.FirstCall, "_compare", lambda *args: ("it is wrong", True))
    torch.compile(backward_step(network()), backend="gradprune", dynamic=False, options={"check": "never"})(*images())
    (file,) = stored()
    file = file.rename(file.with_suffix(".compiled"))
    copies = f"import json, pathlib, sys; own = pathlib.Path({str(file)!r}); "
    copies += "own.rename(own.with_name(json.load(sys.stdin)['key'] + '.json'))"
    monkeypatch.setattr(apart, "PROGRAM", copies)
    compiled = in_background(backward_step(network()), check="first")
    first = compiled(*images())
    assert gradprune.reports(compiled)[-1].is_stored
    second = compiled(*images())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert "it is wrong" in (gradprune.reports(compiled)[-1].fallback or "")
    assert not stored()


def test_settings_of_this_process_that_the_other_does_not_have_are_noticed():
    job = apart.Job("", [], [], [], [], {}, {}, ["other"], torch.get_num_threads())
    file = io.StringIO()
    job.write(file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="differ"):
        apart.Job.read(file)


def test_it_ends_with_this_process():
    compiled = in_background(backward_step(network()))
    compiled(*images())
    (one,) = apart._unfinished
    assert one._process.poll() is None
    apart._give_up_all()
    assert one._process.poll() is not None


def test_what_cannot_be_stored_is_compiled_at_once(caplog: pytest.LogCaptureFixture):
    compiled = in_background(network())
    with caplog.at_level(logging.INFO):
        _, x, y = images()
        found = input_gradient(compiled, x, y)
    assert "compiled at once" in caplog.text
    torch.testing.assert_close(found, input_gradient(network(), x, y), rtol=1e-4, atol=1e-6)
    assert not apart._unfinished


def test_attacks_take_the_option():
    _, x, y = images()
    runtime = Runtime(options={"background": True})
    attack = PGD(eps=0.1, steps=3)
    eager = attack(network(), x, y, runtime=Runtime(compile=False))
    assert torch.equal(attack(network(), x, y, runtime=runtime), eager)
    assert apart._unfinished
    with pytest.raises(OptionError, match="leave out the option background"):
        Runtime(compile="auto", options={"background": True})


# --- The captured graph -----------------------------------------------------------------------------------------------


def captured_of(step: Callable[..., Any], *args: Any, monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    """What runs eagerly of a step."""
    found: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, capture: Any) -> fx.GraphModule:
        found.append(first_call.without_metadata(gm, capture))
        raise KeyboardInterrupt

    monkeypatch.setattr(lower, "without_metadata", note)
    with pytest.raises(KeyboardInterrupt):
        torch.compile(step, backend="gradprune", dynamic=False)(*args)
    return found[0]


def differentiated(graph: fx.Graph) -> list[str]:
    calls = graph.find_nodes(op="call_function", target=torch.autograd.grad)
    return [node.name for call in calls for node in call.args[1]]  # type: ignore[union-attr]


def test_no_weight_gradient_is_computed_meanwhile(monkeypatch: pytest.MonkeyPatch):
    captured = captured_of(backward_step(network()), *images(), monkeypatch=monkeypatch)
    assert len(differentiated(captured.graph)) == 1
    copies = [node for node in captured.graph.nodes if node.op == "call_method" and node.target == "copy_"]
    assert len(copies) == 1
    detached = list(captured.graph.find_nodes(op="call_method", target="detach"))
    assert {node.args[0].op for node in detached} >= {"placeholder"}


def test_a_weight_gradient_that_is_returned_is(monkeypatch: pytest.MonkeyPatch):
    model = network()

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x), y)
        gradient, of_weight = torch.autograd.grad(loss, [x, model[4].weight])
        return gradient, of_weight

    _, x, y = images()
    captured = captured_of(step, x, y, monkeypatch=monkeypatch)
    assert len(differentiated(captured.graph)) == 2
