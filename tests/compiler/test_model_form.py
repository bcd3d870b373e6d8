"""The model form as attack libraries use it: they call the model and take gradients themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState
from tiny import images, input_gradient, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")

Model = Callable[[Tensor], Tensor]


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="gradprune", options={"strict": True, "verify": True})


def by_backward(model: Model, x: Tensor, y: Tensor) -> Tensor:
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    return x.grad


def by_autograd_grad(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0]


def by_sum_of_two_calls(model: Model, x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(model(x), y) + model(x * 0.5).logsumexp(1).sum(), x)[0]


def by_tangent(model: Model, x: Tensor, y: Tensor) -> Tensor:
    output = model(x)
    return torch.autograd.grad(output, x, grad_outputs=F.one_hot(y, output.shape[1]).to(output))[0]


def by_retained_graph(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """One gradient per class, as DeepFool takes them."""
    output = model(x)
    rows = [torch.autograd.grad(output[:, k].sum(), x, retain_graph=True)[0] for k in range(output.shape[1])]
    return torch.stack(rows)


def by_backward_twice(model: Model, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None
    return x.grad


def by_transform_before(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """The perturbation comes through operators outside of the model, as with input diversity."""
    return torch.autograd.grad(F.cross_entropy(model(F.pad(x[:, :, :3, :3], (0, 1, 1, 0))), y), x)[0]


CALLERS = (
    by_backward,
    by_autograd_grad,
    by_sum_of_two_calls,
    by_tangent,
    by_retained_graph,
    by_backward_twice,
    by_transform_before,
)


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.__name__)
@pytest.mark.parametrize("existing", [False, True], ids=["no gradients", "existing gradients"])
def test_callers(caller: Callable[[Model, Tensor, Tensor], Tensor], existing: bool):
    model, (x, _, y) = network(), images()
    expected = caller(network(), x.clone().requires_grad_(True), y)
    if existing:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    state, attacked = ModelState.of(model), compiled(model)
    for _ in range(2):
        actual = caller(attacked, x.clone().requires_grad_(True), y)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    state.assert_untouched(model)
    for report in gradprune.reports(attacked):
        assert report.form == "model"
        assert report.flops["after"]["weight_grad"] == 0
        assert report.fallback is None


def test_graph_is_retained_whatever_happened_before():
    """Torch notes that memory of saved tensors may be reused when it compiles backward again after an error."""
    model, (x, _, y) = network(), images()
    attacked, expected = compiled(model), by_backward_twice(network(), x.clone().requires_grad_(True), y)
    with pytest.raises(gradprune.WeightGradientError):
        torch.autograd.grad(F.cross_entropy(attacked(x.clone().requires_grad_(True)), y), model[0].weight)
    actual = by_backward_twice(attacked, x.clone().requires_grad_(True), y)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_frozen_weights():
    model, (_, x, y) = network().requires_grad_(False), images()
    attacked = compiled(model)
    torch.testing.assert_close(input_gradient(attacked, x, y), input_gradient(network(), x, y), rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_calls_without_gradients():
    model, (_, x, _) = network(), images()
    attacked, expected = compiled(model), model(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = attacked(x)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected)
    assert attacked(x.clone().requires_grad_(True)).requires_grad


def test_modes_are_followed():
    model, eager, (_, x, y) = network(), network(), images()
    attacked = compiled(model)
    for training in (False, True, False, True):
        model.train(training), eager.train(training)
        torch.testing.assert_close(input_gradient(attacked, x, y), input_gradient(eager, x, y), rtol=1e-5, atol=1e-6)
        for (name, one), other in zip(model.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(one, other, msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_symbolic_batch():
    model, eager = network(), network()
    attacked = torch.compile(model, backend="gradprune", dynamic=True, options={"strict": True})
    for batch in (2, 3, 5):
        x, y = torch.rand(batch, 3, 4, 4), torch.arange(batch) % 5
        torch.testing.assert_close(input_gradient(attacked, x, y), input_gradient(eager, x, y), rtol=1e-5, atol=1e-6)
    (report,) = gradprune.reports(attacked)  # one compilation serves every batch
    assert report.fallback is None


def optimizer_step(model: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, _, y = images()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def load_state_dict(model: nn.Sequential) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def assign_data(model: nn.Sequential) -> None:
    model[0].weight.data = model[0].weight.data * 1.5


def assign_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 1.5)


def write_in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1].running_var.mul_(2)


CHANGES = (optimizer_step, load_state_dict, assign_data, assign_parameter, write_in_place)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_seen_at_once(change: Callable[[nn.Sequential], None]):
    """Adversarial training: the compiled model attacks what the optimizer has just changed."""
    model, eager, (_, x, y) = network(), network(), images()
    attacked = compiled(model)
    before = input_gradient(attacked, x, y)
    change(model), change(eager)
    after = input_gradient(attacked, x, y)
    torch.testing.assert_close(after, input_gradient(eager, x, y), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before)


def test_several_outputs_and_other_arguments():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, scale: float, *, y: Tensor) -> dict[str, Any]:
            logits = self.inner(x * scale)
            return {"logits": logits, "loss": F.cross_entropy(logits, y), "label": y, "name": "several"}

    model, (_, x, y) = Several(), images()
    attacked = compiled(model)

    def attack(called: Any) -> tuple[Tensor, dict[str, Any]]:
        leaf = x.clone().requires_grad_(True)
        result = called(leaf, 0.5, y=y)
        (result["loss"] + result["logits"].square().sum()).backward()
        assert leaf.grad is not None
        return leaf.grad, result

    (gradient, result), (expected_gradient, expected) = attack(attacked), attack(Several())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert result["name"] == expected["name"]
    assert result["label"] is y
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_models_keep_their_own_weights():
    _, x, y = images()
    for factor in (1, 2, 1):
        model, eager = network(), network()
        for one in (model, eager):
            one[0].weight.data.mul_(factor)
        torch.testing.assert_close(
            input_gradient(compiled(model), x, y), input_gradient(eager, x, y), rtol=1e-5, atol=1e-6
        )
