"""What ``gradprune inspect`` looks at, by name: a stock attack on a model, or a step of the user's own."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from gradprune.errors import GradpruneError, OptionError
from gradprune.torch_compat.aot import FakeTensorMode, is_fake

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
        device: Where weights and inputs are.
        autocast: Type in which the model of a stock attack computes, such as ``"float16"``; ``None`` for its own.
    """

    name: str
    form: str = "step"
    batch: int = BATCH
    image_size: int | None = None
    real: bool = False
    device: str = "cpu"
    autocast: str | None = None


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
    has_memory = options.real or not options.name.startswith(TIMM)
    built = None if has_memory else _timm(ModelOptions(options.name), context, options.device)
    with context, nullcontext() if options.device == "cpu" else torch.device(options.device):
        made = _make(options.name) if built is None else built
        if isinstance(made, nn.Module):
            if options.device != "cpu":  # some of it may have been made elsewhere
                _take_memory(made, context, options.device)
            function, args = _stock(made.eval(), options)
        elif options.autocast is not None:
            raise OptionError(
                f"autocast is for a model, and {options.name} is a step: write torch.autocast around the model in it"
            )
        else:
            function, args = made
    return Target(function, args, context)


def load_real_model(options: TargetOptions) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model with its weights, in evaluation mode on the CPU, and the shape ``(C, H, W)`` of its images.

    Raises:
        OptionError: There is no such target, or it is no model.
    """
    if options.name.startswith(TIMM):
        let_torchvision_import()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _make(options.name)
    if not isinstance(made, nn.Module):
        raise OptionError(f"{options.name} is a step of its own, and what is wanted is a model: pass that")
    model = made.eval()
    return model, _shape(model, options)


def without_memory(model: nn.Module, mode: FakeTensorMode, device: str) -> nn.Module:
    """A copy of a model, of tensors without memory on a device."""
    copied = copy.deepcopy(model)
    _take_memory(copied, mode, device)
    return copied


def in_autocast(model: nn.Module, device: str, dtype: torch.dtype | None) -> nn.Module:
    """A model that computes in another type, with logits in float32; ``None`` leaves it as it is."""
    return model if dtype is None else _Autocast(model, device, dtype).eval()


def _timm(options: ModelOptions, mode: FakeTensorMode, device: str) -> nn.Module:
    """A model of timm, of tensors without memory.

    It is built outside of the mode: many models read values while they are built, such as rates of stochastic depth,
    and fake tensors have none.
    """
    try:
        with _weights_without_memory(mode):
            model = load_model(options, seed=0)
    except OptionError:
        raise
    except Exception:  # it reads its weights as well
        model = load_model(options, seed=0)
    _take_memory(model, mode, device)
    return model


def _take_memory(model: nn.Module, mode: FakeTensorMode, device: str) -> None:
    """Have a model consist of tensors without memory, on a device."""
    moved: dict[int, tuple[Any, Any]] = {}  # weights that modules share stay shared

    def move(value: Any) -> Any:
        if id(value) not in moved:
            moved[id(value)] = value, _without_memory(value, mode, device)
        return moved[id(value)][1]

    for module in model.modules():
        for name, value in vars(module).items():
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                vars(module)[name] = tree_map(move, value)


@contextmanager
def _weights_without_memory(mode: FakeTensorMode) -> Iterator[None]:
    """Have modules give up the memory of every parameter that they get meanwhile."""
    register = nn.Module.register_parameter

    def give_up(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, _without_memory(param, mode))

    nn.Module.register_parameter = give_up  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _without_memory(value: Any, mode: FakeTensorMode, device: str = "cpu") -> Any:
    """A fake tensor on a device for a tensor; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if not is_fake(value):
        value = mode.from_tensor(value)
    if value.device.type == device:
        return value
    with mode:
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved


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
    if options.autocast is not None:
        model = in_autocast(model, options.device, getattr(torch, options.autocast))
    if options.form == "model":
        return model, (x.requires_grad_(True),)

    def attack_step(x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        x_adv = x_adv.detach().requires_grad_(True)
        F.cross_entropy(model(x_adv), y).backward()
        assert x_adv.grad is not None
        x_adv = x_adv.detach() + STEP_SIZE * x_adv.grad.sign()
        return torch.clamp(x + (x_adv - x).clamp(-EPS, EPS), 0, 1)

    return attack_step, (x.clone(), x, torch.zeros(options.batch, dtype=torch.long))


class _Autocast(nn.Module):
    """A model that computes in another type, with logits in float32."""

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype):
            logits: Tensor = self.model(x)
        return logits.float()


def _shape(model: nn.Module, options: TargetOptions) -> tuple[int, int, int]:
    """Channels, height and width of the images that ``model`` is made for, as far as it says."""
    config: Any = getattr(getattr(model, "model", model), "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, SIZE, SIZE)
    if options.name == DIGITS:
        channels, height, width = 1, DIGITS_SIZE, DIGITS_SIZE
    if options.image_size is not None:
        height = width = options.image_size
    return int(channels), int(height), int(width)
