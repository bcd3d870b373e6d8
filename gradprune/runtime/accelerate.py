"""The model form as a drop-in ``nn.Module``, for attack libraries that want a model and call backward themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradprune.backend import compile as compile_


class AcceleratedModule(nn.Module):
    """A module that computes what another one computes, compiled without weight gradients.

    Parameters, buffers, submodules and the training flag are the original's own, so ``state_dict``, ``to``, ``train``,
    ``eval`` and assignments act on both. Unknown attributes are looked up in the original. Hooks registered on the
    original run inside; hooks registered here run around the compiled call.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        fresh = vars(nn.Module())
        self.__dict__.update({name: value for name, value in fresh.items() if name != "training"})
        self.__dict__.update({name: vars(model)[name] for name in ("_parameters", "_buffers", "_modules")})
        self.__dict__["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        self.__dict__["_gradprune_original"] = model
        self.__dict__["_gradprune_options"] = options
        self.__dict__["_gradprune_compiled"] = compile_(model, **options)

    @property
    def training(self) -> bool:
        """The original's training flag."""
        return bool(self.__dict__["_gradprune_original"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_gradprune_original"].training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns."""
        return self.__dict__["_gradprune_compiled"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_gradprune_original"], name)

    def __reduce__(self) -> Any:
        return _rebuild, (self.__dict__["_gradprune_original"], self.__dict__["_gradprune_options"])

    def extra_repr(self) -> str:
        """Name of the original's class."""
        return f"gradprune: {type(self.__dict__['_gradprune_original']).__name__}"


def _rebuild(model: nn.Module, options: dict[str, Any]) -> AcceleratedModule:
    return AcceleratedModule(model, options)


def accelerate(model: nn.Module, **options: Any) -> AcceleratedModule:
    """Wrap a model for attack libraries that call ``loss.backward()`` or ``autograd.grad`` themselves.

    The wrapper computes what the model computes and can be used wherever an ``nn.Module`` is expected (Torchattacks,
    Foolbox, ART, ...). Gradients reach the input only: the ``.grad`` of parameters is never touched, and asking for a
    weight's gradient explicitly raises. The model itself stays as it is.

    Args:
        model: The model to attack, on any device.
        options: See ``gradprune.Options``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        OptionError: An option or a value is unknown.
    """
    if isinstance(model, AcceleratedModule):
        return accelerate(model.__dict__["_gradprune_original"], **options) if options else model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes an nn.Module, not {type(model).__name__}; use gradprune.compile for functions"
        )
    return AcceleratedModule(model, options)
