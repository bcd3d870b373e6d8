"""A function that is compiled for a size once that has paid, and run eagerly wherever that is faster.

Note [What a call costs]: a compilation takes as long as thousands of calls of a small network, and a compiled call on a
batch that is filled up may take longer than an eager one on the rows that there are. So calls are eager, and timed,
until together they have taken as long as a compilation. Then the function is compiled for the most rows among them, and
from there on every number of rows is computed in whichever way is cheaper by the seconds measured. What goes on running
eagerly, such as the few samples that are left at the end of an attack, may add up to a compilation for a size of its
own. So it does not take much longer than twice the better of always and never compiling, though nothing tells in
advance how many calls there will be. What is called depends on a clock: two runs may differ by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functions import Model, Sized, filled, joined, rows_of

FIRST_SECONDS = 15.0
"""What a compilation is thought to take before there has been one: that of a small network."""

SIZES = 3
"""Sizes to compile a function for, at most."""

TRIES = 3
"""Calls in each way that are timed to compare them; the fastest counts."""


class Measured(Sized):
    """As ``Sized``, but see Note [What a call costs]."""

    def __init__(self, function: Any, compile_one: Callable[[Any], Any]) -> None:
        super().__init__(function, compile_one)
        self._seconds: dict[int, float] = {}  # of a compiled call, by its rows
        self._fixed = self._per_row = 0.0  # seconds of an eager call
        self._spent, self._most = 0.0, 0  # in eager calls since the last compilation; rows of the largest of these
        self._patience = FIRST_SECONDS
        self._eager_below = 0  # so many rows, and fewer, are faster eagerly than compiled for their number

    def __call__(
        self, model: Model, x: Tensor, *others: Tensor, separable: bool = True, batch: int | None = None
    ) -> Any:
        """See ``Sized``."""
        rows = len(x)
        if separable and batch is not None and rows > batch:
            cuts = [(begin, begin + batch) for begin in range(0, rows, batch)]
            return joined([self(model, *(rows_of(one, *cut) for one in (x, *others)), batch=batch) for cut in cuts])
        size = self._cheapest(rows, separable=separable)
        if size is not None:
            return self.padded(size, model, x, *others)
        if rows <= self._eager_below or self.compilations == SIZES:
            return self._function(model, x, *others)
        self._most = max(self._most, rows) if separable else rows
        if self._spent >= self._patience:
            self._compile(model, *(filled(one, self._most - rows) for one in (x, *others)))
            return self(model, x, *others, separable=separable)
        seconds, result = _timed(self._function, model, x, *others)
        self._spent += seconds
        return result

    def _cheapest(self, rows: int, *, separable: bool) -> int | None:
        """The size to compute so many rows in; ``None`` for an eager call."""
        fit = {size: seconds for size, seconds in self._seconds.items() if size == rows or (separable and size > rows)}
        size = min(fit, key=lambda size: fit[size], default=None)
        return size if size is not None and fit[size] < self._fixed + self._per_row * rows else None

    def _compile(self, model: Model, x: Tensor, *others: Tensor) -> None:
        """Compile the function for the rows of ``x``, and find out what calls cost."""
        size = len(x)
        few = max(size // 4, 1)
        part = [rows_of(one, 0, few) for one in (x, *others)]
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            compiled = self.of_size(size)
            self._patience, _ = _timed(compiled, model, x, *others)
            fastest = [
                min(_timed(call, model, *arguments)[0] for _ in range(TRIES))
                for call, arguments in (
                    (compiled, (x, *others)),
                    (self._function, (x, *others)),
                    (self._function, part),
                )
            ]
        self._spent, self._most = 0.0, 0
        own, eager, eager_few = fastest
        self._per_row = max(eager - eager_few, 0.0) / max(size - few, 1)
        self._fixed = eager - self._per_row * size
        if own < eager:
            self._seconds[size] = own
        else:
            self._eager_below = max(size, self._eager_below)


def _timed(call: Callable[..., Any], model: Model, x: Tensor, *others: Tensor) -> tuple[float, Any]:
    """The seconds that a call takes, and what it returns."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    result = call(model, x, *others)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started, result
