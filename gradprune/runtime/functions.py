"""The functions that are compiled: gradient and logits of one model, for batches of a few sizes.

Note [Sizes]: a compiled step is specialised to the size of its batch, and compiling another takes as long as the first.
So the largest batch seen so far has a compilation of its own, and all others share one, on a CPU with a symbolic size,
which takes no longer to compute there; what only asks for logits has but the latter. For a single row, and for fewer
than ``FEW`` of a larger batch, torch would compile it anew; these are filled up with copies of the first row, the
latter until they have come ``OFTEN`` times, such as the samples that withstand most of Square's queries. On a GPU,
where layouts are chosen for known sizes only, all others are cut into quarters of the largest, and so is what is
compiled in the background or fixes the size of its batch. That makes it possible for samples to leave an attack that is
over for them, and for the last batch of a data set to be a smaller one. It requires that samples do not see each other,
which batch norm in training mode breaks: then a batch is computed as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.backend import compile as compile_step
from gradprune.torch_compat import dynamo

Answer = tuple[Tensor, Tensor, Tensor]
"""Losses ``(N,)``, logits ``(N, classes)`` and the gradient of the sum of the losses, shaped like the inputs."""

Model = Callable[[Tensor], Tensor]

PARTS = 4
"""Into how many small batches the largest is cut."""

SMALLEST = 4
"""Rows of a small batch, at least: kernels for a single row are slow ones."""

FEW = 16
"""Rows from which on torch chooses another kernel for some convolutions: one graph is not for more and for fewer."""

ANY = 0
"""Stands for any size."""

OFTEN = 200
"""How often fewer rows are filled up before they are compiled for."""


def gradient_function(loss: Callable[..., Tensor], autocast: torch.dtype | None) -> Any:
    """``(model, x, labels, *more) -> Answer`` for a loss ``(logits, labels, *more) -> (N,)``."""

    def gradient(model: Model, x: Tensor, labels: Tensor, *more: Tensor) -> Answer:
        x = x.detach().requires_grad_(True)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            logits = model(x)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        losses = loss(logits, labels, *more)
        (direction,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), logits.detach(), direction

    return gradient


def logits_function(autocast: torch.dtype | None) -> Any:
    """``(model, x) -> logits``, without anything that a backward pass would need."""

    def logits(model: Model, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            values = model(x)
        is_half = isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16)
        return values.float() if is_half else values

    return logits


def small_size(largest: int) -> int:
    """The other size beside ``largest`` where sizes are not symbolic, see Note [Sizes]."""
    return min(largest, max(-(-largest // PARTS), SMALLEST))


class Sized:
    """A function of a model and of batches, compiled for a few sizes, see Note [Sizes].

    It does not hold on to the model, so that it can be kept for as long as the model lives.

    Args:
        function: The function.
        compile_one: Compiles it for one size; ``None`` leaves it as it is.
        compile_any: Compiles it for any size, if that is possible.
        has_own_largest: Whether the largest batch has a compilation of its own in spite of that.
    """

    def __init__(
        self,
        function: Any,
        compile_one: Callable[[Any], Any] | None,
        compile_any: Callable[[Any], Any] | None = None,
        *,
        has_own_largest: bool = True,
    ) -> None:
        self._function = function
        self._compile_one = compile_one
        self._compile_any = compile_any
        self._has_own_largest = has_own_largest
        self._largest = 0
        self._compiled: dict[int, Any] = {}
        self._few = 0

    def __call__(
        self, model: Model, x: Tensor, *others: Tensor, separable: bool = True, batch: int | None = None
    ) -> Any:
        """Call the function on all rows of ``x`` and of ``others``, or on several parts of them.

        Args:
            model: The model.
            x: Inputs ``(N, ...)``.
            others: More arguments; scalars are passed on, all else is cut like ``x``.
            separable: Whether a row's result depends on that row alone.
            batch: Rows to compute at once, at most.
        """
        if self._compile_one is None and (batch is None or len(x) <= batch):
            return self._function(model, x, *others)
        if not separable:
            return self.of_size(len(x))(model, x, *others)
        self._largest = max(self._largest, batch or len(x))
        try:
            return self._in_pieces(model, x, *others)
        except dynamo.SIZE_IS_FIXED:
            if self._compile_any is None:
                raise
            self._compile_any = None
            self._compiled.pop(ANY, None)
            return self._in_pieces(model, x, *others)

    def _in_pieces(self, model: Model, x: Tensor, *others: Tensor) -> Any:
        pieces, begin = [], 0
        while begin < len(x):
            size = self._next_size(len(x) - begin)
            end = min(begin + size, len(x))
            pieces.append(self.padded(size, model, x[begin:end], *(rows_of(one, begin, end) for one in others)))
            begin = end
        return joined(pieces)

    def _next_size(self, rows: int) -> int:
        """The size to compute the first of ``rows`` rows in."""
        if rows >= self._largest:
            return self._largest
        if self._compile_any is None:
            small = small_size(self._largest)
            return small if -(-rows // small) * small < self._largest else self._largest
        if rows < FEW < self._largest and self._few < OFTEN:
            self._few += 1
            return FEW
        return rows

    def padded(self, size: int, model: Model, x: Tensor, *others: Tensor) -> Any:
        """Call the function that is compiled for ``size`` rows on that many or fewer."""
        rows = len(x)
        is_symbolic = self._compile_any is not None and (size < self._largest or not self._has_own_largest)
        if is_symbolic:
            size = max(size, 2)
        values = [filled(value, size - rows) for value in (x, *others)]
        if is_symbolic:
            result = self._of_any_size()(model, *(dynamo.with_symbolic_batch(value) for value in values))
        else:
            result = self.of_size(size)(model, *values)
        if rows == size:
            return result
        return result[:rows] if isinstance(result, Tensor) else tuple(part[:rows] for part in result)

    @property
    def compilations(self) -> int:
        """How many sizes have been compiled."""
        return len(self._compiled)

    @property
    def compiled(self) -> list[Any]:
        """The function as compiled for every size so far."""
        return [*self._compiled.values()]

    def of_size(self, size: int) -> Any:
        """The function for so many rows, compiled if it has not been."""
        return self._function if self._compile_one is None else self._of(size, self._compile_one)

    def _of_any_size(self) -> Any:
        assert self._compile_any is not None
        return self._of(ANY, self._compile_any)

    def _of(self, size: int, compile: Callable[[Any], Any]) -> Any:
        if size not in self._compiled:
            plain = self._function
            # Dynamo allows a few compilations for each code object, so each size has one of its own.
            own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, closure=plain.__closure__)
            self._compiled[size] = compile(own)
        return self._compiled[size]


def joined(pieces: Sequence[Any]) -> Any:
    """One result of several for some rows each."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], Tensor):
        return torch.cat(list(pieces))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def rows_of(value: Tensor, begin: int, end: int) -> Tensor:
    """Some rows of an argument; all of a scalar."""
    return value[begin:end] if value.ndim else value


