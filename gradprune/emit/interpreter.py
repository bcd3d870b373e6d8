"""Triton's interpreter, with what generated kernels need and with checks that a GPU does not make.

The interpreter computes with numpy, one program after the other. Here it also knows libdevice, reduces pairwise with
the kernel's own function (its own way calls that for every element), takes ``device_assert`` in earnest, and looks at
every address that is read or written. Triton must have been imported while ``TRITON_INTERPRET`` was set.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from gradprune.errors import GradpruneError
from gradprune.torch_compat.interpreted import InterpretedKernel, replacing_libdevice


class KernelError(GradpruneError):
    """A kernel does what it must not, or breaks off."""


class Memory:
    """Which addresses a launch may touch, and which of them each program touches.

    Args:
        tensors: Its arguments.
        notes_races: Whether to note who reads and writes what.
    """

    def __init__(self, tensors: Sequence[Tensor], notes_races: bool) -> None:
        spans: list[list[int]] = []
        for low, high in sorted(map(_span, tensors)):
            if spans and low <= spans[-1][1]:
                spans[-1][1] = max(high, spans[-1][1])
            else:
                spans.append([low, high])
        self._low, self._high = (np.array([span[end] for span in spans], dtype=np.uint64) for end in (0, 1))
        self._reads: list[tuple[int, Any]] = []
        self._writes: list[tuple[int, Any]] = []
        self._notes_races = notes_races
        self.program = 0

    def touch(self, what: str, pointers: Any, mask: Any) -> None:
        """Note an access.

        Raises:
            KernelError: It is out of bounds.
        """
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if not addresses.size:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        at = np.searchsorted(self._low, addresses, side="right") - 1
        bad = (at < 0) | (addresses + size > self._high[np.maximum(at, 0)])
        if bad.any():
            raise KernelError(f"{what} out of bounds: {int(bad.sum())} of {bad.size} addresses")
        if self._notes_races:
            (self._reads if what == "load" else self._writes).append((self.program, addresses.ravel()))

    def check_races(self) -> None:
        """Make sure that no program reads or writes what another writes.

        Raises:
            KernelError: One does.
        """
        if not self._writes:
            return
        at, owner = _owned(self._writes)
        order = np.argsort(at, kind="stable")
        at, owner = at[order], owner[order]
        twice = int(((at[1:] == at[:-1]) & (owner[1:] != owner[:-1])).sum())
        if twice:
            raise KernelError(f"{twice} addresses are written by more than one program")
        if self._reads:
            read_at, reader = _owned(self._reads)
            where = np.minimum(np.searchsorted(at, read_at), at.size - 1)
            shared = int(((at[where] == read_at) & (owner[where] != reader)).sum())
            if shared:
                raise KernelError(f"{shared} addresses are read by one program and written by another")


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _owned(touched: Sequence[tuple[int, Any]]) -> tuple[Any, Any]:
    addresses = np.concatenate([one for _, one in touched])
    return addresses, np.concatenate([np.full(one.size, program) for program, one in touched])


_memory: Memory | None = None
"""Of the launch that is going on."""


def launch(kernel: InterpretedKernel, arguments: dict[str, Any], *, real_blocks: bool, races: bool) -> int:
    """Run a kernel on CPU tensors, within ``interpreting``; returns how many programs there were.

    Args:
        kernel: The kernel.
        arguments: Tensors and sizes by name.
        real_blocks: Whether to take the blocks that a GPU would try first; else they are as big as they may be.
        races: Whether to look for addresses that two programs share.

    Raises:
        KernelError: It does what it must not, or breaks off.
    """
    global _memory
    sizes = {name: value for name, value in arguments.items() if isinstance(value, int)}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    blocks = {name: kernel.first[name] for name in kernel.blocks} if real_blocks else kernel.big_blocks(sizes)
    grid = kernel.grid(blocks, sizes)
    _memory = memory = Memory(list(tensors.values()), races)
    try:
        for name in kernel.aligned:
            value = arguments[name]
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16:
                raise KernelError(f"{name} is no multiple of 16, as is promised")
        converted = {name: interpreter._implicit_cvt(value) for name, value in arguments.items()}
        run = kernel.function.rewrite()
        interpreter.interpreter_builder.set_grid_dim(*grid)
        programs = list(np.ndindex(*grid))
        for memory.program, place in enumerate(programs):
            interpreter.interpreter_builder.set_grid_idx(*place)
            run(**converted, **blocks)
        memory.check_races()
    except Exception as error:
        shown = {name: (tuple(one.shape), one.stride(), one.dtype) for name, one in tensors.items()}
        raise KernelError(f"{kernel.name}, grid {grid}, blocks {blocks}, {shown}: {error}") from error
    finally:
        _memory = None
    return len(programs)


class LibDevice:
    """CUDA's device functions by name, computed by torch on the CPU."""

    OTHER_NAMES = types.MappingProxyType(
        {"nearbyint": "round", "rint": "round", "llrint": "round", "fabs": "abs", "erf": "special.erf"}
    )

    def __getattr__(self, name: str) -> Any:
        """The function with that name."""
        compute = functools.reduce(getattr, self.OTHER_NAMES.get(name, name).split("."), torch)

        def call(*args: Any) -> Any:
            semantic = interpreter.interpreter_semantic
            tensors = [one if isinstance(one, tl.tensor) else semantic.to_tensor(one) for one in args]
            result: Any = compute(*(torch.from_numpy(np.ascontiguousarray(one.handle.data)) for one in tensors))  # type: ignore[operator]
            dtype = tl.int1 if result.dtype == torch.bool else tensors[0].dtype
            shape = tl.block_type(dtype, list(result.shape)) if tensors[0].type.is_block() else dtype
            return tl.tensor(interpreter.TensorHandle(result.numpy(), dtype), shape)

        return call


