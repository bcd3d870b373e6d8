"""Small networks with the structure of real ones, for tests that compare compiled steps with eager autograd.

Every network is built with a fixed seed, in evaluation mode unless it says otherwise, with normalisation layers that do
something: random affine parameters, random running statistics. Sizes are the smallest that keep the structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

CLASSES = 5

Inputs = tuple[Tensor, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes:
        name: Name of the network, which is that of the function that makes it.
        make: Makes the module with default initialisation.
        shape: Shape of one input, without the batch.
        label_shape: Shape of the label of one input; ``()`` for one label per input.
        loss: The loss, of the model's output and the labels.
        context: Makes what the model takes besides the attacked input, from a batch size and a dtype.
        training: The network is attacked in training mode.
        grouped: A convolution has more than one group.
        reads_one_token: What comes behind its last attention is computed for one token alone.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    label_shape: tuple[int, ...] = ()
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    context: Callable[[int, torch.dtype], tuple[Tensor, ...]] = lambda batch, dtype: ()
    training: bool = False
    grouped: bool = False
    reads_one_token: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module, with the same weights up to rounding whatever the dtype."""
        torch.manual_seed(0)
        model = self.make()
        randomise_normalisation(model)
        return model.to(dtype).train(self.training)

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> Inputs:
        """The input to attack, its labels, and what else the model takes."""
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(batch, *self.shape, generator=generator)
        y = torch.randint(CLASSES, (batch, *self.label_shape), generator=generator)
        return x.to(dtype), y, self.context(batch, dtype)


ZOO: dict[str, Network] = {}


