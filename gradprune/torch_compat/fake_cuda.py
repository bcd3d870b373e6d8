"""The Python side of a CUDA device that has nothing behind it, and Inductor's code generation for it.

The C++ side has to be loaded before torch is imported (``gradprune.emit.device``). Here, what torch asks a CUDA driver
for is answered from a table, and Inductor is stopped once it has written its source.

Note [Canaries]
    Without the C++ side, or with another torch, all of this may still succeed and be false: convolutions that are not
    cuDNN's are computed in another memory layout, and what is fused with them is another thing. ``canaries`` asks for
    what can only be so if torch takes the device for one with cuDNN.
"""

from __future__ import annotations

import contextlib
import logging
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class _NoStream:
    """The one stream of a device that does nothing."""

    def wait_stream(self, stream: object) -> None:
        """There is nothing to wait for."""

    def record_event(self) -> _NoStream:
        """What ``wait_event`` is called with."""
        return self

    def wait_event(self, event: object) -> None:
        """There is nothing to wait for."""


class OnCpu(TorchDispatchMode):
    """Makes on the CPU what would be made on a CUDA device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator with other devices."""
        args, kwargs = tree_map(_off_cuda, (args, kwargs or {}))
        return func(*args, **kwargs)


def _off_cuda(argument: Any) -> Any:
    is_cuda = isinstance(argument, torch.device) and argument.type == "cuda"
    return torch.device("cpu") if is_cuda else argument


