"""What an attack step is made of beside the forward convolutions, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from gradprune.attacks.norms import NORMS, Norm
from gradprune.runtime.losses import LABEL_LOSSES, kl, label_losses

from .attack_step import Ball, move
from .kernels import Layer

UPDATES, PROJECTIONS, LOSSES, MASKS, EPILOGUES, DGRADS = (
    "updates",
    "projections",
    "losses with their gradient",
    "masks",
    "epilogues",
    "input gradients",
)
GROUPS = (UPDATES, PROJECTIONS, LOSSES, MASKS, EPILOGUES, DGRADS)

aten = torch.ops.aten

BITS = 32


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        batch: Images in a batch.
        pixels: Height and width of an image.
        part: What layers are divided by, in channels and in pixels.
        copied: Elements of the tensor that is copied for the bandwidth.
        side: Rows and columns of the matrices that are multiplied for the FLOP/s.
    """

    batch: int = 32
    pixels: int = 224
    part: int = 1
    copied: int = 1 << 25
    side: int = 2048


FULL, SMALL = Size(), Size(2, 32, 8, 1 << 16, 64)
ON_GPU = Size(copied=1 << 28, side=8192)
"""What shows the ceilings of a GPU."""


@dataclass(frozen=True)
class Pattern:
    """A function of tensors that Inductor makes kernels of.

    Attributes:
        group: One of ``GROUPS``.
        name: What it is.
        function: From ``inputs`` to a tensor, or several of which the first is compared.
        inputs: Its arguments.
    """

    group: str
    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


def patterns(size: Size, device: str, dtype: torch.dtype) -> Iterator[Pattern]:
    """All patterns; each is made when it is asked for.

    Args:
        size: How large.
        device: Where.
        dtype: Type of activations; images, perturbations and losses are float32 in any case.
    """
    yield from _of_images(size, device)
    yield from _of_logits(size, device)
    yield from _of_activations(size, device, dtype)


# --- Images -----------------------------------------------------------------------------------------------------------


def _of_images(size: Size, device: str) -> Iterator[Pattern]:
    x = torch.rand(size.batch, 3, size.pixels, size.pixels, device=device)
    x_adv, gradient = (x + 0.02 * torch.rand_like(x)).clamp(0, 1), torch.randn_like(x)
    values = x[0].numel()
    # A third of the length of uniform perturbations between -0.5 and 0.5, so that there is something to project.
    radius = {"l2": math.sqrt(values / 12) / 3, "l1": values / 12}
    yield Pattern(UPDATES, "Linf step", partial(move, Ball(8 / 255, 2 / 255)), (x_adv, x, gradient))
    for name, eps in radius.items():
        step = partial(_step_in, NORMS[name], eps)
        yield Pattern(UPDATES, f"L{name[1]} step", step, (x_adv, x, gradient))
    for name, eps in radius.items():
        yield Pattern(PROJECTIONS, f"onto the L{name[1]} ball", partial(_project, NORMS[name], eps), (x - 0.5,))


