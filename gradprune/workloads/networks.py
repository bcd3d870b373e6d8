"""The networks of the demo, in plain torch: a bottleneck ResNet and a small network for digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SEED = 0

BRANCH_SCALE = 0.2
"""Initial weight of the last batch norm of a block. Goyal et al. 2017 ("Accurate, Large Minibatch SGD") set it to 0 for
training. With 1, an untrained network is so rough that the rounding of float32 alone moves its gradient by percents."""


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution (He et al. 2016, "Deep Residual Learning", figure 5).

    The stride is on the 3x3 convolution, as in the variant that is called ResNet v1.5.

    Args:
        channels: Input channels.
        width: Channels of the 3x3 convolution; the block returns four times as many.
        stride: Stride of the 3x3 convolution.
    """

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, channels, H, W)`` to ``(N, 4 * width, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Residual network of bottleneck blocks for images in [0, 1].

    Args:
        blocks: Blocks in each of the four stages; ``(3, 4, 6, 3)`` is ResNet-50.
        classes: Number of classes.
    """

    def __init__(self, blocks: Sequence[int], classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            for block in range(count):
                stages.append(Bottleneck(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width * Bottleneck.expansion
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, BRANCH_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, 3, H, W)``."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


class DigitsNet(nn.Module):
    """Two convolutions with batch norm, one max pool, two linear layers, for 8x8 grey digits in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def calibrated_resnet(blocks: Sequence[int], images: Tensor) -> ResNet:
    """A ResNet with random weights, always the same, whose batch-norm statistics are those of ``images``.

    Random weights cost an attack step exactly what trained ones do. The statistics matter: with their initial values
    the activations of an untrained network grow from block to block until float32 gradients mean little.

    Args:
        blocks: Blocks in each of the four stages.
        images: Images ``(N, 3, H, W)`` in [0, 1].

    Returns:
        The network, in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ResNet(blocks)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average over all calibration batches
    with torch.no_grad():
        for batch in images.split(8):
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
