"""Run what depends on weights alone once per attack, and never let the step see a stale value of it.

Note [Freshness]: a compiled step is called K times per attack, with weights that may change at any time between two
calls, and so may a compiled model. The prologue's values are used again if all of these hold:

- an input of the call lies in the memory of an output of the previous call, as ``x_adv`` does in
  ``x_adv = step(x_adv, x, y)``, or both calls were made in the same ``one_attack`` block: the call continues the attack
  that the values were computed for;
- every weight is the same tensor object in the same memory as when they were computed;
- no weight's version counter, which in-place operations advance, has moved since;
- no optimizer has made a step since, for fused ones do not advance the counter, nor those that write to ``.data``;
- every buffer equals the copy that was made of it, for batch norm in training mode does not advance the counter of the
  statistics that it writes.

They are also used again if every weight equals the copy that was made of it. On a CPU all are copied at once, for
comparing takes a fraction of the prologue's time. On a GPU parameters are copied when the prologue runs a second time
for weights that no counter says have changed: memory is scarcer there, and in training the copies would never be equal.
Otherwise the prologue runs again.

A GPU compares when it has done all that it was told before. Where counters and addresses say that nothing has changed,
the step is begun before the outcome is known, so that the GPU has something to do; should a weight have changed all the
same, prologue and step run again, and nobody sees what the first run returned. A step that must not run twice, because
it writes an input or is random, begins when the outcome is known.

A model returns no iterates, so outside of ``one_attack`` its weights are compared at every forward pass. Its backward
pass reads the values of its own forward pass, which autograd keeps as it keeps activations.

Writes through ``weight.data`` or numpy do not advance the counter. Between attacks they are seen all the same, because
the first step of an attack continues nothing; in the middle of one they are not. Whoever does that calls ``invalidate``
or sets the option ``always_refresh``, under which no call continues anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from . import devices
from .devices import Later, storages
from .prologue import Prologue
from .split import Split

Callback = Callable[..., Any]


class HoistedStep:
    """A compiled step and its prologue, called as the graph they were split from, see Note [Freshness]."""

    _boxed_call = True

    def __init__(
        self,
        parts: Split,
        step: Callback,
        prologue: Prologue,
        *,
        always_refresh: bool,
        returns_iterates: bool = True,
        may_repeat: bool = False,
    ) -> None:
        self._prologue = prologue
        self._prologue_inputs = parts.prologue_inputs
        self._step = step
        self._step_inputs = parts.step_inputs
        self._saved = parts.saved
        self._returns_iterates = returns_iterates
        self._always_refresh = always_refresh
        self._may_repeat = may_repeat
        self._values: list[torch.Tensor] | None = None
        # Not weak references, in whose presence torch refuses to swap tensors.
        self._weights: list[tuple[torch.Tensor, StorageWeakRef, int, int]] | None = None
        self._optimizer_steps = -1
        self._copies: list[torch.Tensor | None] | None = None
        self._stream_orders = devices.stream_orders(parts.values)
        self._outputs: list[StorageWeakRef] = []
        self._attack: object | None = None
        self.refreshes = 0
        _steps.add(self)

    def __call__(self, args: list[Any]) -> Any:
        """Call the whole graph. ``args`` is emptied, as Inductor's boxed calling convention has it."""
        weights = [args[index] for index in self._prologue_inputs]
        inputs = [args[index] for index in self._step_inputs]
        args.clear()
        for order in self._stream_orders:
            order.before_use([*(self._values or ()), *(copy for copy in self._copies or () if copy is not None)])
        valid = self._continues_attack(inputs) and self._are_unchanged(weights)
        if not valid:
            valid = self._equal_copies(weights)
            if isinstance(valid, bool):
                self._renew(weights, valid)
        if isinstance(valid, Later) and not (self._may_repeat and self._look_unchanged(weights)):
            self._renew(weights, valid.are_equal())
            valid = True
        assert self._values is not None
        given = storages(inputs)
        outputs = self._step([*inputs, *self._values])
        if isinstance(valid, Later) and not valid.are_equal():
            self._renew(weights)
            outputs = self._step([*inputs, *self._values])
        if not self._returns_iterates:
            outputs = list(outputs)
            for position, value in self._saved:
                outputs[position] = self._values[value]
            return outputs
        # What lies in the memory of an argument, such as the clean images, would make every call continue this attack.
        # The weak references keep the other addresses from being used again.
        results = [output for output in outputs if isinstance(output, torch.Tensor)]
        self._outputs = [
            StorageWeakRef(storage)
            for storage in map(torch.Tensor.untyped_storage, results)
            if storage._cdata not in given
        ]
        return outputs

    def forget(self) -> None:
        """Have the next call look at the weights again."""
        self._weights = None

    def reset(self) -> None:
        """Have the next call find nothing that an earlier one left behind."""
        self._values = self._weights = self._copies = self._attack = None
        self._outputs = []

    def reads(self, tensors: set[int]) -> bool:
        """Whether hoisted values were computed from one of the tensors with these ids."""
        return any(id(weight) in tensors for weight, *_ in self._weights or ())

    def _continues_attack(self, inputs: Sequence[Any]) -> bool:
        if self._always_refresh:
            return False
        attack, self._attack = self._attack, _attack.get()
        if attack is not None and attack is self._attack:
            return True
        return not storages(inputs).isdisjoint(reference.cdata for reference in self._outputs)

    def _look_unchanged(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether all that torch counts says that the weights are as they were."""
        if self._weights is None or self._optimizer_steps != _optimizer_steps:
            return False
        return all(
            before is weight
            and storage.cdata == weight.untyped_storage()._cdata
            and address == weight.data_ptr()
            and version == weight._version
            for weight, (before, storage, address, version) in zip(weights, self._weights, strict=True)
        )

    def _are_unchanged(self, weights: Sequence[torch.Tensor]) -> bool | Later:
        if self._copies is None or not self._look_unchanged(weights):
            return False
        return _are_equal(
            [
                (weight, copy)
                for weight, copy in zip(weights, self._copies, strict=True)
                if not isinstance(weight, nn.Parameter)
            ]
        )

    def _equal_copies(self, weights: Sequence[torch.Tensor]) -> bool | Later:
        copies = self._copies
        if copies is None or any(copy is None for copy in copies):
            return False
        return _are_equal(list(zip(weights, copies, strict=True)))

    def _renew(self, weights: Sequence[torch.Tensor], are_equal: bool = False) -> None:
        """Have the values be those of these weights."""
        if not are_equal:
            self._refresh(weights)
        self._remember(weights)

    def _refresh(self, weights: Sequence[torch.Tensor]) -> None:
        on_cpu = not any(map(devices.on_gpu, weights))
        with_parameters = on_cpu or self._look_unchanged(weights)
        self._weights = None  # should the prologue fail, nothing of it is used
        for order in self._stream_orders:
            order.before_making()
        # Not valid until they are those of these weights.
        kept, self._copies = self._copies, None
        if not self._prologue.in_place:
            self._values = None  # so that new values may take the memory of the old ones
        # Casts are explicit in the graph; what is computed here must not depend on where the step is called from.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            self._values = self._prologue(weights, self._values)
            self._copies = [
                _copied(weight, copy) if with_parameters or not isinstance(weight, nn.Parameter) else None
                for weight, copy in zip(weights, kept or [None] * len(weights), strict=True)
            ]
        for order in self._stream_orders:
            order.made()
        self.refreshes += 1

    def _remember(self, weights: Sequence[torch.Tensor]) -> None:
        self._weights = None
        if not any(weight.is_inference() for weight in weights):  # those have no version counter
            self._weights = [
                (weight, StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight._version)
                for weight in weights
            ]
            self._optimizer_steps = _optimizer_steps


def _are_equal(pairs: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> bool | Later:
    """Whether tensors hold what they held when they were copied."""
    on_gpu: list[tuple[torch.Tensor, torch.Tensor]] = []
    for tensor, copy in pairs:
        assert copy is not None
        if devices.on_gpu(tensor) and tensor.numel():
            on_gpu.append((tensor, copy))
        elif not torch.equal(tensor, copy):
            return False
    return devices.compare(*zip(*on_gpu, strict=True)) if on_gpu else True


def _copied(weight: torch.Tensor, copy: torch.Tensor | None) -> torch.Tensor:
    """A copy of ``weight``, in the memory of the last one: memory that is new to the process costs several times more.

    In training all of this runs once per update.
    """
    return weight.clone() if copy is None else copy.copy_(weight)


_attack: ContextVar[object | None] = ContextVar("attack", default=None)


@contextmanager
def one_attack() -> Iterator[None]:
    """Have compiled steps that are called in the block take its calls for steps of one attack."""
    token = _attack.set(object())
    try:
        yield
    finally:
        _attack.reset(token)


_steps: weakref.WeakSet[HoistedStep] = weakref.WeakSet()
_optimizer_steps = 0


def reset_all() -> None:
    """Have all compiled steps in this process begin anew, after calls that were made with tensors of another kind."""
    for step in list(_steps):
        step.reset()


def _count_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


def invalidate(*modules: nn.Module) -> None:
    """Have compiled steps read weights anew, after a change that torch cannot see.

    Necessary only after writing to ``weight.data``, or to its memory through numpy, in the middle of an attack. Every
    other change, and such a write between two attacks, is noticed without it.

    Args:
        modules: The modules whose weights have changed. Without any, all steps in this process are concerned.

    Raises:
        TypeError: An argument is not an ``nn.Module``.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"invalidate takes the nn.Modules whose weights changed, not {type(module).__name__}")
    changed = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    for step in list(_steps):
        if not modules or step.reads(changed):
            step.forget()
