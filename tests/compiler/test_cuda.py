"""What is done on a GPU only, on a CPU that is taken for one; no test here knows what CUDA itself does."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import interpret, relative_error, step_by_autograd_grad
from tiny import images, network
from torch import Tensor, fx

import gradprune.backend
from gradprune.compiler.devices import out_of_cuda_graphs


@pytest.fixture(autouse=True)
def independent() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


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
