"""The model form as a drop-in ``nn.Module``, for attack libraries that want a model and call backward themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from gradprune.backend import RUNS_EAGERLY
from gradprune.backend import compile as compile_
from gradprune.compiler.misuse import without_weight_gradients
from gradprune.compiler.options import Options
from gradprune.errors import TrainingStepError
from gradprune.torch_compat import aot

from .double_backward import WithDoubleBackward, may_run_again
from .guard import frozen, modules_of

log = logging.getLogger(__name__)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _differentiable(value: torch.Tensor) -> torch.Tensor:
    """A copy that a gradient can be taken for, and that may be written to."""
    return value.detach().requires_grad_(True).clone() if value.is_floating_point() else value


def _hooked(modules: list[nn.Module]) -> nn.Module | None:
    """A module with a hook behind its forward pass or in its backward pass, ``None`` if there is none."""
    return next((one for one in modules if one._forward_hooks or one._backward_hooks or one._backward_pre_hooks), None)


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
        self.__dict__["_gradprune_compiled"] = {}
        self.__dict__["_gradprune_notes"] = []
        Options.parse(options)

    @property
    def training(self) -> bool:
        """The original's training flag."""
        return bool(self.__dict__["_gradprune_original"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["_gradprune_original"].training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns."""
        model = self.__dict__["_gradprune_original"]
        if torch.compiler.is_compiling():
            return model(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [value for value in leaves if isinstance(value, torch.Tensor)]
        modules = modules_of(model)
        with frozen(modules, inputs) as weights:
            hooked = _hooked(modules)
            call = self._compiled_for(inputs) if hooked is None else self._eager(hooked)
            if hooked is not None and weights and not any(value.requires_grad for value in inputs):
                # What a hook looks at has a gradient in eager mode, be it for the weights' sake only.
                args, kwargs = tree_map_only(torch.Tensor, _differentiable, (args, kwargs))
            try:
                result = call(model, args, kwargs)
            except RuntimeError as error:
                if "retain_grad" not in str(error):
                    raise
                raise TrainingStepError(
                    f"a hook asks for the gradient of a value in {type(model).__name__} that depends on weights alone, "
                    "which gradprune does not compute. If that is what the attack changes, mark the layer or parameter "
                    "it comes from: gradprune.perturbation(model.embedding)"
                ) from error
            if not torch.is_grad_enabled() or aot.is_transformed():
                return result
            if hooked is None and may_run_again(modules):
                result = self._differentiable_twice(result, leaves, structure, modules)
        if not weights:
            return result
        return tree_map_only(torch.Tensor, lambda output: without_weight_gradients(output, weights), result)

    def _eager(self, hooked: nn.Module) -> Any:
        """What runs a model with such a hook: a compiled one has no tensors between its layers to take gradients of."""
        model = self.__dict__["_gradprune_original"]
        name, layer = type(model).__name__, next(name for name, one in model.named_modules() if one is hooked)
        self._note(
            f"{name} has a hook on {layer or 'itself'}, which may keep or change what autograd makes of that layer"
        )
        return _call

    def _note(self, reason: str) -> None:
        """Say once why something is not compiled."""
        notes = self.__dict__["_gradprune_notes"]
        if reason not in notes:
            notes.append(reason)
            log.warning("gradprune: %s, with frozen weights: %s", RUNS_EAGERLY, reason)

    def _differentiable_twice(self, result: Any, leaves: list[Any], structure: Any, modules: list[nn.Module]) -> Any:
        """The result, from which gradients that depend on inputs can be taken."""
        model = self.__dict__["_gradprune_original"]
        attacked = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        kept = [
            one for module in modules for one in module._parameters.values() if one is not None and one.requires_grad
        ]
        values, outline = tree_flatten(result)
        places = [at for at, value in enumerate(values) if isinstance(value, torch.Tensor) and value.requires_grad]
        if not places or (not attacked and not kept):
            return result

        def again(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            self._note(f"a gradient of {type(model).__name__} is differentiated (create_graph=True) or batched")
            inputs = [*leaves]
            for at, tensor in zip(attacked, tensors, strict=False):
                inputs[at] = tensor
            with frozen(modules, [one for one in inputs if isinstance(one, torch.Tensor)]):
                repeated_args, repeated_kwargs = tree_unflatten(inputs, structure)
                repeated = tree_flatten(model(*repeated_args, **repeated_kwargs))[0]
            return [repeated[at] for at in places]

        inputs = [*(leaves[at] for at in attacked), *kept]
        outputs = WithDoubleBackward.apply(again, len(places), *(values[at] for at in places), *inputs)
        for at, output in zip(places, outputs, strict=True):
            values[at] = output
        return tree_unflatten(values, outline)

    def _compiled_for(self, inputs: list[torch.Tensor]) -> Any:
        """What is compiled for such a call.

        Dynamo compiles one code object a few times and then never again. So calls that differ in what no code can be
        shared between have code objects of their own; those of other batch sizes share one.
        """
        model, compiled = (self.__dict__[name] for name in ("_gradprune_original", "_gradprune_compiled"))
        kinds = tuple((one.dtype, one.device.type, one.requires_grad, one.ndim) for one in inputs)
        device = inputs[0].device.type if inputs else "cpu"
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = kinds, cast, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), model.training
        if key not in compiled:
            code = _call.__code__.replace(co_name=type(model).__name__)
            compiled[key] = compile_(FunctionType(code, _call.__globals__), **self.__dict__["_gradprune_options"])
        return compiled[key]

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


class AcceleratedContainer(AcceleratedModule):
    """The same of a module with a length, such as ``nn.Sequential``."""

    def __len__(self) -> int:
        return len(self.__dict__["_gradprune_original"])

    def __iter__(self) -> Any:
        return iter(self.__dict__["_gradprune_original"])

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__["_gradprune_original"][key]

    def __contains__(self, key: Any) -> bool:
        return key in self.__dict__["_gradprune_original"]

    def __bool__(self) -> bool:
        return True


def _rebuild(model: nn.Module, options: dict[str, Any]) -> AcceleratedModule:
    kind = AcceleratedContainer if hasattr(type(model), "__len__") else AcceleratedModule
    return kind(model, options)


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
    return _rebuild(model, options)