def _step_in(norm: Norm, eps: float, x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    moved = x_adv + 2 * eps * norm.normalize(gradient)
    return (x + norm.project(moved - x, eps)).clamp(0, 1)


def _project(norm: Norm, eps: float, delta: Tensor) -> Tensor:
    return norm.project(delta, eps)


# --- Logits -----------------------------------------------------------------------------------------------------------


def _of_logits(size: Size, device: str) -> Iterator[Pattern]:
    for rows, classes in ((4 * size.batch, 10), (size.batch, 1000)):
        logits = torch.randn(rows, classes, device=device)
        labels = torch.arange(2 * rows, device=device).view(rows, 2) % classes
        shape = f"{rows}x{classes}"
        for name, (loss, _) in LABEL_LOSSES.items():
            yield Pattern(LOSSES, f"{name}, {shape}", partial(_with_gradient, loss), (logits, labels))
        chosen = torch.tensor(3, device=device)
        yield Pattern(LOSSES, f"all of these, {shape}", partial(_with_gradient, label_losses), (logits, labels, chosen))
        clean = torch.randn_like(logits).softmax(1)
        yield Pattern(LOSSES, f"kl, {shape}", partial(_with_gradient, kl), (logits, clean))


def _with_gradient(loss: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    def summed(logits: Tensor) -> tuple[Tensor, Tensor]:
        values = loss(logits, *others)
        return values.sum(), values

    gradient, values = torch.func.grad(summed, has_aux=True)(logits)
    return gradient, values


# --- Activations ------------------------------------------------------------------------------------------------------


def _of_activations(size: Size, device: str, dtype: torch.dtype) -> Iterator[Pattern]:
    channels, side = 64 // size.part, 56 // size.part // 4 * 4

    def draw() -> Tensor:
        value = torch.randn(size.batch, channels, side, side, device=device, dtype=dtype)
        return value.contiguous(memory_format=torch.channels_last)

    x, other, gradient = draw(), draw(), draw()
    bias = torch.randn(channels, device=device, dtype=dtype)
    for name, (pack, unpack) in _MASKS.items():
        yield Pattern(MASKS, f"ReLU, mask as {name}", partial(_relu_and, pack), (x,))
        yield Pattern(MASKS, f"ReLU's backward by {name}", partial(_gated, unpack), (pack(x > 0), gradient))
    yield Pattern(EPILOGUES, "bias, ReLU", _bias_relu, (x, bias))
    yield Pattern(EPILOGUES, "bias, sum, ReLU", _bias_sum_relu, (x, bias, other))
    yield Pattern(EPILOGUES, "bias, ReLU, max pool", _bias_relu_pool, (x, bias))
    yield Pattern(EPILOGUES, "bias, hard swish", _bias_hardswish, (x, bias))
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
    yield Pattern(EPILOGUES, "bias, GELU", _bias_gelu, (rows, bias))
    yield Pattern(
        EPILOGUES, "GELU's backward", _gelu_backward, (gradient.permute(0, 2, 3, 1).reshape(-1, channels), rows)
    )
    yield Pattern(EPILOGUES, "layer norm", _layer_norm, (rows, bias))


def _as_bytes(mask: Tensor) -> Tensor:
    return torch.where(mask, 1.0, 0.0).to(torch.uint8)


def _from_bytes(packed: Tensor) -> Tensor:
    return packed.float() != 0


def _as_bits(mask: Tensor) -> Tensor:
    last = mask.permute(0, 2, 3, 1).flatten().view(-1, BITS).int()
    return (last << torch.arange(BITS, device=mask.device, dtype=torch.int32)).sum(1, dtype=torch.int32)


def _from_bits(packed: Tensor) -> Tensor:
    return (packed[:, None] >> torch.arange(BITS, device=packed.device, dtype=torch.int32) & 1) != 0


_MASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "booleans": (lambda mask: mask, lambda packed: packed),
    "bytes": (_as_bytes, _from_bytes),
    "bits": (_as_bits, _from_bits),
}


def _relu_and(pack: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    value = x.relu()
    return value, pack(value > 0)


def _gated(unpack: Callable[[Tensor], Tensor], packed: Tensor, gradient: Tensor) -> Tensor:
    mask = unpack(packed)
    if mask.shape != gradient.shape:
        n, c, h, w = gradient.shape
        mask = mask.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return torch.where(mask, gradient, 0)


def _bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    return (x + bias[:, None, None]).relu()


def _bias_sum_relu(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    return (x + bias[:, None, None] + other).relu()


def _bias_relu_pool(x: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d((x + bias[:, None, None]).relu(), 3, 2, 1)


def _bias_hardswish(x: Tensor, bias: Tensor) -> Tensor:
    return F.hardswish(x + bias[:, None, None])


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(gradient, x)  # type: ignore[no-any-return]


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, weight)


# --- Input gradients --------------------------------------------------------------------------------------------------


def layers(size: Size) -> list[Layer]:
    """Layers of ResNets, MobileNetV2, ConvNeXt and transformers, one of each kind of input gradient."""
    n, part = size.batch, size.part

    def conv(inp: int, out: int, side: int, kernel: int, stride: int = 1, *, depthwise: bool = False) -> Layer:
        inp = inp if inp == 3 else inp // part
        out, side, padding = out // part, side // part, 0 if kernel == stride else kernel // 2
        small = (side + 2 * padding - kernel) // stride + 1
        weight = (out, 1 if depthwise else inp, kernel, kernel)
        numbers = (stride, stride), (padding, padding), (1, 1), inp if depthwise else 1
        return Layer((n, inp, side, side), (n, out, small, small), weight, *numbers)

    rows = n * 197 // part
    return [
        conv(3, 64, 224, 7, 2),
        conv(64, 64, 56, 3),
        conv(64, 128, 56, 3, 2),
        conv(512, 512, 7 * part, 3),
        conv(256, 64, 56, 1),
        conv(256, 512, 56, 1, 2),
        conv(144, 144, 56, 3, depthwise=True),
        conv(144, 144, 56, 3, 2, depthwise=True),
        conv(80, 80, 28 if part == 1 else 64, 7, depthwise=True),
        conv(40, 80, 56, 2, 2),
        Layer((rows, 384 // part), (rows, 1536 // part), (1536 // part, 384 // part)),
    ]
