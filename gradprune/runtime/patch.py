"""Attacks of other libraries on a compiled model: their own objects and functions, which keep all else they do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradprune.compiler.hoisted_step import one_attack
from gradprune.compiler.options import Options
from gradprune.errors import GradpruneError

from .accelerate import AcceleratedModule, accelerate

PATCHED = "_gradprune_patched"
ABSENT = object()

Change = tuple[Any, str, Any]
"""Whose attribute, which one, and its new value."""


class Models:
    """The compiled models of one attack, by the identity of what they were made of.

    Args:
        options: See ``gradprune.Options``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        Options.parse(options)
        self._options = options
        self.compiled: dict[int, AcceleratedModule] = {}

    def of(self, model: nn.Module) -> AcceleratedModule:
        """The compiled model of ``model``, which it keeps alive."""
        if id(model) not in self.compiled:
            self.compiled[id(model)] = accelerate(model, **self._options)
        return self.compiled[id(model)]

    def only(self, model: nn.Module) -> AcceleratedModule:
        """The same for one that is given anew at every call: the last one is kept, not all."""
        self.compiled = {id(model): self.of(model)}
        return self.compiled[id(model)]


@dataclass
class Patch:
    """What was changed of an attack: the models it was given, and the attributes as they were."""

    models: Models
    before: list[Change]


def patch(attack: Any, **options: Any) -> Any:
    """Have an attack of another library compute its gradients with gradprune.

    The attack keeps its random start, draws, targets, normalisation, bounds, and the types it takes and returns; it is
    changed in place. Its model stays as it is, and what else uses the model does not notice. Weights are compared with
    those of the last attack once, when an attack begins, and not at every pass as with ``accelerate``.

    Args:
        attack: An attack of Torchattacks, torchattack, Foolbox or ART; a model of Foolbox or a classifier of ART,
            whichever attack it is given to; or a function whose first argument is the model, as those of adv-lib and
            CleverHans are.
        options: See ``gradprune.Options``.

    Returns:
        ``attack``, or for a function another function.

    Raises:
        TypeError: It is none of these. ``gradprune.accelerate(model)`` serves whatever takes an ``nn.Module``.
        OptionError: An option or a value is unknown.
    """
    models = Models(options)
    if PATCHED in getattr(attack, "__dict__", {}):
        attack = unpatch(attack)
    if inspect.isfunction(attack) or isinstance(attack, functools.partial):
        patched = _function(attack, models)
        _set(patched, PATCHED, Patch(models, []))
        return patched
    changes = list(_changes(attack, models))
    before = [(owner, name, _get(owner, name)) for owner, name, _ in changes]
    for change in changes:
        _set(*change)
    _set(attack, PATCHED, Patch(models, before))
    return attack


def unpatch(attack: Any) -> Any:
    """Undo ``patch``.

    Returns:
        ``attack`` as it was; the function that a patched function was made of.

    Raises:
        GradpruneError: ``attack`` is not patched.
    """
    patched = getattr(attack, "__dict__", {}).get(PATCHED)
    if patched is None:
        raise GradpruneError(f"{attack!r} was not patched by gradprune")
    if inspect.isfunction(attack):
        return attack.__wrapped__  # type: ignore[attr-defined]
    for owner, name, value in reversed(patched.before):
        _set(owner, name, value)
    _set(attack, PATCHED, ABSENT)
    return attack


def _get(owner: Any, name: str) -> Any:
    return getattr(owner, name) if isinstance(owner, nn.Module) else vars(owner).get(name, ABSENT)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, nn.Module):
        setattr(owner, name, value)
    elif value is ABSENT:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)


def _changes(attack: Any, models: Models) -> Iterator[Change]:
    """What there is to change of an object of a library."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(attack).__mro__}
    if {"torchattacks", "torchattack"} & libraries and isinstance(getattr(attack, "model", None), nn.Module):
        for one in _with_inner(attack):
            yield one, "model", models.of(one.model)
        yield attack, "forward", _as_one(attack.forward)
    elif "foolbox" in libraries and hasattr(attack, "run"):
        yield attack, "run", _function(attack.run, models)
    elif "foolbox" in libraries and (inside := _inside(_innermost(attack))) is not None:
        yield _innermost(attack), "_model", _as_foolbox_calls(models.of(inside))
    elif "art" in libraries and hasattr(attack, "generate"):
        yield from _changes(attack.estimator, models)
        yield attack, "generate", _as_one(attack.generate)
    elif "art" in libraries and isinstance(getattr(getattr(attack, "_model", None), "_model", None), nn.Module):
        yield attack._model, "_model", models.of(attack._model._model)
    else:
        raise TypeError(
            f"patch does not know how {type(attack).__module__}.{type(attack).__qualname__} uses its model: give it "
            "gradprune.accelerate(model) in place of the model"
        )


def _with_inner(attack: Any) -> Iterator[Any]:
    """An attack of Torchattacks and those that it consists of."""
    yield attack
    for inner in getattr(attack, "_attacks", {}).values():
        yield from _with_inner(inner)


def _as_one(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def attack(*args: Any, **kwargs: Any) -> Any:
        with one_attack():
            return call(*args, **kwargs)

    return attack


def _function(call: Callable[..., Any], models: Models) -> Callable[..., Any]:
    """A function that is given its model, an ``nn.Module`` or one of Foolbox, as its first argument."""
    signature = inspect.signature(call)
    first = next(iter(signature.parameters), "")

    @functools.wraps(call)
    def attack(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        model = bound.arguments.get(first)
        with ExitStack() as stack:
            if isinstance(model, nn.Module):
                bound.arguments[first] = models.only(model)
            else:
                stack.enter_context(_swapped(_innermost(model), models))
            stack.enter_context(one_attack())
            return call(*bound.args, **bound.kwargs)

    return attack


@contextmanager
def _swapped(model: Any, models: Models) -> Iterator[None]:
    """A model of Foolbox with another one inside."""
    inside = _inside(model)
    if inside is None:
        raise TypeError(f"a patched attack takes an nn.Module or a PyTorchModel of Foolbox, not {type(model).__name__}")
    before = model._model
    model._model = _as_foolbox_calls(models.only(inside))
    try:
        yield
    finally:
        model._model = before


def _innermost(model: Any) -> Any:
    """The model of Foolbox behind those that only change its bounds."""
    while hasattr(getattr(model, "_model", None), "_model"):
        model = model._model
    return model


def _inside(model: Any) -> nn.Module | None:
    """What a model of Foolbox calls."""
    call = getattr(model, "_model", None)
    found = inspect.getclosurevars(call).nonlocals.get("model") if inspect.isfunction(call) else None
    return found if isinstance(found, nn.Module) else None


def _as_foolbox_calls(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Outputs require a gradient if the inputs do."""

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(x.requires_grad):
            result: torch.Tensor = model(x)
        return result

    return call
