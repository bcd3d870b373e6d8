"""Every named error: when it is raised, that it says what to do, and that nothing has changed by then."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ModelState
from tiny import backward_step, images, network, train_step
from torch import Tensor, nn

import gradprune
from gradprune import errors
from gradprune.torch_compat.version import check_version

pytestmark = pytest.mark.usefixtures("no_code")


def compiled(fn: Callable[..., Any], **options: Any) -> Any:
    return torch.compile(fn, backend="gradprune", options=options or None)


def raises_and_changes_nothing(
    error: type[Exception], message: str, model: nn.Module, call: Callable[[], Any]
) -> Exception:
    """``call`` raises, and the model is what it was. Gradients that were there before are part of it."""
    for parameter in list(model.parameters())[:2]:
        parameter.grad = torch.ones_like(parameter)
    state = ModelState.of(model)
    with pytest.raises(error, match=message) as caught:
        call()
    state.assert_untouched(model)
    return caught.value


def test_every_error_has_a_common_base():
    raised = {cls for cls in vars(errors).values() if isinstance(cls, type) and cls.__module__ == errors.__name__}
    assert raised == {
        cls
        for cls in (getattr(gradprune, name) for name in gradprune.__all__)
        if isinstance(cls, type) and cls in raised
    }
    assert all(issubclass(cls, gradprune.GradpruneError) for cls in raised)


# --- Training by mistake ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_training_step(training: bool):
    model, (_, x, y) = network(training), images()
    error = raises_and_changes_nothing(
        gradprune.TrainingStepError, "default backend", model, lambda: compiled(train_step(model))(x, y)
    )
    assert "requires_grad_(True)" in str(error)
    assert "tiny.py:" in str(error)  # where the gradient is taken


def test_training_step_with_explicit_gradients():
    model, (_, x, y) = network(), images()

    def step(x: Tensor, y: Tensor) -> Any:
        return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))

    raises_and_changes_nothing(
        gradprune.TrainingStepError, "this is a training step", model, lambda: compiled(step)(x, y)
    )


def test_backward_of_a_model_whose_input_does_not_require_grad():
    model, (_, x, y) = network(), images()
    output = compiled(model)(x)
    assert output.requires_grad
    error = raises_and_changes_nothing(
        gradprune.TrainingStepError,
        r"x_adv.requires_grad_\(True\)",
        model,
        lambda: F.cross_entropy(output, y).backward(),
    )
    assert "default backend" in str(error)


def test_reading_such_an_output_is_no_mistake():
    model, (_, x, _) = network(), images()
    torch.testing.assert_close(compiled(model)(x).detach(), model(x).detach())
    with torch.no_grad():
        assert not compiled(model)(x).requires_grad


# --- Weight gradients through the model form --------------------------------------------------------------------------


def loss_of(model: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x, _, y = images()
    x = x.requires_grad_(True)
    return F.cross_entropy(model(x), y), x


WEIGHT_GRADIENTS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "grad of a weight": lambda loss, x, w: torch.autograd.grad(loss, w),
    "grad of a weight and the input": lambda loss, x, w: torch.autograd.grad(loss, [x, w]),
    "backward to a weight": lambda loss, x, w: loss.backward(inputs=[w]),
    "backward to a weight and the input": lambda loss, x, w: loss.backward(inputs=[w, x]),
    "unused allowed": lambda loss, x, w: torch.autograd.grad(loss, w, allow_unused=True),
}


@pytest.mark.parametrize("ask", WEIGHT_GRADIENTS)
def test_explicit_weight_gradient(ask: str):
    model = network()
    loss, x = loss_of(compiled(model))
    raises_and_changes_nothing(
        gradprune.WeightGradientError,
        "Take it from the model that was not compiled",
        model,
        lambda: WEIGHT_GRADIENTS[ask](loss, x, model[0].weight),
    )
    assert x.grad is None


INPUT_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "backward": lambda loss, x: loss.backward(),
    "backward to the input": lambda loss, x: loss.backward(inputs=[x]),
    "grad": lambda loss, x: torch.autograd.grad(loss, x),
    "grad, retained": lambda loss, x: torch.autograd.grad(loss, x, retain_graph=True),
}


@pytest.mark.parametrize("ask", INPUT_GRADIENTS)
def test_input_gradient_is_no_mistake(ask: str):
    model = network()
    loss, x = loss_of(compiled(model))
    state = ModelState.of(model)
    INPUT_GRADIENTS[ask](loss, x)
    state.assert_untouched(model)


# --- Double backward --------------------------------------------------------------------------------------------------


def test_double_backward():
    model = network()
    loss, x = loss_of(compiled(model))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    expected_loss, expected_x = loss_of(model)
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(expected_loss, expected_x)[0])
    error = raises_and_changes_nothing(
        gradprune.DoubleBackwardError, "Compile the whole step", model, lambda: gradient.square().sum().backward()
    )
    assert "double backward" in str(error)
    assert x.grad is None


def test_double_backward_by_backward():
    model = network()
    loss, x = loss_of(compiled(model))
    with pytest.warns(UserWarning, match="create_graph=True"):
        loss.backward(create_graph=True)
    assert x.grad is not None
    raises_and_changes_nothing(
        gradprune.DoubleBackwardError, "Compile the whole step", model, lambda: x.grad.sum().backward()
    )


# --- Options ----------------------------------------------------------------------------------------------------------

WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"strictt": True}, "gradprune has no option 'strictt': did you mean 'strict'?"),
    ({"disable": ["narrow-output"]}, "no pass 'narrow-output': did you mean 'narrow-outputs'?"),
    ({"disable": "narrow-outputs"}, "'disable' must be a list of pass names, not 'narrow-outputs'"),
    (
        {"disable": ["something else"]},
        "no pass 'something else': valid: attention-by-products, blocked-image-gradients,",
    ),
    ({"mode": "max-autotun"}, "no mode 'max-autotun': did you mean 'max-autotune'?"),
    ({"inductor": {"max_autotun": True}}, "no Inductor setting 'max_autotun': did you mean 'max_autotune'?"),
    ({"inductor": ["max_autotune"]}, "'inductor' must be a mapping"),
    ({"verify": 1}, "'verify' must be True or False, not 1"),
    ({"exact_order": None}, "'exact_order' must be True or False, not None"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("through", ["torch.compile", "gradprune.compile", "accelerate", "explain", "Options"])
def test_wrong_option(through: str, options: dict[str, Any], message: str):
    model = network()
    step = backward_step(model)
    calls: dict[str, Callable[[], Any]] = {
        "torch.compile": lambda: compiled(step, **options)(*images()),
        "gradprune.compile": lambda: gradprune.compile(step, **options),  # at once, before any call
        "accelerate": lambda: gradprune.accelerate(model, **options),
        "explain": lambda: gradprune.explain(step, *images(), **options),
        "Options": lambda: gradprune.Options.parse(options),
    }
    error = raises_and_changes_nothing(gradprune.OptionError, re.escape(message), model, calls[through])
    assert isinstance(error, ValueError)


def test_wrong_mode_given_to_torch_compile():
    model = network()
    step = torch.compile(backward_step(model), backend="gradprune", mode="max-autotun")
    raises_and_changes_nothing(gradprune.OptionError, "did you mean 'max-autotune'", model, lambda: step(*images()))


def test_right_options():
    model = network()
    options = {"disable": ["early-masks"], "exact_order": True, "strict": True, "verify": True}
    step = compiled(backward_step(model), mode="default", inductor={"max_autotune": False}, **options)
    expected = backward_step(network())(*images())
    torch.testing.assert_close(step(*images()), expected)
    (report,) = gradprune.reports(step)
    assert [record.name for record in report.passes] == [
        "select-outputs",
        "narrow-outputs",
        "shape-only-operands",
        "hoist-invariants",
    ]


# --- The rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.10.0", "2.16.0", "1.13.1+cu117", "3.0.0"])
def test_unsupported_torch(version: str):
    with pytest.raises(gradprune.UnsupportedTorchError, match='pip install "torch>=2.11,<2.16"') as caught:
        check_version(version)
    assert f"torch {version} is installed" in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.0a0+git0123abc", "2.15.0", torch.__version__])
def test_supported_torch(version: str):
    check_version(version)


def test_explain_without_a_perturbation():
    model, (_, x, y) = network(), images()
    for call in (lambda: gradprune.explain(model, x), lambda: gradprune.explain(lambda x: x + 1, x)):
        error = raises_and_changes_nothing(gradprune.NoPerturbationError, "requires grad", model, call)
        assert "x_adv.detach().requires_grad_(True)" in str(error)
    raises_and_changes_nothing(
        gradprune.TrainingStepError, "training step", model, lambda: gradprune.explain(train_step(model), x, y)
    )


def test_accelerate_takes_modules():
    with pytest.raises(TypeError, match=r"takes an nn.Module, not function; use gradprune.compile for functions"):
        gradprune.accelerate(lambda x: x)


def test_reports_of_something_else():
    for other in (network(), torch.compile(network(), backend="eager"), torch.compile(images)):
        with pytest.raises(gradprune.GradpruneError, match="was not compiled by gradprune: pass what torch.compile"):
            gradprune.reports(other)
