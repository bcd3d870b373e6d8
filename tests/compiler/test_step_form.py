"""Steps as people write them: results are eager's, and the model is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState
from tiny import STEPS, backward_step, images, network
from torch import Tensor, nn

import gradprune

pytestmark = pytest.mark.usefixtures("no_code")

STRICT = {"strict": True, "verify": True}


def compiled(step: Callable[..., Any]) -> Any:
    return torch.compile(step, backend="gradprune", options=STRICT)


def check(
    make: Callable[[nn.Module], Callable[..., Any]],
    *arguments: Any,
    training: bool = False,
    written: tuple[str, ...] = (),
    calls: int = 2,
) -> list[gradprune.Report]:
    """A compiled step returns what eager returns, on a model of its own, and touches nothing but ``written``."""
    eager_model, model = network(training), network(training)
    eager, step = make(eager_model), compiled(make(model))
    state = ModelState.of(model)
    for _ in range(calls):
        eager_model.zero_grad()
        torch.testing.assert_close(step(*arguments), eager(*arguments), rtol=1e-5, atol=1e-6)
    state.assert_untouched(model, written)
    for name in written:
        torch.testing.assert_close(model.get_buffer(name), eager_model.get_buffer(name))
    return gradprune.reports(step)


@pytest.mark.parametrize("way", STEPS)
def test_three_ways(way: str):
    (report,) = check(lambda model: STEPS[way](model, F.cross_entropy), *images())
    assert report.form == "step"
    assert report.flops["after"]["weight_grad"] == 0
    assert report.skipped == []


@pytest.mark.parametrize("way", STEPS)
def test_existing_gradients_stay_as_they_are(way: str):
    model = network()
    expected = STEPS[way](network(), F.cross_entropy)(*images())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = ModelState.of(model)
    step = compiled(STEPS[way](model, F.cross_entropy))
    for _ in range(2):
        torch.testing.assert_close(step(*images()), expected, rtol=1e-5, atol=1e-6)
    state.assert_untouched(model)


@pytest.mark.parametrize("way", STEPS)
def test_aliased_arguments(way: str):
    """The first call has the perturbed image be the clean one; the step must not forget which is which."""
    x_adv, x, y = images()
    eager, step = STEPS[way](network(), F.cross_entropy), compiled(STEPS[way](network(), F.cross_entropy))
    for arguments in ((x, x, y), (x_adv, x, y), (x, x, y), (x_adv, x_adv, y)):
        torch.testing.assert_close(step(*arguments), eager(*arguments), rtol=1e-5, atol=1e-6)


def gradient_of_argument(model: nn.Module) -> Callable[..., Any]:
    def step(x_adv: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x_adv), y)
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize(
    "make_leaf", [lambda x: x.clone().requires_grad_(True), nn.Parameter], ids=["leaf", "parameter"]
)
def test_gradient_arrives_in_the_argument(make_leaf: Callable[[Tensor], Tensor]):
    """A perturbation may well be an ``nn.Parameter``: what makes a weight is that a module owns it."""
    x, _, y = images()
    model, leaf, expected = network(), make_leaf(x), make_leaf(x)
    step, eager = compiled(gradient_of_argument(model)), gradient_of_argument(network())
    state = ModelState.of(model)
    for _ in range(2):  # the second call adds to the gradient of the first
        torch.testing.assert_close(step(leaf, y), eager(expected, y))
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-6)
    state.assert_untouched(model)


def test_perturbation_that_a_module_owns_but_is_passed_as_argument():
    class Patch(nn.Module):
        def __init__(self, x: Tensor) -> None:
            super().__init__()
            self.delta = nn.Parameter(x)

    x, _, y = images()
    model, patch, expected = network(), Patch(x.clone()), Patch(x.clone())
    compiled(gradient_of_argument(model))(patch.delta, y)
    gradient_of_argument(network())(expected.delta, y)
    torch.testing.assert_close(patch.delta.grad, expected.delta.grad, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def breaking_step(model: nn.Module) -> Callable[..., Any]:
    def step(x_adv: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        loss = F.cross_entropy(model(x_adv), y)
        print("a graph break")
        loss.backward()
        assert x_adv.grad is not None
        return x_adv.detach() + x_adv.grad.sign()

    return step


def step_that_breaks_on_the_loss(model: nn.Module) -> Callable[..., Any]:
    def step(x_adv: Tensor, y: Tensor) -> float:
        loss = F.cross_entropy(model(x_adv), y)
        value = loss.item()
        loss.backward()
        return value

    return step


def largest(reports: list[gradprune.Report]) -> gradprune.Report:
    return max(reports, key=lambda report: report.flops["before"]["forward"])


def test_graph_break_leaves_the_model_form(capsys: pytest.CaptureFixture[str]):
    x_adv, _, y = images()
    report = largest(check(breaking_step, x_adv, y))
    assert capsys.readouterr().out == "a graph break\n" * 4
    assert report.form == "model"
    assert report.flops["before"]["weight_grad"] > report.flops["after"]["weight_grad"] == 0


def test_backward_after_a_graph_break_reaches_the_argument():
    """The loss is an input of the graph that calls backward, and no leaf is."""
    _, x, y = images()
    model, leaf, expected = network(), x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    step = compiled(step_that_breaks_on_the_loss(model))
    assert step(leaf, y) == pytest.approx(step_that_breaks_on_the_loss(network())(expected, y))
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert largest(gradprune.reports(step)).form == "model"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_inside_the_step(set_to_none: bool):
    def make(model: nn.Module) -> Callable[..., Any]:
        inner = backward_step(model)

        def step(*arguments: Tensor) -> Any:
            model.zero_grad(set_to_none=set_to_none)
            return inner(*arguments)

        return step

    (report,) = check(make, *images())
    assert report.flops["after"]["weight_grad"] == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_that_were_there(set_to_none: bool):
    """It was asked for, so it happens; what backward would have added does not."""
    model = network()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    inner = backward_step(model)

    def step(*arguments: Tensor) -> Any:
        model.zero_grad(set_to_none=set_to_none)
        return inner(*arguments)

    torch.testing.assert_close(compiled(step)(*images()), backward_step(network())(*images()), rtol=1e-5, atol=1e-6)
    for parameter in model.parameters():
        assert parameter.grad is None if set_to_none else not parameter.grad.any()


def test_optimizer_zero_grad():
    def make(model: nn.Module) -> Callable[..., Any]:
        optimizer, inner = torch.optim.SGD(model.parameters(), lr=0.1), backward_step(model)

        def step(*arguments: Tensor) -> Any:
            optimizer.zero_grad()
            return inner(*arguments)

        return step

    for report in check(make, *images()):
        assert report.flops["after"]["weight_grad"] == 0


# --- Weight gradients that are read -----------------------------------------------------------------------------------


def kept(reports: list[gradprune.Report]) -> list[str]:
    return [change.reason for report in reports for change in report.skipped]


def test_logged_gradient_norm():
    def make(model: nn.Sequential) -> Callable[..., Any]:
        def step(x_adv: Tensor, y: Tensor) -> Any:
            x_adv = x_adv.detach().requires_grad_(True)
            model.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            assert x_adv.grad is not None
            assert model[0].weight.grad is not None
            return x_adv.grad, model[0].weight.grad.norm()

        return step

    x_adv, _, y = images()
    eager_model, model = network(), network()
    step = compiled(make(model))
    for _ in range(2):
        torch.testing.assert_close(step(x_adv, y), make(eager_model)(x_adv, y), rtol=1e-5, atol=1e-6)
    # The one that was read is there, as in eager; the others are not.
    torch.testing.assert_close(model[0].weight.grad, eager_model[0].weight.grad, rtol=1e-5, atol=1e-6)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["0.weight"]
    reasons = kept(gradprune.reports(step))
    assert reasons
    assert all("read by" in reason and __file__ in reason for reason in reasons)
    # One of two: the linear layer's went.
    flops = gradprune.reports(step)[0].flops
    assert 0 < flops["after"]["weight_grad"] < flops["before"]["weight_grad"]


def test_step_that_returns_a_weight_gradient():
    def make(model: nn.Sequential) -> Callable[..., Any]:
        def step(x_adv: Tensor, y: Tensor) -> Any:
            x_adv = x_adv.detach().requires_grad_(True)
            loss = F.cross_entropy(model(x_adv), y)
            return torch.autograd.grad(loss, [x_adv, model[0].weight])

        return step

    x_adv, _, y = images()
    assert kept(check(make, x_adv, y)) == ["the step returns this weight gradient"]


def test_weights_updated_from_the_same_backward():
    """Free adversarial training: one backward pass serves the perturbation and the weights."""

    def make(model: nn.Module) -> Callable[..., Any]:
        def step(delta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            delta = delta.detach().requires_grad_(True)
            model.zero_grad()
            F.cross_entropy(model(x + delta), y).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
            assert delta.grad is not None
            return (delta.detach() + 0.01 * delta.grad.sign()).clamp(-0.03, 0.03)

        return step

    x_adv, x, y = images()
    eager_model, model = network(), network()
    step, delta, expected = compiled(make(model)), x_adv - x, x_adv - x
    for _ in range(3):
        delta, expected = step(delta, x, y), make(eager_model)(expected, x, y)
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(model.parameters(), eager_model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert len(kept(gradprune.reports(step))) >= len(list(model.parameters()))


def test_gradient_penalty():
    """Double backward inside the step: the second gradient call differentiates the first one's result."""

    def make(model: nn.Module) -> Callable[..., Any]:
        def step(x_adv: Tensor, y: Tensor) -> Any:
            x_adv = x_adv.detach().requires_grad_(True)
            loss = F.cross_entropy(model(x_adv).tanh(), y)
            (first,) = torch.autograd.grad(loss, x_adv, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x_adv)[0]

        return step

    x_adv, _, y = images()
    reports = check(make, x_adv, y)
    assert all(report.flops["after"]["weight_grad"] == 0 for report in reports)