def filled(value: Tensor, missing: int) -> Tensor:
    """An argument with ``missing`` copies of its first row at the end."""
    if not value.ndim or not missing:
        return value
    return torch.cat([value, value[:1].expand(missing, *value.shape[1:])])


class Functions:
    """The functions of one model. They go when it goes, and nothing of them is in it, should it be copied or saved.

    Attributes:
        classes: How many classes the model tells apart, by the shape of one input and the number of weights, with which
            an exchanged last layer is another model.
    """

    def __init__(self) -> None:
        self._functions: dict[Any, Sized] = {}
        self.classes: dict[tuple[torch.Size, int], int] = {}

    @staticmethod
    def of(model: Any) -> Functions:
        """The functions of ``model``."""
        return _functions_of[id(model)] if id(model) in _functions_of else Functions().keep(model)

    def keep(self, model: Any) -> Functions:
        """Be the functions of ``model`` from now on, for as long as it lives."""
        with suppress(TypeError):  # nothing tells when this one goes
            weakref.finalize(model, _functions_of.pop, id(model), None).atexit = False
            _functions_of[id(model)] = self
        return self

    def get(self, key: Any, make: Callable[[], Sized]) -> Sized:
        """The function kept under ``key``, made if there is none."""
        if key not in self._functions:
            self._functions[key] = make()
        return self._functions[key]

    @property
    def compilations(self) -> int:
        """How many times the model has been compiled."""
        return sum(function.compilations for function in self._functions.values())

    @property
    def compiled(self) -> list[Any]:
        """What ``torch.compile`` returned for the model, of every function and size, to look up reports by."""
        return [one for function in self._functions.values() for one in function.compiled]


_functions_of: dict[int, Functions] = {}
"""By the identity of a model that is alive."""


def compiler(options: dict[str, Any], *, forward_only: bool = False, any_size: bool = False) -> Callable[[Any], Any]:
    """What compiles a function with gradprune, for one size or for what is marked as symbolic."""
    dynamic = None if any_size else False
    return lambda function: compile_step(function, dynamic=dynamic, **{**options, "forward_only": forward_only})


def original(model: Any) -> Any:
    """The model behind ``torch.compile`` or ``accelerate``: the step is compiled as a whole."""
    model = getattr(model, "_gradprune_original", model)
    return model._orig_mod if isinstance(model, nn.Module) and hasattr(model, "_orig_mod") else model
