"""The isolated-kernel limit: what the convolutions and linear layers of a network cost by themselves.

Every configuration is computed in isolation in every way at hand, forward and to its input gradient. The sum of the
fastest, each times how often it occurs, is a floor for a step that computes the same layers; everything else in a step
(norms, activations, pools, attention, the update) comes on top.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.support.progress import counter

from .baselines import DTYPES
from .cases import Case
from .measure import synchronize
from .record import Kernels, Settings

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

SAMPLE_SECONDS = 2e-3
"""A sample repeats a kernel until it takes about this long, so that the clock's own cost does not count."""

TOLERANCE = 0.02
"""Allowed relative error, in the Euclidean norm, of one way against the first: what computes something else is out."""

Way = Callable[[], Tensor]
Ways = dict[str, Callable[[], Way]]
"""By name, what prepares a way (packs its weights) and returns what is timed. The first is what eager does."""


@dataclass(frozen=True)
class Layer:
    """One configuration of a convolution or a linear layer.

    Attributes:
        x: Shape of its input, ``(N, C, H, W)`` or ``(rows, features)``.
        out: Shape of its output.
        weight: Shape of its weight.
        stride: Stride of the convolution; empty for a linear layer, like the rest.
        padding: Padding.
        dilation: Dilation.
        groups: Groups.
    """

    x: tuple[int, ...]
    out: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def kind(self) -> str:
        """Class of its kernels."""
        if len(self.weight) == 2:
            return "linear"
        if self.groups > 1:
            return "depthwise" if self.weight[1] == 1 else "grouped"
        size = "x".join(map(str, self.weight[2:]))
        return f"conv {size}" if size in ("1x1", "3x3") else "conv other"

    @property
    def tiles(self) -> bool:
        """Whether its kernels neither overlap nor leave gaps, so that it is a matrix product over patches."""
        whole = self.stride == self.weight[2:] and not any(self.padding) and self.groups == 1
        return bool(self.stride) and whole and all(self.x[2 + i] % self.stride[i] == 0 for i in range(2))

    @property
    def flops(self) -> int:
        """FLOPs of one direction; a multiply-add counts as two."""
        return 2 * math.prod(self.out) * math.prod(self.weight[1:])

    def __str__(self) -> str:
        shapes = (self.x, self.weight, self.out)
        text = "{} {} * {} -> {}".format(self.kind, *("x".join(map(str, shape)) for shape in shapes))
        return f"{text}, stride {self.stride[0]}" if self.stride else text


def layers_of(model: nn.Module, x: Tensor) -> dict[Layer, int]:
    """The configurations that occur in a forward pass, and how often."""
    found: dict[Layer, int] = {}

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shape, out, weight = inputs[0].shape, output.shape, tuple(module.weight.shape)
        if isinstance(module, nn.Linear):
            layer = Layer((math.prod(shape[:-1]), shape[-1]), (math.prod(out[:-1]), out[-1]), weight)
        else:
            numbers = (tuple(module.stride), tuple(module.padding), tuple(module.dilation), module.groups)
            layer = Layer(tuple(shape), tuple(out), weight, *numbers)
        found[layer] = found.get(layer, 0) + 1

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def measure_kernels(case: Case, settings: Settings, rounds: int) -> list[Kernels]:
    """Time every layer of a case by itself.

    Args:
        case: The case.
        settings: Device and type.
        rounds: Samples of each kernel; the ways of one layer take turns.
    """
    work = case.prepare(settings.device)
    found = layers_of(work.model, work.x)
    records = []
    with counter(f"{case.name}: kernels", 2 * len(found)) as bar, torch.no_grad():
        for layer, count in found.items():
            for direction, ways in zip(("forward", "input gradient"), ways_of(layer, settings), strict=True):
                seconds = time_ways(ways, settings.device, rounds)
                records.append(Kernels(case.name, str(layer), layer.kind, direction, count, layer.flops, seconds))
                bar.update()
    return records