@contextlib.contextmanager
def fake_cuda(properties: Mapping[str, Any]) -> Iterator[None]:
    """Have torch, Inductor and Triton find a GPU with these properties.

    Args:
        properties: As ``torch.cuda.get_device_properties`` has them.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found = types.SimpleNamespace(**properties)
    capability = 10 * found.major + found.minor
    stream = _NoStream()

    def has_bfloat16(including_emulation: bool = True) -> bool:
        return including_emulation or capability >= 80

    class Driver:
        """What Triton asks a driver for while it compiles."""

        binary_ext = "cubin"
        utils = types.SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": found.shared_memory_per_block_optin,
                "multiprocessor_count": found.multi_processor_count,
            }
        )

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, found.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: fx.Node) -> Any:
        with OnCpu():  # uniform constants are computed, in earnest
            return deduce(self, node)

    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_device_properties", lambda device=None: found),
        (torch.cuda, "get_device_capability", lambda device=None: (found.major, found.minor)),
        (torch.cuda, "get_device_name", lambda device=None: found.name),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "is_bf16_supported", has_bfloat16),
        (CudaInterface, "is_available", staticmethod(lambda: True)),
        (CudaInterface, "get_device_properties", staticmethod(lambda device=None: found)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda device=None: capability)),
        (CudaInterface, "is_bf16_supported", staticmethod(has_bfloat16)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: found)),
        (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (joint_graph.UniformValueConstantFolder, "_deduce_value", deduce_on_cpu),
    ]
    settings = {
        "fx_graph_cache": False,
        "fx_graph_remote_cache": False,
        "compile_threads": 1,
        "shape_padding": False,  # decided by timing
    }
    DeviceProperties.create.cache_clear()
    active = driver._active
    logger = logging.getLogger("torch._inductor.utils")
    level = logger.level
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, answer in answers:
                stack.enter_context(mock.patch.object(owner, name, answer))
            stack.enter_context(inductor_config.patch(settings))
            driver.set_active(Driver())
            logger.setLevel(logging.ERROR)  # that there are few multiprocessors
            yield
    finally:
        driver._active = active
        logger.setLevel(level)
        DeviceProperties.create.cache_clear()


@dataclass(frozen=True)
class Layout:
    """Size, strides and type of a tensor in generated code."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the elements that differ; one that is expanded is there once."""
        elements = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            elements *= size if stride or not size else 1
        return elements * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from its first element to its last."""
        if 0 in self.size:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Generated:
    """What Inductor generated for one graph.

    Attributes:
        code: The module's source: kernels, and the function ``call`` that launches them.
    """

    def __init__(self, code: str, graph: GraphLowering) -> None:
        self.code = code
        self._graph = graph

    def layout(self, name: str) -> Layout | None:
        """Of what has a name in the code; ``None`` for what is no tensor."""
        graph = self._graph
        if name in graph.constants:
            value = graph.constants[name]
            return Layout(tuple(value.shape), tuple(value.stride()), value.dtype)
        buffer = graph.name_to_buffer.get(name) or graph.graph_inputs.get(name)
        try:
            layout: Any = buffer.get_layout() if buffer is not None else None
            return Layout(tuple(map(int, layout.size)), tuple(map(int, layout.stride)), layout.dtype)
        except (AttributeError, NotImplementedError):
            return None

    @property
    def inputs(self) -> list[str]:
        """Names of the arguments of ``call``."""
        return list(self._graph.graph_inputs)


class _Generated(Exception):
    """Ends a compilation behind its code generation."""


_PATH = re.compile(r"^# kernel path: .*\n", re.MULTILINE)


def generate(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Generated | None:
    """Have Inductor generate the source for one ATen graph, as ``compile_fx_inner`` would, and compile none of it.

    Returns ``None`` for a graph that calls nothing, of which Inductor makes no code.


    The strides of what is returned are reported as Inductor does, for a backward graph is compiled for what the forward
    graph is going to save.

    Args:
        gm: The graph; it is changed.
        inputs: Its inputs.
        kwargs: Of ``compile_fx_inner``.
    """
    found: list[Generated] = []

    def capture(lowering: GraphLowering) -> Any:
        code, _ = lowering.codegen()
        text = code if isinstance(code, str) else code.value
        found.append(Generated(_PATH.sub("", text), lowering))
        raise _Generated

    with mock.patch.object(GraphLowering, "_compile_to_module", capture):
        try:
            compile_fx_inner(gm, list(inputs), **kwargs)
        except BaseException as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _Generated):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
    if not found:
        return None
    (generated,) = found
    context = torch._guards.TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        for output in generated._graph.graph_outputs:
            is_tensor = getattr(output, "has_tensor_output", lambda: False)()
            stride = tuple(int(one) for one in output.get_layout().stride) if is_tensor else None
            context.output_strides.append(stride)
    return generated


def canaries() -> list[str]:
    """What is not as it would be on a GPU with cuDNN; empty if all is. See Note [Canaries]."""
    wrong = []
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.rand(2, 4, 8, 8, requires_grad=True)
        weight = torch.rand(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        y = torch.conv2d(x, weight)
        if y.device.type != "cuda":
            wrong.append(f"a tensor made on cuda is on {y.device}")
        if not y.is_contiguous(memory_format=torch.channels_last):
            wrong.append("a float32 convolution with a channels-last weight is not channels-last")
        if not torch.conv2d(x.double(), weight.double()).is_contiguous():
            wrong.append("a float64 convolution with a channels-last weight is not contiguous")
        ones = [1, 1]
        backend = torch._C._select_conv_backend(x, weight, None, ones, [0, 0], ones, False, [0, 0], 1, None)
        if backend != torch._C._ConvBackend.Cudnn:  # type: ignore[attr-defined]
            wrong.append(f"the backend of a convolution is {backend.name}")
        with torch.autocast("cuda", torch.float16):
            if torch.conv2d(x, weight).dtype != torch.float16:
                wrong.append("autocast is off")
        try:
            (gradient,) = torch.autograd.grad(y.sum(), x)
            if gradient.shape != x.shape or gradient.device.type != "cuda":
                wrong.append(f"an input gradient has shape {tuple(gradient.shape)} on {gradient.device}")
        except RuntimeError as error:
            wrong.append(f"backward fails: {error}")
    return wrong
