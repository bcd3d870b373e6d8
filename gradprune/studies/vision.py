"""The networks of [HW], for photographs in [0, 1]: two plain CNNs, a residual one, and a transformer with windows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.errors import GradpruneError
from gradprune.workloads.models import Normalized

MEAN, STD = 0.5, 0.25
"""Photographs are normalised inside the networks, so that eps is in the units of pixels."""


class SimpleNet(nn.Module):
    """Strided 5x5, then 3x3 convolutions with max pools between them, an average pool, a linear layer.

    Args:
        classes: How many logits there are.
        width: Filters of the first convolution.
        convolution: Makes the convolutions, ``nn.Conv2d`` or one's own.
        normed: Whether batch norm follows each; then it is CustomNet.
    """

    def __init__(
        self, classes: int, width: int, convolution: Callable[..., nn.Module] = nn.Conv2d, *, normed: bool = False
    ) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            layers = [convolution(inputs, outputs, kernel, stride=stride, padding=kernel // 2)]
            return [*layers, nn.BatchNorm2d(outputs), nn.ReLU()] if normed else [*layers, nn.ReLU()]

        self.features = nn.Sequential(
            *block(3, width, 5, 2),
            nn.MaxPool2d(2),
            *block(width, 2 * width, 3, 1),
            *block(2 * width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width, 3, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of photographs ``(N, 3, H, W)``."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut.

    Args:
        inputs: Channels.
        outputs: Channels of the result.
        stride: Of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        return F.relu(self.branch(x) + self.shortcut(x))


class CustomNet2(nn.Module):
    """A small residual network.

    Args:
        classes: How many logits there are.
        width: Filters of the first convolution.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of photographs ``(N, 3, H, W)``."""
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention of patches ``(N, H, W, D)``, all with all or within windows.

    Args:
        width: D.
        heads: How many.
        window: Side of a window in patches; ``None`` for global attention.
    """

    def __init__(self, width: int, heads: int, window: int | None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shaped like the input."""
        count, height, width, depth = x.shape
        side = self.window or height
        across = self.window or width
        parts = x.view(count, height // side, side, width // across, across, depth).transpose(2, 3)
        tokens = parts.reshape(-1, side * across, depth)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        windows: Tensor = self.out(mixed).view(count, height // side, width // across, side, across, depth)
        return windows.transpose(2, 3).reshape(x.shape)


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm, beside a shortcut, and left out at random in training.

    Args:
        width: Of the patches.
        heads: Of the attention.
        window: See ``Attention``.
        drop: How often a sample skips a branch in training: stochastic depth (Huang et al. 2016).
    """

    def __init__(self, width: int, heads: int, window: int | None, drop: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, window))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Shaped like the input ``(N, H, W, D)``."""
        x = x + self._dropped(self.attention(x))
        return x + self._dropped(self.perceptron(x))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop:
            return branch
        keep = torch.rand(len(branch), 1, 1, 1, dtype=branch.dtype, device=branch.device) >= self.drop
        return branch * keep / (1 - self.drop)


class SimpleViT(nn.Module):
    """A transformer of patches with windowed and global self-attention in turn, and an average over all patches.

    Args:
        classes: How many logits there are.
        size: Side of the photographs.
        width: Of the patches, and of their grid the position embedding.
        depth: Blocks.
        patch: Side of a patch.
        window: Side of a window in patches.
    """

    def __init__(self, classes: int, size: int, width: int, depth: int = 4, patch: int = 8, window: int = 4) -> None:
        super().__init__()
        side = size // patch
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(side, side, width))
        window = min(window, side)
        self.blocks = nn.Sequential(
            *(
                Block(width, width // 16, window if number % 2 == 0 else None, 0.1 * number / max(depth - 1, 1))
                for number in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of photographs ``(N, 3, size, size)``."""
        patches = self.patches(x).permute(0, 2, 3, 1) + self.positions
        return self.classifier(self.norm(self.blocks(patches)).mean((1, 2)))  # type: ignore[no-any-return]


def resnet18(classes: int) -> nn.Module:
    """timm's ResNet-18, with random weights.

    Raises:
        GradpruneError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise GradpruneError("ResNet-18 is timm's, which is not installed: run pip install timm")
    from gradprune.workloads.vision import let_torchvision_import

    let_torchvision_import()
    import timm

    return timm.create_model("resnet18", num_classes=classes)


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "simple": lambda classes, size, width: SimpleNet(classes, width),
    "custom": lambda classes, size, width: SimpleNet(classes, width, normed=True),
    "custom2": lambda classes, size, width: CustomNet2(classes, width),
    "vit": lambda classes, size, width: SimpleViT(classes, size, 4 * width),
    "resnet18": lambda classes, size, width: resnet18(classes),
}
"""From the number of classes, the side of the photographs and a width to a network of normalised inputs."""


def build(name: str, classes: int, size: int, width: int) -> nn.Module:
    """A network of photographs in [0, 1]."""
    return Normalized(NETWORKS[name](classes, size, width), [MEAN] * 3, [STD] * 3)