def time_ways(ways: Ways, device: str, rounds: int) -> dict[str, float | None]:
    """Median seconds of each way, ``None`` of those that cannot be used or compute something else.

    Args:
        ways: The ways; the first has to work.
        device: Where they run.
        rounds: Samples of each.
    """
    ready: dict[str, Way] = {}
    expected: Tensor | None = None
    for name, prepare in ways.items():
        try:
            way = prepare()
            result = way().float()
        except (RuntimeError, NotImplementedError):  # no kernel for this type or shape
            if expected is None:
                raise
            continue
        expected = result if expected is None else expected
        # A product over patches returns a row for each of the pixels.
        same = expected if expected.ndim == result.ndim else expected.permute(0, 2, 3, 1).flatten(0, 2)
        if float((result - same).norm() / same.norm()) <= TOLERANCE:
            ready[name] = way
    calls = {name: max(1, round(SAMPLE_SECONDS / _sample(way, 1, device))) for name, way in ready.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, way in ready.items():
            samples[name].append(_sample(way, calls[name], device))
    return {name: statistics.median(samples[name]) if name in ready else None for name in ways}


def _sample(way: Way, calls: int, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        way()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def ways_of(layer: Layer, settings: Settings) -> tuple[Ways, Ways]:
    """How to compute a layer, and how its input gradient."""
    dtype = DTYPES[settings.autocast] or torch.float32

    def random(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=settings.device, dtype=dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x, grad, weight, bias = random(*layer.x), random(*layer.out), random(*layer.weight), random(layer.weight[0])
    packed = settings.device == "cpu" and torch.backends.mkldnn.is_available()
    if not layer.stride:
        return _products(lambda: x, lambda rows: rows, grad, weight, bias, packed)
    forward, backward = _convolutions(layer, x, grad, weight, bias, packed)
    if layer.tiles:
        batch, channels, height, width = grad.shape[0], x.shape[1], *grad.shape[2:]
        patch = layer.stride

        def rows_of() -> Tensor:
            tiles = x.permute(0, 2, 3, 1).reshape(batch, height, patch[0], width, patch[1], channels)
            return tiles.transpose(2, 3).reshape(batch * height * width, -1)

        def image_of(rows: Tensor) -> Tensor:
            tiles = rows.view(batch, height, width, *patch, channels).transpose(2, 3)
            return tiles.reshape(batch, height * patch[0], width * patch[1], channels).permute(0, 3, 1, 2)

        rows, matrix = grad.permute(0, 2, 3, 1).flatten(0, 2), weight.permute(0, 2, 3, 1).flatten(1).contiguous()
        products = _products(rows_of, image_of, rows, matrix, bias, packed)
        return {**forward, **products[0]}, {**backward, **products[1]}
    return forward, backward


def _products(
    rows_of: Way, image_of: Callable[[Tensor], Tensor], grad: Tensor, weight: Tensor, bias: Tensor, packed: bool
) -> tuple[Ways, Ways]:
    """Ways of a linear layer; what makes rows of the input, and an input of rows, is part of the time."""

    def pack_forward() -> Way:
        ready = mkldnn._reorder_linear_weight(weight, len(grad))
        return lambda: mkldnn._linear_pointwise(rows_of(), ready, bias, "none", [], "")

    def pack_backward() -> Way:
        ready = mkldnn._reorder_linear_weight(weight.t().contiguous(), len(grad))
        return lambda: image_of(mkldnn._linear_pointwise(grad, ready, None, "none", [], ""))

    forward: Ways = {"linear": lambda: lambda: F.linear(rows_of(), weight, bias)}
    backward: Ways = {"linear": lambda: lambda: image_of(grad @ weight)}
    if packed:
        forward["packed linear"], backward["packed linear"] = pack_forward, pack_backward
    return forward, backward


def _convolutions(
    layer: Layer, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, packed: bool
) -> tuple[Ways, Ways]:
    stride, padding, dilation, groups = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
    spans = [dilation[i] * (layer.weight[2 + i] - 1) for i in range(2)]

    def pack(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Way:
        weight = weight.contiguous(memory_format=torch.channels_last)
        weight = mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, list(x.shape))
        where = padding, stride, dilation, groups
        return lambda: mkldnn._convolution_pointwise(x, weight, bias, *where, "none", [], "")

    def pack_transposed() -> Way:
        unseen = [(layer.x[2 + i] + 2 * padding[i] - spans[i] - 1) % stride[i] for i in range(2)]
        where = padding, unseen, stride, dilation, groups
        ready = mkldnn._reorder_convolution_transpose_weight(weight, *where, list(grad.shape))
        return lambda: mkldnn._convolution_transpose_pointwise(grad, ready, None, *where, "none", [], "")

    def masked() -> Tensor:
        where = stride, padding, dilation, False, [0, 0], groups
        return aten.convolution_backward(grad, x, weight, None, *where, [True, False, False])[0]  # type: ignore[no-any-return]

    forward: Ways = {"conv": lambda: lambda: F.conv2d(x, weight, bias, stride, padding, dilation, groups)}
    backward: Ways = {"masked conv backward": lambda: masked}
    if packed:
        forward["packed conv"] = lambda: pack(x, weight, bias, padding)
        backward["packed transposed conv"] = pack_transposed
        if layer.stride == (1, 1) and (groups == 1 or layer.weight[1] == 1):
            flipped = weight.flip(2, 3).transpose(0, 1) if groups == 1 else weight.flip(2, 3)
            rest = [span - pad for span, pad in zip(spans, padding, strict=True)]
            backward["packed flipped conv"] = lambda: pack(grad, flipped, None, rest)
    return forward, backward
