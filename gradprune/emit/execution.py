"""Generated CUDA code, called with CPU tensors: its kernels are interpreted, its library calls are ATen's."""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gradprune.torch_compat.aot import is_fake
from gradprune.torch_compat.fake_cuda import Generated, OnCpu
from gradprune.torch_compat.interpreted import load_kernel

from .externals import ExternKernels
from .interpreter import KernelError, LibDevice, interpreting, launch

Change = Callable[[str, str], str]
"""What a test does to a kernel's source, given its name and the source."""

_ONE_RESULT = re.compile(r"^(\s+)(buf\d+) = ((?:extern_kernels\.\w+|torch\.ops\.[\w.]+)\(.*\))$", re.MULTILINE)
_OF_SEVERAL = re.compile(r"^(\s+)(buf\d+) = (buf\d+\[\d+\])$", re.MULTILINE)
UNWRITTEN = 113
"""What integers hold that nobody has written; floating-point numbers are NaN."""


class Settings:
    """How code is executed.

    Args:
        real_blocks: Whether to take the blocks that a GPU would try first.
        races: Whether to look for addresses that programs share.
        change: What is done to each kernel's source before.
    """

    def __init__(self, real_blocks: bool = False, races: bool = False, change: Change | None = None) -> None:
        self.real_blocks, self.races, self.change = real_blocks, races, change
        self.counts: Counter[str] = Counter()


class Executable:
    """What Inductor generated for one graph.

    Args:
        generated: The code.
        nothing: What is called in its place for tensors without memory.
        settings: How to execute it.
    """

    _boxed_call = True

    def __init__(self, generated: Generated, nothing: Callable[..., Any], settings: Settings) -> None:
        self._generated, self._nothing, self._settings = generated, nothing, settings
        source = generated.code.replace(
            "from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda index: 0"
        ).replace("async_compile = AsyncCompile()", "async_compile = _kernels")
        # Libraries on a GPU leave results in the layout that Inductor took for granted; those of a CPU need not.
        source = _ONE_RESULT.sub(r"\1\2 = _layout('\2', \3)", source)
        source = _OF_SEVERAL.sub(r"\1\2 = _layout('\2', \3)", source)
        self._namespace: dict[str, Any] = {"__name__": "generated", "_kernels": self, "_layout": self._in_layout}
        exec(compile(source, "<generated>", "exec"), self._namespace)
        self._namespace |= {
            "extern_kernels": ExternKernels(),
            "empty_strided_cuda": _unwritten,
            "start_graph": lambda: None,
            "end_graph": lambda profile: None,
        }

    def triton(self, name: str, source: str, device_str: str = "") -> Any:
        """Is called by the code for each of its kernels."""
        if self._settings.change is not None:
            source = self._settings.change(name, source)
        kernel, settings = load_kernel(name, source, LibDevice()), self._settings

        def run(*args: Any, stream: Any = None, **kwargs: Any) -> None:
            arguments = {**dict(zip(kernel.arguments, args, strict=False)), **kwargs}
            programs = launch(kernel, arguments, real_blocks=settings.real_blocks, races=settings.races)
            settings.counts.update(launches=1, programs=programs)

        return types.SimpleNamespace(run=run)

    def wait(self, scope: dict[str, Any]) -> None:
        """Is called by the code once it has named its kernels."""

    def __call__(self, args: list[Any]) -> Any:
        """Call the code. ``args`` is emptied, as Inductor's calling convention has it."""
        if any(is_fake(arg) for arg in args):
            return self._nothing(args)
        for name, arg in zip(self._generated.inputs, args, strict=True):
            layout = self._generated.layout(name)
            if isinstance(arg, Tensor) and layout is not None:
                self._check_input(name, arg)
        return self._namespace["call"](args)

    def _check_input(self, name: str, arg: Tensor) -> None:
        layout = self._generated.layout(name)
        assert layout is not None
        found = tuple(arg.shape), arg.stride(), arg.dtype
        strides = zip(arg.shape, arg.stride(), layout.stride, strict=False)
        if found[0] != layout.size or arg.dtype != layout.dtype or any(n > 1 and a != b for n, a, b in strides):
            raise KernelError(f"input {name} is {found}, and the code was generated for {layout}")

    def _in_layout(self, name: str, value: Any) -> Any:
        """The result of a library call as the code expects it."""
        if not isinstance(value, Tensor):
            return value
        layout = self._generated.layout(name)
        if layout is None:  # of an operator that Inductor does not know, whose result gets a name and a layout next
            return value
        if tuple(value.shape) != layout.size or value.dtype != layout.dtype:
            raise KernelError(f"{name} is {tuple(value.shape)} {value.dtype}, and the code expects {layout}")
        strides = zip(layout.size, value.stride(), layout.stride, strict=True)
        if all(size == 1 or one == other for size, one, other in strides):
            return value
        self._settings.counts["results brought into another layout"] += 1
        return torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype).copy_(value)


def _unwritten(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """Memory that does not look like a result."""
    memory = torch.empty_strided(size, stride, dtype=dtype)
    everything = memory.as_strided((memory.untyped_storage().nbytes() // memory.element_size(),), (1,), 0)
    everything.fill_(torch.nan if dtype.is_floating_point else 1 if dtype == torch.bool else UNWRITTEN)
    return memory


@contextmanager
def executing() -> Iterator[None]:
    """Have generated code run on the CPU in the block."""
    with (
        interpreting(),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
        OnCpu(),
    ):
        yield