# --- Modes, state, shapes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["autograd.grad", "backward"])
def test_batch_norm_in_training_updates_its_statistics(way: str):
    statistics = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    make = lambda model: STEPS[way](model, F.cross_entropy)  # noqa: E731
    (report,) = check(make, *images(), training=True, written=statistics)
    assert report.flops["after"]["weight_grad"] == 0


def test_random_state_is_unchanged_by_a_step_without_random_operators():
    step = compiled(backward_step(network()))
    step(*images())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    step(*images())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_draws_what_eager_draws():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.drop(x))

    eager, model = Dropping().train(), Dropping().train()
    eager.inner.eval(), model.inner.eval()
    with torch._inductor.config.patch(fallback_random=True):
        step = compiled(backward_step(model))
        for seed in range(2):
            torch.manual_seed(seed)
            actual = step(*images())
            after = torch.get_rng_state()
            torch.manual_seed(seed)
            torch.testing.assert_close(actual, backward_step(eager)(*images()), rtol=1e-5, atol=1e-6)
            assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("way", STEPS)
def test_symbolic_batch(way: str):
    model, eager = network(), STEPS[way](network(), F.cross_entropy)
    step = torch.compile(STEPS[way](model, F.cross_entropy), backend="gradprune", dynamic=True, options=STRICT)
    for batch in (2, 3, 5):
        x = torch.rand(batch, 3, 4, 4)
        arguments = x + 0.01, x, torch.arange(batch) % 5
        torch.testing.assert_close(step(*arguments), eager(*arguments), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    (report,) = gradprune.reports(step)  # one compilation serves every batch
    assert report.fallback is None
    assert report.flops["after"]["forward"] == 2 * 2 * (4 * 16 * 27 + 64 * 5)  # at the first batch


def test_weights_changed_between_calls_are_seen():
    model, eager_model = network(), network()
    step, eager = compiled(backward_step(model)), backward_step(eager_model)
    step(*images())
    for one in (model, eager_model):
        with torch.no_grad():
            one[0].weight.mul_(1.5)
        one[4].weight.data = one[4].weight.data + 0.1
    torch.testing.assert_close(step(*images()), eager(*images()), rtol=1e-5, atol=1e-6)


def test_step_without_any_module():
    """The perturbation's gradient of a plain function: nothing to prune, nothing in the way."""

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (x.sin() * x).sum().backward()
        assert x.grad is not None
        return x.grad

    x, _, _ = images()
    torch.testing.assert_close(compiled(step)(x), step(x))


def test_operators_with_effects():
    """Torch takes the tokens of effects out of a graph's outputs, and leaves what it noted on them."""
    layer, x = nn.Linear(4, 4), torch.rand(2, 4)

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad((x @ torch.linalg.inv(layer.weight)).square().sum(), x)[0]

    torch.testing.assert_close(compiled(step)(x), step(x), rtol=1e-4, atol=1e-4)
