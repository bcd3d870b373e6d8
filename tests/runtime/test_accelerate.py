"""``accelerate``: a drop-in ``nn.Module`` that shares everything with the original."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import ModelState
from tiny import images, input_gradient, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")


class Named(nn.Module):
    """A model with attributes, a method, a buffer that is not saved and a submodule that is used twice."""

    num_classes = 5

    def __init__(self) -> None:
        super().__init__()
        self.features = network()
        self.mean = [0.5, 0.4, 0.3]
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * self.scale

    def describe(self) -> str:
        return f"{type(self).__name__} of {self.num_classes}"


def same_gradient(one: nn.Module, other: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    _, x, y = images()
    x = x.to(dtype)
    torch.testing.assert_close(input_gradient(one, x, y), input_gradient(other, x, y), rtol=1e-5, atol=1e-6)
    for parameter in [*one.parameters(), *other.parameters()]:
        parameter.grad = None


def test_gradient_is_eagers_and_nothing_is_touched():
    model, (_, x, y) = Named().eval(), images()
    accelerated, state = gradprune.accelerate(model, strict=True), ModelState.of(model)
    expected = input_gradient(copy.deepcopy(model), x, y)
    torch.testing.assert_close(input_gradient(accelerated, x, y), expected, rtol=1e-5, atol=1e-6)
    state.assert_untouched(model)
    assert type(model) is Named
    assert model.forward.__func__ is Named.forward
    (report,) = gradprune.reports(accelerated)
    assert report.flops["after"]["weight_grad"] == 0


def test_it_is_a_module_with_the_originals_own_parts():
    model = Named()
    accelerated = gradprune.accelerate(model)
    assert isinstance(accelerated, nn.Module)
    for one, other in zip(accelerated.named_parameters(), model.named_parameters(), strict=True):
        assert one[0] == other[0]
        assert one[1] is other[1]
    for one, other in zip(accelerated.named_buffers(), model.named_buffers(), strict=True):
        assert one[0] == other[0]
        assert one[1] is other[1]
    assert list(accelerated.named_children()) == list(model.named_children())
    assert list(accelerated.modules())[1:] == list(model.modules())[1:]
    assert "gradprune: Named" in repr(accelerated)


def test_attributes_are_the_originals():
    model = Named()
    accelerated = gradprune.accelerate(model)
    assert accelerated.num_classes == 5
    assert accelerated.mean is model.mean
    assert accelerated.features is model.features
    assert accelerated.describe() == "Named of 5"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = accelerated.nothing_of_the_kind


def test_state_dict_goes_both_ways():
    model, other = Named(), Named()
    accelerated = gradprune.accelerate(model)
    assert accelerated.state_dict().keys() == model.state_dict().keys()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    accelerated.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    nn.init.zeros_(model.features[4].bias)
    assert not accelerated.state_dict()["features.4.bias"].any()
    same_gradient(accelerated.eval(), _loaded(model).eval())


def _loaded(model: nn.Module) -> Named:
    fresh = Named()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_mode_is_shared():
    model = Named()
    accelerated = gradprune.accelerate(model)
    accelerated.eval()
    assert not any(module.training for module in [accelerated, *model.modules()])
    model.train()
    assert accelerated.training
    _, x, _ = images()
    eager = copy.deepcopy(model)
    torch.testing.assert_close(accelerated(x), eager(x))
    torch.testing.assert_close(model.features[1].running_mean, eager.features[1].running_mean)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.double()], ids=["to", "double"])
def test_dtype_is_shared(move: Any):
    model = Named().eval()
    accelerated = gradprune.accelerate(model)
    assert move(accelerated) is accelerated
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    same_gradient(accelerated, copy.deepcopy(model), torch.float64)


def test_assignment_acts_on_the_original():
    model = Named().eval()
    accelerated = gradprune.accelerate(model)
    accelerated.features = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    assert model.features is accelerated.features
    same_gradient(accelerated, copy.deepcopy(model))


def test_requires_grad_is_shared():
    model = Named().eval()
    accelerated = gradprune.accelerate(model)
    accelerated.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    same_gradient(accelerated, copy.deepcopy(model))


def test_copy_is_independent():
    model = Named().eval()
    accelerated = gradprune.accelerate(model, exact_order=True)
    twin = copy.deepcopy(accelerated)
    assert type(twin) is type(accelerated)
    nn.init.zeros_(model.features[4].weight)
    assert twin.features[4].weight.any()
    same_gradient(twin, _loaded(twin).eval())
    assert "dgrad-as-convolution" not in [record.name for record in gradprune.reports(twin)[0].passes]


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickle_round_trip(way: str):
    accelerated = gradprune.accelerate(Named().eval(), exact_order=True)
    _, x, y = images()
    input_gradient(accelerated, x, y)  # compiled by now, which must not get in the way
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(accelerated))
    else:
        file = io.BytesIO()
        torch.save(accelerated, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(accelerated)
    torch.testing.assert_close(loaded.state_dict(), accelerated.state_dict())
    same_gradient(loaded, _loaded(loaded).eval())
    assert "dgrad-as-convolution" not in [record.name for record in gradprune.reports(loaded)[0].passes]


def count_calls(module: nn.Module, counts: dict[str, int], prefix: str) -> None:
    def hook(kind: str) -> Any:
        def count(*_: Any) -> None:
            counts[f"{prefix} {kind}"] = counts.get(f"{prefix} {kind}", 0) + 1

        return count

    module.register_forward_pre_hook(hook("before"))
    module.register_forward_hook(hook("after"))


def test_hooks_run_once():
    model = Named().eval()
    accelerated, counts = gradprune.accelerate(model), dict[str, int]()
    count_calls(model, counts, "original")
    count_calls(model.features, counts, "submodule")
    count_calls(accelerated, counts, "wrapper")
    _, x, y = images()
    for call in (1, 2):
        input_gradient(accelerated, x, y)
        assert counts == {
            f"{who} {kind}": call for who in ("original", "submodule", "wrapper") for kind in ("before", "after")
        }


def test_hook_that_changes_the_output():
    model = Named().eval()
    model.features.register_forward_hook(lambda module, args, output: output * 3)
    same_gradient(gradprune.accelerate(model), copy.deepcopy(model))


def test_accelerating_twice():
    model = Named()
    accelerated = gradprune.accelerate(model)
    assert gradprune.accelerate(accelerated) is accelerated
    assert gradprune.accelerate(accelerated, exact_order=True).features is model.features


def test_part_of_another_module():
    """A normalisation layer in front, as RobustBench and Torchattacks put it."""
    model = Named().eval()
    wrapped = nn.Sequential(nn.InstanceNorm2d(3), gradprune.accelerate(model))
    same_gradient(wrapped, nn.Sequential(nn.InstanceNorm2d(3), copy.deepcopy(model)))
    assert [name for name, _ in wrapped.named_parameters()] == [f"1.{name}" for name, _ in model.named_parameters()]


def test_in_a_step_that_is_compiled_as_a_whole():
    """The wrapper may also be called inside a compiled step."""
    from tiny import backward_step

    model = Named().eval()
    step = gradprune.compile(backward_step(gradprune.accelerate(model)))
    expected = backward_step(copy.deepcopy(model))(*images())
    torch.testing.assert_close(step(*images()), expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