def _reduce(self: Any, inputs: Any) -> Any:
    """Reduce neighbours with the kernel's own function, and so on, until one is left."""
    whole = self.axis is None
    if whole:
        inputs = tuple(self.to_tensor(one.handle.data.flatten(), one.dtype) for one in inputs)
    dims = len(inputs[0].shape)
    axis = 0 if whole else self.axis % dims
    data = [np.moveaxis(one.handle.data, axis, 0) for one in inputs]
    dtypes = [one.dtype for one in inputs]
    while data[0].shape[0] > 1:
        half = data[0].shape[0] // 2
        pairs = [_tensor(part[start::2], dtype) for start in (0, 1) for part, dtype in zip(data, dtypes, strict=True)]
        results = self.combine_fn(*pairs)
        results = results if isinstance(results, tuple) else (results,)
        data = [np.broadcast_to(one.handle.data, (half, *data[0].shape[1:])) for one in results]
    final = [part[0] for part in data]
    if self.keep_dims:
        final = [part.reshape([1] * dims) if whole else np.expand_dims(part, axis) for part in final]
    return [
        self.to_tensor(part if getattr(part, "shape", ()) else np.asarray(part).item(), dtype)
        for part, dtype in zip(final, dtypes, strict=True)
    ]


def _tensor(data: Any, dtype: Any) -> Any:
    data = np.ascontiguousarray(data)
    handle = interpreter.TensorHandle(data, dtype.scalar)
    return tl.tensor(handle, tl.block_type(dtype.scalar, list(data.shape)))


def _assert(self: Any, condition: Any, message: str) -> None:
    if not np.all(condition.data):
        raise KernelError(f"device_assert: {message}")


@contextmanager
def interpreting() -> Iterator[None]:
    """Have Triton's interpreter be as this module says."""
    builder = interpreter.InterpreterBuilder
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.touch("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.touch("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.touch("atomic", pointers, mask)
        return rmw(self, op, pointers, value, mask, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)  # the language is patched already

    one = interpreter.interpreter_builder
    options = dataclasses.replace(one.options, debug=True, sanitize_overflow=False)
    with ExitStack() as stack:
        for owner, name, value in (
            (builder, "create_masked_load", checked_load),
            (builder, "create_masked_store", checked_store),
            (builder, "create_atomic_rmw", checked_rmw),
            (builder, "create_assert", _assert),
            (interpreter.InterpretedFunction, "__call__", call),
            (interpreter.ReduceOps, "generic_reduce", _reduce),
            (one, "options", options),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(replacing_libdevice(LibDevice()))
        language = types.FunctionType((lambda: 0).__code__, {"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(language)
        stack.callback(scope.restore)
        yield
