"""Arithmetic of the library functions that generated code calls, and the rate at which a GPU does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from gradprune.torch_compat.fake_cuda import Layout

from .gpus import Gpu

HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def call_flops(function: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Layout | None) -> int:
    """FLOPs of a call; 0 for what is no contraction.

    Args:
        function: Name of the ATen operator.
        args: Its arguments, layouts in place of tensors.
        kwargs: The same.
        result: Layout of what it returns, if that is one tensor.
    """
    if function == "convolution":
        x, weight = args[0], args[1]
        narrow = x if kwargs["transposed"] else result
        return _convolution(x, weight, narrow)
    if function == "convolution_backward":
        gradient, x, weight, mask = args[0], args[1], args[2], args[-1]
        return _convolution(x, weight, x if args[7] else gradient) * (bool(mask[0]) + bool(mask[1]))
    packet = getattr(torch.ops.aten, function, None)
    formula: Callable[..., Any] | None = flop_registry.get(packet)
    if formula is None:
        return 0
    shapes = [torch.Size(one.size) if isinstance(one, Layout) else one for one in args]
    return int(formula(*shapes, out_val=None if result is None else torch.Size(result.size)))


def _convolution(x: Layout, weight: Layout, narrow: Layout | None) -> int:
    """Every weight is used once at each position of the smaller of the two maps."""
    if narrow is None:
        return 0
    return 2 * x.size[0] * math.prod(narrow.size[2:]) * math.prod(weight.size)


def rate_of(function: str, args: Sequence[Any], gpu: Gpu) -> str:
    """The rate of a call: by its first tensor, and with torch's settings convolutions take TF32 where there is any."""
    dtype = next((one.dtype for one in args if isinstance(one, Layout)), torch.float32)
    if dtype in HALVES and HALVES[dtype] in gpu.rates:
        return HALVES[dtype]
    return "tf32" if function.startswith("convolution") and "tf32" in gpu.rates else "fp32"
