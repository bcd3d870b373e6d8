"""What Dynamo leaves to Python is said once, is in the reports, and touches no ``.grad`` of an accelerated model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import images, input_gradient, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")


class Loop(nn.Module):
    """A break in a loop: Dynamo gives up the frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
            print(end="")
        return x


class Item(Loop):
    """A number that Python asks for."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x.flatten(1))
        return self.layers[1](x / max(1.0, x.detach().abs().max().item()))


class Disabled(Loop):
    """A part that must not be compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.eager(x).relu())

    @torch.compiler.disable
    def eager(self, x: Tensor) -> Tensor:
        return self.layers[0](x.flatten(1))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name.startswith("gradprune") and one.levelno >= 30]


@pytest.mark.parametrize("kind", [Loop, Item, Disabled])
def test_a_model_with_an_eager_part(kind: type[nn.Module], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "gradprune")
    model, (_, x, y) = kind().eval(), images()
    fast = gradprune.accelerate(model)
    for _ in range(2):
        torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(kind().eval(), x, y))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    told = warnings_of(caplog)
    assert len(told) == len(set(told)) >= 1
    assert "test_left_out.py:" in told[0]
    assert all(report.left_out for report in gradprune.reports(fast))
    assert gradprune.reports(fast)


def test_a_step_that_dynamo_gives_up(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "gradprune")
    model, (_, x, y) = network(), images()

    def step(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            x = x.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
            print(end="")
            x = x + 0.01 * gradient.sign()
        return x

    compiled = torch.compile(step, backend="gradprune")
    torch.testing.assert_close(compiled(x, y), step(x, y))
    (report,) = gradprune.reports(compiled)
    assert report.fallback_kind == "not compiled, runs eagerly"
    assert "test_left_out.py:" in (report.fallback or "")
    assert any("runs eagerly" in line for line in warnings_of(caplog))


def test_a_whole_step_has_nothing_left_out(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "gradprune")
    fast, (_, x, y) = gradprune.accelerate(network()), images()
    input_gradient(fast, x, y)
    (report,) = gradprune.reports(fast)
    assert report.left_out == []
    assert warnings_of(caplog) == []


def test_the_limit_of_recompilations_is_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "gradprune")

    def step(x: Tensor, how: str) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad((x * len(how)).square().sum(), x)[0]

    compiled = torch.compile(step, backend="gradprune")
    for length in range(1, torch._dynamo.config.recompile_limit + 3):
        compiled(torch.rand(3), "x" * length)
    assert sum("recompile_limit" in line for line in warnings_of(caplog)) == 1
    assert all("recompile_limit" in report.left_out[0] for report in gradprune.reports(compiled))


# --- The limit --------------------------------------------------------------------------------------------------------


def test_calls_that_differ_do_not_use_up_the_limit():
    model, (_, x, y) = network(), images()
    fast = gradprune.accelerate(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        for training in (False, True):
            model.train(training)
            for size in (2, 1, 4, 3):
                z = x[:1].expand(size, -1, -1, -1).to(dtype).clone().requires_grad_(True)
                F.cross_entropy(fast(z), y[:1].expand(size)).backward()
                with torch.no_grad():
                    fast(z.detach())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(report.left_out == [] for report in gradprune.reports(fast))


def test_models_of_one_class_do_not_share_the_limit():
    _, x, y = images()
    for width in range(1, 12):
        torch.manual_seed(0)
        fast = gradprune.accelerate(nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Tanh(), nn.Linear(width, 5)))
        input_gradient(fast, x, y)
        (report,) = gradprune.reports(fast)
        assert report.left_out == []


# --- Hooks ------------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, inputs, out: out * 0.5),
    "pre": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "backward": lambda layer: layer.register_full_backward_hook(lambda module, gi, go: (gi[0] * 0.5,)),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda module, go: (go[0] * 2,)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("layer", [0, 2])
def test_hooks_are_eagers_whenever_they_come_and_go(kind: str, layer: int):
    model, eager, (_, x, y) = network(), network(), images()
    fast = gradprune.accelerate(model)

    def same() -> None:
        torch.testing.assert_close(input_gradient(fast, x, y), input_gradient(eager, x, y), rtol=1e-5, atol=1e-6)

    same()
    handles = [HOOKS[kind](one[layer]) for one in (model, eager)]
    same()
    for handle in handles:
        handle.remove()
    same()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_a_hook_on_another_model_of_a_class_that_was_compiled(kind: str):
    _, x, y = images()
    first, second, eager = network(), network(), network()
    compiled = [torch.compile(one, backend="gradprune") for one in (first, second)]
    input_gradient(compiled[0], x, y)
    for one in (second, eager):
        HOOKS[kind](one[2])
    torch.testing.assert_close(input_gradient(compiled[1], x, y), input_gradient(eager, x, y), rtol=1e-5, atol=1e-6)


def test_a_package_whose_name_begins_like_torch_is_not_torch(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "gradprune")
    file = f"{Path(torch.__file__).parent}vision_like/models.py"
    source = "def step(x):\n    for _ in range(2):\n        x = x.sin()\n        print(end='')\n    return x\n"
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), made)  # what stands in no file of torch
    torch.compile(made["step"], backend="gradprune")(torch.rand(3))
    assert any(file in line for line in warnings_of(caplog))


def test_what_autograd_calls_is_not_said_to_be_left_out(caplog: pytest.LogCaptureFixture):
    """A gradient that is taken behind a break runs hooks of gradprune's own, which are no part of the step."""

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x), y)
        print(end="")
        return loss, torch.autograd.grad(loss, x)[0]

    model, (x, _, y) = network(), images()
    compiled = torch.compile(step, backend="gradprune")
    for actual, expected in zip(compiled(x, y), step(x, y), strict=True):
        torch.testing.assert_close(actual, expected)
    messages = warnings_of(caplog)
    assert messages
    assert not any("torch_compat" in message for message in messages)
