"""The networks under attack. Weights and inputs are random, always the same, and nothing is downloaded.

Random weights cost a step exactly what trained ones do. Batch-norm statistics are calibrated on inputs and branches
that start at zero are opened, else an untrained network has no gradient worth comparing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.errors import OptionError, unknown
from gradprune.workloads.networks import BRANCH_SCALE
from gradprune.workloads.vision import let_torchvision_import

SEED = 0
CALIBRATION_SEED = 10_000
CALIBRATION_BATCH = 8

Draw = Callable[[Sequence[int], torch.Generator], Tensor]


@dataclass(frozen=True)
class Workload:
    """A case that has been built.

    Attributes:
        case: What it is.
        model: The network, in evaluation mode.
        x: Clean inputs ``(N, ...)``.
        y: Labels ``(N,)``: what the network reads in the clean inputs.
    """

    case: Case
    model: nn.Module
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Case:
    """A network, the size of its input, and the Linf ball to attack it in.

    Attributes:
        network: Its name in tables, without the batch.
        batch: Inputs in a batch.
        shape: Shape of one input.
        build: Makes the network; the random state is set by the caller.
        eps: Radius of the ball.
        step_size: Length of a step.
        bounds: Smallest and largest valid input, ``None`` where any number is valid.
        draw: Makes inputs of a shape.
        requires: Package the network comes from, if it is not torch.
    """

    network: str
    batch: int
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    eps: float = 8 / 255
    step_size: float = 2 / 255
    bounds: tuple[float, float] | None = (0.0, 1.0)
    draw: Draw = lambda shape, generator: torch.rand(shape, generator=generator)
    requires: str | None = None

    @property
    def name(self) -> str:
        """Its name in tables and on the command line, such as ``resnet18-112-b8``."""
        return f"{self.network}-b{self.batch}"

    def inputs(self, seed: int, batch: int | None = None) -> Tensor:
        """Random inputs ``(N, ...)``, the same for the same seed."""
        return self.draw((batch or self.batch, *self.shape), torch.Generator().manual_seed(seed))

    def prepare(self, device: str = "cpu", *, channels_last: bool = False) -> Workload:
        """Build the network and its inputs.

        Args:
            device: Where to put them.
            channels_last: Store both with their channels last.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.build().eval()
        _calibrate(model, self.inputs(CALIBRATION_SEED, CALIBRATION_BATCH))
        model, x = model.to(device), self.inputs(SEED).to(device)
        if channels_last and x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            y = model(x).argmax(1)
        return Workload(self, model, x, y)


def find_case(name: str) -> Case:
    """The case called ``name``: one of ``CASES``, or with another batch at the end, or without, which is the default.

    Raises:
        OptionError: There is no such network.
    """
    known = (*CASES, *MORE_CASES)
    for case in known:
        if name in (case.name, case.network):
            return case
    stem, batch = re.fullmatch(r"(.*?)(?:-b([1-9]\d*))?", name).groups()  # type: ignore[union-attr]
    for case in known:
        if stem == case.network:
            return dataclasses.replace(case, batch=int(batch))
    raise OptionError(unknown("case", name, [case.name for case in known]))


class MnistCnn(nn.Module):
    """Two convolutions, a max pool and two linear layers on grey images of 28x28 (Madry et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.linear1 = nn.Linear(9216, 128)
        self.linear2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 10)`` of images ``(N, 1, 28, 28)``."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.linear2(F.relu(self.linear1(x.flatten(1))))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, channels, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def _resnet8() -> nn.Module:
    """The smallest of the ResNets for images of 32 pixels (He et al. 2016, section 4.2): three stages of one block."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class EncoderLayer(nn.Module):
    """Transformer encoder layer with the norm after the sum (Vaswani et al. 2017; Devlin et al. 2019)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attended = nn.Linear(hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.widen, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, tokens, hidden)`` to the same."""
        projected = (project(x) for project in (self.query, self.key, self.value))
        query, key, value = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in projected)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.attended(attended))
        return self.norm2(x + self.narrow(F.gelu(self.widen(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """BERT-base with a classifier of two classes, from embeddings on."""

    def __init__(self, layers: int = 12, hidden: int = 768, heads: int = 12, tokens: int = 64) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, hidden) * 0.02)
        self.norm = nn.LayerNorm(hidden)
        self.layers = nn.Sequential(*(EncoderLayer(hidden, heads) for _ in range(layers)))
        self.pooler, self.classifier = nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits ``(N, 2)`` of embeddings ``(N, tokens, hidden)``."""
        encoded = self.layers(self.norm(embeddings + self.positions))
        return self.classifier(torch.tanh(self.pooler(encoded[:, 0])))  # type: ignore[no-any-return]


def _tiny() -> nn.Module:
    """So little arithmetic that what remains is the overhead of Python and of the launches."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))


def _timm(name: str, **options: Any) -> nn.Module:
    let_torchvision_import()
    import timm

    return timm.create_model(name, **options)


def _small_resnet18() -> nn.Module:
    """ResNet-18 as it is used on CIFAR-10 (He et al. 2016; [SB] Figure 2): a stem that keeps all 32 by 32 pixels."""
    network = _timm("resnet18", num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the statistics of every batch norm to those of ``images``, and open the branches that start at zero."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            if not norm.weight.any():
                norm.weight.fill_(BRANCH_SCALE)
            norm.momentum = None  # the plain average
            norm.train()
        if norms:
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def timm_case(network: str, batch: int, name: str, size: int, **options: Any) -> Case:
    """A network of timm on images of ``size`` by ``size`` pixels.

    Args:
        network: What it is called here.
        batch: Images in a batch.
        name: What timm calls it.
        size: Pixels.
        options: Given to timm.
    """
    return Case(network, batch, (3, size, size), partial(_timm, name, **options), requires="timm")


CASES = (
    timm_case("resnet18-112", 8, "resnet18", 112),
    timm_case("resnet50-112", 8, "resnet50", 112),
    timm_case("resnet50-112", 32, "resnet50", 112),
    timm_case("resnet50-224", 4, "resnet50", 224),
    timm_case("mobilenetv2-112", 8, "mobilenetv2_100", 112),
    # Its layer scale starts at 1e-6, which leaves nothing of the branches.
    timm_case("convnext_atto-112", 8, "convnext_atto", 112, ls_init_value=BRANCH_SCALE),
    timm_case("vit_small-224", 4, "vit_small_patch16_224", 224),
    Case("mnist-cnn", 128, (1, 28, 28), MnistCnn, eps=0.3, step_size=0.01),
    Case(
        "bert-64",
        4,
        (64, 768),
        Encoder,
        bounds=None,
        draw=lambda shape, generator: torch.randn(shape, generator=generator) * 0.5,
    ),
)

TINY = Case("tiny", 1, (3, 8, 8), _tiny)
"""The case of ``bench overhead``."""

SMALL_RESNET = Case("resnet18-32", 16, (3, 32, 32), _small_resnet18, requires="timm")
"""A case of ``bench training``."""

RESNET8 = Case("resnet8-32", 64, (3, 32, 32), _resnet8)
"""A case of ``bench verdict``."""

GPU_CASES = (
    timm_case("resnet18-224", 32, "resnet18", 224),
    timm_case("mobilenetv2-224", 32, "mobilenetv2_100", 224),
    timm_case("convnext_atto-224", 32, "convnext_atto", 224, ls_init_value=BRANCH_SCALE),
)
"""Cases of ``bench gpu`` that are too large for a processor."""

MORE_CASES = (TINY, SMALL_RESNET, RESNET8, *GPU_CASES)
"""What is not part of all cases, and can be named."""