def network(*shape: int, **fields: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a function that makes a module as a network of the zoo."""

    def decorate(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert make.__name__ not in ZOO
        ZOO[make.__name__] = Network(make.__name__, make, shape, **fields)
        return make

    return decorate


def randomise_normalisation(model: nn.Module) -> None:
    """Give every normalisation layer random scales, shifts and running statistics."""
    for module in model.modules():
        if "Norm" not in type(module).__name__:
            continue
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
            if isinstance(getattr(module, name, None), Tensor):
                nn.init.uniform_(getattr(module, name), low, high)
        if isinstance(getattr(module, "running_mean", None), Tensor):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


class Residual(nn.Module):
    """``activation(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None):
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class Head(nn.Sequential):
    """Global average pooling and a linear classifier."""

    def __init__(self, channels: int, rank: int = 2):
        pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
        super().__init__(pool(1), nn.Flatten(), nn.Linear(channels, CLASSES))


# --- Convolutional networks for images --------------------------------------------------------------------------------


def conv_bn(inp: int, out: int, kernel: int, stride: int = 1, **options: Any) -> list[nn.Module]:
    conv = nn.Conv2d(inp, out, kernel, stride, padding=kernel // 2, bias=False, **options)
    return [conv, nn.BatchNorm2d(out)]


def basic_block(inp: int, out: int, stride: int = 1) -> nn.Module:
    body = nn.Sequential(*conv_bn(inp, out, 3, stride), nn.ReLU(inplace=True), *conv_bn(out, out, 3))
    shortcut = nn.Sequential(*conv_bn(inp, out, 1, stride)) if stride > 1 else None
    return Residual(body, shortcut, nn.ReLU(inplace=True))


@network(3, 16, 16)
def resnet_basic() -> nn.Module:
    """ResNet-18: basic blocks, projected shortcuts, an overlapping max pool in the stem."""
    stem = [*conv_bn(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, basic_block(4, 4), basic_block(4, 8, stride=2), Head(8))


@network(3, 20, 20)
def resnet_bottleneck() -> nn.Module:
    """ResNet-50: bottlenecks, a 7x7 stem with stride 2 that leaves an output padding."""

    def bottleneck(inp: int, width: int, out: int, stride: int) -> nn.Module:
        layers = [*conv_bn(inp, width, 1), nn.ReLU(), *conv_bn(width, width, 3, stride), nn.ReLU()]
        body = nn.Sequential(*layers, *conv_bn(width, out, 1))
        return Residual(body, nn.Sequential(*conv_bn(inp, out, 1, stride)), nn.ReLU())

    stem = [*conv_bn(3, 4, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, bottleneck(4, 2, 8, 1), bottleneck(8, 4, 8, 2), Head(8))


@network(3, 12, 12)
def densenet() -> nn.Module:
    """DenseNet: every layer reads the concatenation of all before it."""

    class Layer(nn.Module):
        def __init__(self, inp: int, growth: int):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(inp), nn.Conv2d(inp, growth, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)

    transition = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2)]
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return nn.Sequential(stem, Layer(4, 2), Layer(6, 2), *transition, Layer(4, 2), nn.ReLU(), Head(6))


class SqueezeExcite(nn.Module):
    """Scale channels by a function of their means."""

    def __init__(self, channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


@network(3, 16, 16, grouped=True)
def mobilenet() -> nn.Module:
    """MobileNet: depthwise separable convolutions, ReLU6, hard-swish, squeeze and excitation."""

    def inverted_residual(channels: int, activation: Callable[[], nn.Module], *extra: nn.Module) -> nn.Module:
        wide = 2 * channels
        body = [*conv_bn(channels, wide, 1), activation(), *conv_bn(wide, wide, 3, groups=wide), activation()]
        return Residual(nn.Sequential(*body, *extra, *conv_bn(wide, channels, 1)))

    return nn.Sequential(
        *conv_bn(3, 4, 3, 2),
        nn.Hardswish(),
        inverted_residual(4, nn.ReLU6),
        *conv_bn(4, 4, 5, 2, groups=2),
        inverted_residual(4, nn.Hardswish, SqueezeExcite(8)),
        Head(4),
    )


class ChannelsLastNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(N, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@network(3, 24, 24, grouped=True)
def convnext() -> nn.Module:
    """ConvNeXt: patch stem, 7x7 depthwise convolutions, channels-last layer norm, GELU, layer scale."""

    class Block(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
            self.norm = nn.LayerNorm(channels)
            self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
            self.scale = nn.Parameter(torch.rand(channels))

        def forward(self, x: Tensor) -> Tensor:
            out = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))) * self.scale
            return x + out.permute(0, 3, 1, 2)

    stem, downsample = [nn.Conv2d(3, 4, 4, 4), ChannelsLastNorm(4)], [ChannelsLastNorm(4), nn.Conv2d(4, 8, 2, 2)]
    return nn.Sequential(*stem, Block(4), Block(4), *downsample, Head(8))


class UNetwork(nn.Module):
    """Two resolutions, transposed convolutions up, skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_bn(3, 4, 3), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), *conv_bn(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1))
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, padding=1, output_padding=1)
        self.up_again = nn.ConvTranspose2d(8, 4, 2, 2)
        self.out = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        up = self.up_again(F.relu(self.up(self.middle(skip))))
        return self.out(torch.cat([skip, up], 1))


@network(3, 12, 12, label_shape=(12, 12))
def unet() -> nn.Module:
    """U-Net: transposed convolutions, concatenated skips, a loss per pixel."""
    return UNetwork()


# --- Sequences, volumes -----------------------------------------------------------------------------------------------


@network(3, 32)
def conv_1d() -> nn.Module:
    """Dilated and strided convolutions of a signal."""
    layers = [nn.Conv1d(3, 4, 5, 2, padding=2), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 3, dilation=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.MaxPool1d(2), Head(6, rank=1))


@network(2, 6, 8, 8)
def conv_3d() -> nn.Module:
    """Convolutions of a volume."""
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), Head(4, rank=3))


class Attention(nn.Module):
    """Multi-head self-attention on ``(N, T, D)``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class VisionTransformer(nn.Module):
    """Pre-norm transformer blocks over patches and a class token."""

    def __init__(self, width: int = 8, tokens: int = 9):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
            self.blocks.append(nn.ModuleList([nn.LayerNorm(width), Attention(width, 2), mlp]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for norm, attention, mlp in self.blocks:
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.head(self.norm(x)[:, 0])


@network(3, 12, 12, reads_one_token=True)
def vit() -> nn.Module:
    """Vision transformer: class token, positions, scaled dot product attention."""
    return VisionTransformer()


class Encoder(nn.Module):
    """Post-norm transformer encoder over token embeddings, with a padding mask."""

    def __init__(self, width: int = 8, tokens: int = 6):
        super().__init__()
        self.positions, self.norm = nn.Embedding(tokens, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for _ in range(2):
            mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
            self.layers.append(nn.ModuleList([Attention(width, 2), nn.LayerNorm(width), mlp, nn.LayerNorm(width)]))
        self.pooler, self.head = nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(embeddings + self.positions(torch.arange(embeddings.shape[1], device=embeddings.device)))
        for attention, norm, mlp, norm_after in self.layers:
            x = norm(x + attention(x, mask[:, None, None, :]))
            x = norm_after(x + mlp(x))
        return self.head(torch.tanh(self.pooler(x[:, 0])))


def padding_mask(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Additive attention mask of sequences that each are one token shorter than the one before."""
    lengths = 6 - torch.arange(batch)
    return (torch.where(torch.arange(6) < lengths[:, None], 0.0, -1e4).to(dtype),)


@network(6, 8, context=padding_mask, reads_one_token=True)
def bert() -> nn.Module:
    """BERT attacked at its token embeddings, under an attention mask."""
    return Encoder()


class Recurrent(nn.Module):
    """Recurrent layers and a linear classifier of the last output."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layer(x)
        return self.head(outputs.mean(1 if self.layer.batch_first else 0))


@network(3, 3)
def lstm() -> nn.Module:
    """A bidirectional LSTM, batch first."""
    return Recurrent(nn.LSTM(3, 4, bidirectional=True, batch_first=True))


@network(2, 3)
def gru() -> nn.Module:
    """A GRU of two layers, batch first."""
    return Recurrent(nn.GRU(3, 4, num_layers=2, batch_first=True))


# --- Layers that treat their weights in a special way -----------------------------------------------------------------


def plain(*middle: nn.Module) -> nn.Module:
    """Two convolutions with something in between."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(4, 4, 3, 2), nn.ReLU(), Head(4))


@network(3, 8, 8)
def group_norm() -> nn.Module:
    """Group normalisation."""
    return plain(nn.GroupNorm(2, 4))


@network(3, 8, 8)
def instance_norm() -> nn.Module:
    """Instance normalisation with affine parameters, without and with running statistics."""
    return plain(nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@network(3, 8, 8)
def layer_norm() -> nn.Module:
    """Layer normalisation over channels and positions, and over features."""
    return nn.Sequential(plain(nn.LayerNorm([4, 8, 8])), nn.LayerNorm(CLASSES))


@network(3, 8, 8)
def prelu() -> nn.Module:
    """A rectifier whose slopes are weights, one for all channels and one for each."""
    return plain(nn.PReLU(), nn.Conv2d(4, 4, 1), nn.PReLU(4))


class Tied(nn.Module):
    """A convolution and a linear layer used twice each, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, padding=1)
        self.linear, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.conv(F.relu(self.stem(x))))).mean((2, 3))
        x = self.linear(torch.tanh(self.linear(x)))
        return self.head(self.second(torch.tanh(self.first(x))))


@network(3, 8, 8)
def tied() -> nn.Module:
    """Weights used more than once."""
    return Tied()


@network(3, 8, 8)
def weight_norm() -> nn.Module:
    """Weights as a direction and a length."""
    model = plain()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[-1][-1])
    return model


@network(3, 8, 8)
def spectral_norm() -> nn.Module:
    """Weights divided by their largest singular value."""
    model = plain()
    parametrizations.spectral_norm(model[0])
    parametrizations.spectral_norm(model[-1][-1])
    return model


class Standardised(nn.Module):
    """Weights of mean 0 and variance 1 for each output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        return ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, keepdim=True) + 1e-3).sqrt()).view_as(weight)


class Symmetric(nn.Module):
    """A square weight that equals its transpose."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


@network(3, 8, 8)
def parametrized() -> nn.Module:
    """Parametrizations of the user's own: a standardised convolution, a symmetric linear layer."""
    model = plain()
    parametrize.register_parametrization(model[0], "weight", Standardised())
    linear = parametrize.register_parametrization(nn.Linear(CLASSES, CLASSES), "weight", Symmetric())
    return nn.Sequential(model, nn.Tanh(), linear)


class UnfoldedConvolution(torch.autograd.Function):
    """A convolution as ``unfold`` and a matrix product, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        columns = F.unfold(x, weight.shape[2:], padding=1)
        ctx.save_for_backward(columns, weight)
        ctx.size = x.shape[2:]
        return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        columns, weight = ctx.saved_tensors
        grad = grads[0].flatten(2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.fold(weight.flatten(1).T @ grad, ctx.size, weight.shape[2:], padding=1)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad @ columns.mT).sum(0).view_as(weight)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2))
        return grad_x, grad_weight, grad_bias


class UnfoldedConv2d(nn.Conv2d):
    """A 3x3 convolution computed by ``UnfoldedConvolution``."""

    def forward(self, x: Tensor) -> Tensor:
        return UnfoldedConvolution.apply(x, self.weight, self.bias)


@network(3, 8, 8)
def custom_function() -> nn.Module:
    """Convolutions that are an ``autograd.Function`` of the user's own."""
    return nn.Sequential(UnfoldedConv2d(3, 4, 3), nn.ReLU(), UnfoldedConv2d(4, 4, 3), nn.ReLU(), Head(4))


# --- Layers without weights -------------------------------------------------------------------------------------------


class StochasticDepth(nn.Module):
    """Drop a residual branch at random in training, never in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(len(x), 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(0.5)


@network(3, 8, 8)
def dropout() -> nn.Module:
    """Dropout, channel dropout and stochastic depth, all idle in evaluation."""
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.5), StochasticDepth())
    return nn.Sequential(plain(Residual(branch), nn.Dropout(0.5)), nn.Dropout(0.5))


class Pooling(nn.Module):
    """Average, overlapping maximum, adaptive average and adaptive maximum pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * (9 + 4), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.first(x), 3, 2)
        x = F.max_pool2d(torch.tanh(self.second(x)), 2, 1)
        pools = F.adaptive_avg_pool2d(x, 3), F.adaptive_max_pool2d(x, 2)
        return self.head(torch.cat([pool.flatten(1) for pool in pools], 1))


@network(3, 11, 11)
def pooling() -> nn.Module:
    """Ways to pool."""
    return Pooling()


@network(3, 7, 7)
def padding() -> nn.Module:
    """Reflection and replication padding, bilinear upsampling."""
    return nn.Sequential(
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ReplicationPad2d((1, 2, 0, 1)),
        nn.Conv2d(4, 4, 3),
        Head(4),
    )


@network(3, 8, 8, training=True)
def batch_norm_in_training() -> nn.Module:
    """Batch normalisation by the statistics of the batch, which moves the running ones."""
    return plain(nn.BatchNorm2d(4))
