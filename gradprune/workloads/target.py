"""What ``gradprune inspect`` looks at, by name: a stock attack on a model, or a step of the user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.errors import GradpruneError, OptionError
from gradprune.torch_compat.aot import FakeTensorMode

from .models import DIGITS, FORMS, TIMM, ModelOptions, import_named, load_model
from .vision import let_torchvision_import

EPS, STEP_SIZE = 8 / 255, 2 / 255
BATCH, SIZE, DIGITS_SIZE = 8, 224, 8


@dataclass(frozen=True)
class TargetOptions:
    """Which step, and of which size.

    Attributes:
        name: ``timm:NAME``, ``digits`` or ``module:name``.
        form: ``"step"`` or ``"model"``: whether a stock attack is compiled as a whole or only its model.
        batch: Images in a batch of a stock attack.
        image_size: Height and width of its images; ``None`` for what the model is made for.
        real: Allocate weights and inputs.
    """

    name: str
    form: str = "step"
    batch: int = BATCH
    image_size: int | None = None
    real: bool = False


@dataclass(frozen=True)
class Target:
    """A step or a model, its arguments, and the context in which to call it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    context: AbstractContextManager[Any]


def load_target(options: TargetOptions) -> Target:
    """Make the step and its arguments, of tensors without memory unless ``real``.

    Raises:
        OptionError: There is no such target, or it is none that can be inspected.
    """
    if options.name.startswith(TIMM):
        let_torchvision_import()
        importlib.import_module("timm")  # what it makes while it is imported shall be real
    context: Any = nullcontext() if options.real else FakeTensorMode()
    # Some models of timm read values while they are built, of which fake tensors have none.
    ready = _make(options.name) if options.name.startswith(TIMM) else None
    with context:
        made = _make(options.name) if ready is None else ready if options.real else _without_memory(ready, context)
        if isinstance(made, nn.Module):
            function, args = _stock(made.eval(), options)
        else:
            function, args = made
    return Target(function, args, context)


def _without_memory(model: nn.Module, context: FakeTensorMode) -> nn.Module:
    """The model with fake tensors in place of its own."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = context.from_tensor(tensor)  # type: ignore[assignment]
    return model


def _make(name: str) -> Any:
    """A model, or a step with its arguments."""
    if name == DIGITS:
        from .networks import DigitsNet

        return DigitsNet()  # trained or not makes no difference here
    if name.startswith(TIMM):
        return load_model(ModelOptions(name), seed=0)
    if ":" not in name:
        raise OptionError(f"no target {name!r}: pass {FORMS}; gradprune inspect --help explains them")
    found = import_named(name, "target")
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise OptionError(f"target {name} is of type {type(found).__name__}: {CONVENTION}")
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(found).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        needed = []
    if needed:
        raise OptionError(f"target {name} needs arguments ({', '.join(needed)}): {CONVENTION}")
    try:
        made = found()
    except Exception as error:  # whatever the user's function raises
        raise GradpruneError(
            f"{name}() failed: {type(error).__name__}: {error}. "
            "Unless --real is passed, tensors have shapes but no values"
        ) from error
    if isinstance(made, nn.Module):
        return made
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], (tuple, list))):
        raise OptionError(f"target {name} returned what is of type {type(made).__name__}: {CONVENTION}")
    return made[0], tuple(made[1])


CONVENTION = (
    "a target is a torch.nn.Module, or a function without arguments that returns one, or that returns "
    "(step, (x_adv, x, y)), an attack step and a tuple of its arguments"
)


def _stock(model: nn.Module, options: TargetOptions) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One step of PGD in the Linf ball on ``model``, or the model as such an attack calls it."""
    x = torch.rand(options.batch, *_shape(model, options))
    if options.form == "model":
        return model, (x.requires_grad_(True),)

    def attack_step(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(model(x_adv), y).backward()
        assert x_adv.grad is not None
        x_adv = x_adv.detach() + STEP_SIZE * x_adv.grad.sign()
        return torch.clamp(x + (x_adv - x).clamp(-EPS, EPS), 0, 1)

    return attack_step, (x.clone(), x, torch.zeros(options.batch, dtype=torch.long))


def _shape(model: nn.Module, options: TargetOptions) -> tuple[int, int, int]:
    """Channels, height and width of the images that ``model`` is made for, as far as it says."""
    config: Any = getattr(getattr(model, "model", model), "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, SIZE, SIZE)
    if options.name == DIGITS:
        channels, height, width = 1, DIGITS_SIZE, DIGITS_SIZE
    if options.image_size is not None:
        height = width = options.image_size
    return int(channels), int(height), int(width)
