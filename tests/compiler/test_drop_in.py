"""What a compiled model returns is what eager returns: strides, values of buffers, flags, and a container's ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import images, network
from torch import Tensor, nn
from torch.nn.utils import prune

import gradprune


class Strided(nn.Module):
    """Strided convolutions, which Inductor runs with channels last."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2) if pool else nn.Identity(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)).mean((2, 3)))


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)), x)[0]


@pytest.mark.inductor
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_of_gradients_are_eagers(pool: bool, layout: torch.memory_format):
    x = torch.rand(4, 3, 16, 16).to(memory_format=layout).requires_grad_(True)
    expected = gradient_of(Strided(pool=pool).eval(), x)
    actual = gradient_of(gradprune.accelerate(Strided(pool=pool).eval()), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert actual.stride() == expected.stride()


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


class Counting(Centred):
    """A buffer that is read, written and read again."""

    def forward(self, x: Tensor) -> Tensor:
        h = (self.first(x) + self.mean.clone()).tanh()
        self.mean += 1
        return self.last((h * self.mean.clone()).sin())


class Rolling(Centred):
    """A buffer that is overwritten by what is computed from it and from the input."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sigmoid()
        scaled = (h * (self.mean + 1)).exp()
        self.mean.copy_(scaled.detach().mean(0))
        return self.last(scaled / (1 + self.mean))


@pytest.mark.inductor
@pytest.mark.parametrize("kind", [Centred, Counting, Rolling])
@pytest.mark.parametrize("form", ["accelerate", "torch.compile"])
def test_the_backward_pass_reads_what_the_forward_pass_read(kind: type[Centred], form: str):
    model, eager = kind(), kind()
    fast = gradprune.accelerate(model) if form == "accelerate" else torch.compile(model, backend="gradprune")
    x = torch.rand(4, 12)
    for _ in range(3):
        one, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        torch.testing.assert_close(gradient_of(fast, one), gradient_of(eager, other), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(model.mean, eager.mean)


# --- Flags and containers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_outputs_require_gradients_as_in_eager(no_code: None, requires_grad: bool):
    model, (_, x, _) = network(), images()
    for weights in (True, False):
        model.requires_grad_(weights)
        x = x.detach().requires_grad_(requires_grad)
        assert gradprune.accelerate(model)(x).requires_grad == model(x).requires_grad
        with torch.no_grad():
            assert not gradprune.accelerate(model)(x).requires_grad


def test_outputs_may_be_written_to(no_code: None):
    model, (_, x, _) = network(), images()
    one, other = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    for called, given in ((gradprune.accelerate(model), one), (network(), other)):
        output = called(given)
        output -= output.detach().max()
        output.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_a_container_is_one(no_code: None):
    model = network()
    fast: Any = gradprune.accelerate(model)
    assert len(fast) == 5
    assert list(fast) == list(model)
    assert fast[0] is model[0]
    assert fast[-1] is model[-1]
    assert isinstance(fast[:2], nn.Sequential)
    assert model[1] in fast
    single: Any = gradprune.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError):
        len(single)
    assert single


def test_what_an_accelerated_model_leaves_of_flags(no_code: None):
    model, (_, x, _) = network(), images()
    model[0].weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    fast = gradprune.accelerate(model)
    fast(x.clone().requires_grad_(True))
    with pytest.raises(RuntimeError):
        fast(torch.rand(2, 4, 4, 4))
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.inductor
def test_weights_that_a_hook_makes_and_stores_in_the_module():
    """Each call returns them too; what is packed of them is hoisted all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 5)).eval()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    x = torch.rand(64, 784, requires_grad=True)
    expected = gradient_of(model, x)

    def step(x: Tensor) -> Tensor:
        return gradient_of(model, x.detach().requires_grad_(True))

    torch.testing.assert_close(torch.compile(step, backend="gradprune")(x), expected, rtol=1e-4, atol=1e-6)
