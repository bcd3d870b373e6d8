"""Small random networks: a strategy of hypothesis that draws layers one by one, each fitting the shape before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Network:
    """A network in float64 and the shape of its input."""

    module: nn.Module
    input_shape: Shape
    seed: int

    def __repr__(self) -> str:
        return f"Network(seed={self.seed}, input_shape={self.input_shape}, module={self.module})"

    @property
    def writes_buffers(self) -> bool:
        """Whether a forward pass updates running statistics."""
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return any(isinstance(module, norms) and module.training for module in self.module.modules())

    def input(self, seed: int) -> torch.Tensor:
        return torch.randn(self.input_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Skip(nn.Module):
    """Adds its input to what a branch makes of it."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


def _convolution(draw: Draw, shape: Shape) -> nn.Module:
    rank, channels = len(shape) - 2, shape[1]
    groups = draw(st.sampled_from([divisor for divisor in (1, 2, channels) if channels % divisor == 0]))
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    padding = [draw(st.integers(0, 2)) for _ in range(rank)]
    stride = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans()), "stride": stride, "dilation": dilation}
    outputs = groups * draw(st.integers(1, 2))
    if draw(st.booleans()) and draw(st.booleans()):
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        return transposed(channels, outputs, kernel, padding=padding, output_padding=extra, **options)
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](channels, outputs, kernel, padding=padding, **options)


def _normalisation(draw: Draw, shape: Shape) -> nn.Module:
    rank, channels = len(shape) - 2, shape[1]
    kind = draw(st.sampled_from(["batch", "group", "layer", "instance"]))
    affine = draw(st.booleans())
    if kind == "batch":
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](channels, affine=affine)
        norm.train(draw(st.booleans()))
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.running_mean)
        return norm
    if kind == "group":
        return nn.GroupNorm(draw(st.sampled_from([d for d in (1, 2, channels) if channels % d == 0])), channels)
    if kind == "layer":
        return nn.LayerNorm(shape[-draw(st.integers(1, rank + 1)) :], elementwise_affine=affine)
    return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1](channels, affine=affine)


def _activation(draw: Draw, shape: Shape) -> nn.Module:
    parameters = draw(st.sampled_from([1, shape[1]]))
    kinds = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.GELU, nn.SiLU, lambda: nn.PReLU(parameters))
    return draw(st.sampled_from(kinds))()


def _pool(draw: Draw, shape: Shape) -> nn.Module:
    rank = len(shape) - 2
    kind = draw(st.sampled_from(["max", "average", "adaptive", "reflection"]))
    kernel, stride = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    if kind == "max":
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1]
        return pool(kernel, stride, padding=draw(st.integers(0, 1)), ceil_mode=draw(st.booleans()))
    if kind == "average":
        pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1]
        return pool(kernel, stride, padding=draw(st.integers(0, 1)), count_include_pad=draw(st.booleans()))
    if kind == "adaptive":
        adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
        return adaptive(draw(st.integers(1, 3)))
    return (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)[rank - 1](1)


def _skip(draw: Draw, shape: Shape) -> nn.Module:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    branch = [convolution(shape[1], shape[1], 3, padding=1), _activation(draw, shape)]
    return Skip(nn.Sequential(*branch, *([_normalisation(draw, shape)] if draw(st.booleans()) else [])))


LAYERS = (_convolution, _convolution, _normalisation, _activation, _activation, _pool, _skip)


def _shape_after(layer: nn.Module, shape: Shape) -> Shape | None:
    """The shape of the layer's output; ``None`` if it does not take such an input."""
    try:
        with torch.no_grad():
            after = tuple(layer(torch.zeros(shape)).shape)
    except (RuntimeError, ValueError):
        return None
    return after if all(size > 0 for size in after) else None


@st.composite
def networks(draw: Draw) -> Network:
    """A few layers, flattened, and one or two linear layers on top."""
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    size = {1: 12, 2: 8, 3: 5}[rank]
    shape: Shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *(size + draw(st.integers(0, 2)),) * rank)
    input_shape, layers = shape, []
    for make in draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=5)):
        layer = make(draw, shape)
        after = _shape_after(layer, shape)
        if after is not None:
            layers.append(layer)
            shape = after
    features = torch.Size(shape[1:]).numel()
    layers += [nn.Flatten(), nn.Linear(features, 4)]
    if draw(st.booleans()):
        layers += [nn.ReLU(), nn.Linear(4, 3, bias=False)]
    return Network(nn.Sequential(*layers).double(), input_shape, seed)


@st.composite
def wide_networks(draw: Draw) -> Network:
    """A few convolutions of 3 by 3 and of so many channels that they are worth a kernel of their own."""
    seed = draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    input_shape = (draw(st.integers(2, 4)), draw(st.sampled_from([3, 16])), *(draw(st.sampled_from([16, 20])),) * 2)
    shape: Shape = input_shape
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 3))):
        channels, padding = draw(st.sampled_from([16, 32])), draw(st.integers(0, 2))
        layers.append(nn.Conv2d(shape[1], channels, 3, padding=padding, bias=draw(st.booleans())))
        shape = (shape[0], channels, *(size + 2 * padding - 2 for size in shape[2:]))
        if draw(st.booleans()):
            norm = nn.BatchNorm2d(channels).eval()
            nn.init.uniform_(norm.running_var, 0.5, 2)
            layers.append(norm)
        layers.append(draw(st.sampled_from([nn.ReLU, nn.SiLU, nn.Tanh]))())
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(5)]
    module = nn.Sequential(*layers)
    module(torch.zeros(input_shape))  # so that the last layer has its size
    return Network(module.double(), input_shape, seed)
