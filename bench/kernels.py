"""The isolated-kernel limit: what the convolutions and linear layers of a network cost by themselves.

Every configuration is computed in isolation in every way at hand, forward and to its input gradient. The sum of the
fastest, each times how often it occurs, is a floor for a step that computes the same layers; everything else in a step
(norms, activations, pools, attention, the update) comes on top.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprune.support.progress import counter

from .baselines import DTYPES
from .benchmark import Benchmark, Plan, add_budget, add_cases, add_settings, already, chosen_cases, packages_of
from .cases import Case
from .harness import synchronize
from .report import SECOND, Bar, draw_bars, figure, grid
from .store import Results, Settings

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

SAMPLE_SECONDS = 2e-3
"""A sample repeats a kernel until it takes about this long, so that the clock's own cost does not count."""

TOLERANCE = 0.02
"""Allowed relative error, in the Euclidean norm, of one way against the first: what computes something else is out."""

Way = Callable[[], Tensor]
Ways = dict[str, Callable[[], Way]]
"""By name, what prepares a way (packs its weights) and returns what is timed. The first is what eager does."""


@dataclass(frozen=True)
class Kernels:
    """One layer configuration in one direction, computed by itself in every way at hand.

    Attributes:
        case: Name of the case.
        candidate: The configuration, for people.
        kind: Class of the kernel, such as ``"conv 3x3"``.
        direction: ``"forward"`` or ``"input gradient"``.
        count: How often it occurs in the network.
        flops: FLOPs of one.
        seconds: Median seconds of one by way; the first way is what eager does. ``None`` where it cannot be used.
    """

    case: str
    candidate: str
    kind: str
    direction: str
    count: int
    flops: int
    seconds: dict[str, float | None]

    @property
    def plain(self) -> float:
        """Seconds of all its occurrences, the way eager does it."""
        return self.count * (next(iter(self.seconds.values())) or float("nan"))

    @property
    def best(self) -> tuple[float, str]:
        """Seconds of all its occurrences, the fastest way, and which that is."""
        seconds, name = min((value, name) for name, value in self.seconds.items() if value is not None)
        return self.count * seconds, name

    def derived(self, records: Sequence[Kernels]) -> dict[str, Any]:
        """Nothing that is not in the figures themselves."""
        return {}


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


def time_ways(ways: Ways, device: str, rounds: int, *, recorded: bool = False) -> dict[str, float | None]:
    """Median seconds of each way, ``None`` of those that cannot be used or compute something else.

    Args:
        ways: The ways; the first has to work.
        device: Where they run.
        rounds: Samples of each.
        recorded: On a GPU, time a CUDA graph of the way, in which nothing of Python is left.
    """
    ready: dict[str, Callable[[], object]] = {}
    expected: Tensor | None = None
    for name, prepare in ways.items():
        try:
            way: Way = prepare()
            result = way().float()
        except (RuntimeError, NotImplementedError):  # no kernel for this type or shape
            if expected is None:
                raise
            continue
        expected = result if expected is None else expected
        # A product over patches returns a row for each of the pixels.
        same = expected if expected.ndim == result.ndim else expected.permute(0, 2, 3, 1).flatten(0, 2)
        if float((result - same).norm() / same.norm()) <= TOLERANCE:
            ready[name] = record(way) if recorded and device == "cuda" else way
    calls = {name: max(1, round(SAMPLE_SECONDS / _sample(call, 1, device))) for name, call in ready.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            samples[name].append(_sample(call, calls[name], device))
    return {name: statistics.median(samples[name]) if name in ready else None for name in ways}


def record(way: Way) -> Callable[[], object]:
    """A CUDA graph of a way that has been called; the way itself if it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            way()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # what is left of the recording may be told once more
            torch.cuda.synchronize()
        return way
    return graph.replay


def _sample(way: Callable[[], object], calls: int, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        way()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def ways_of(layer: Layer, settings: Settings, *, unpacked: bool = False) -> tuple[Ways, Ways]:
    """How to compute a layer, and how its input gradient.

    Args:
        layer: The layer.
        settings: Device and type.
        unpacked: Also the ways to the input gradient that pack nothing, and the other layout.
    """
    dtype = DTYPES[settings.autocast] or torch.float32

    def random(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=settings.device, dtype=dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    x, grad, weight, bias = random(*layer.x), random(*layer.out), random(*layer.weight), random(layer.weight[0])
    packed = settings.device == "cpu" and torch.backends.mkldnn.is_available()
    if not layer.stride:
        return _products(lambda: x, lambda rows: rows, grad, weight, bias, packed)
    forward, backward = _convolutions(layer, x, grad, weight, bias, packed)
    if unpacked:
        backward.update(_unpacked_dgrads(layer, x, grad, weight))
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


def _unpacked_dgrads(layer: Layer, x: Tensor, grad: Tensor, weight: Tensor) -> Ways:
    """Ways to the input gradient of a convolution that need nothing but its weight, as it is or flipped."""
    stride, padding, dilation, groups = list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups
    spans = [dilation[i] * (layer.weight[2 + i] - 1) for i in range(2)]
    unseen = [(layer.x[2 + i] + 2 * padding[i] - spans[i] - 1) % stride[i] for i in range(2)]
    where = padding, dilation, True, unseen, groups

    def transposed(grad: Tensor, weight: Tensor) -> Way:
        return lambda: aten.convolution(grad, weight, None, stride, *where)

    def flip() -> Way:
        whole = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
        flipped = whole.contiguous(memory_format=torch.channels_last)
        rest = [span - pad for span, pad in zip(spans, padding, strict=True)]
        return lambda: F.conv2d(grad, flipped, None, 1, rest, dilation, groups)

    def plain_backward() -> Way:
        tensors = grad.contiguous(), x.contiguous(), weight.contiguous()
        masked = [True, False, False]
        numbers = stride, padding, dilation, False, [0, 0], groups
        return lambda: aten.convolution_backward(*tensors, None, *numbers, masked)[0]

    def without_cudnn() -> Way:
        product = transposed(grad, weight)

        def way() -> Tensor:
            with torch.backends.cudnn.flags(enabled=False):
                return product()

        return way

    ways: Ways = {
        "transposed conv": lambda: transposed(grad, weight),
        "transposed conv, contiguous": lambda: transposed(grad.contiguous(), weight.contiguous()),
        "masked conv backward, contiguous": plain_backward,
    }
    if layer.stride == (1, 1):
        ways["flipped conv"] = flip
    if grad.is_cuda:
        ways["transposed conv, no cuDNN"] = without_cudnn
    return ways


def limit(records: Sequence[Kernels], case: str) -> float | None:
    """Seconds that the layers of ``case`` take by themselves, each the fastest way; ``None`` if not measured."""
    return sum(record.best[0] for record in records if record.case == case) or None


def kernel_classes(records: Sequence[Kernels], case: str) -> dict[tuple[str, str], list[Kernels]]:
    """The layers of one case by class and direction, in alphabetical order."""
    found: dict[tuple[str, str], list[Kernels]] = {}
    for record in records:
        if record.case == case:
            found.setdefault((record.kind, record.direction), []).append(record)
    return dict(sorted(found.items()))


def rates(layers: Sequence[Kernels]) -> tuple[float, float]:
    """FLOP/s of some layers together, by the plain and by the best kernel of each."""
    flops = sum(layer.count * layer.flops for layer in layers)
    return flops / sum(layer.plain for layer in layers), flops / sum(layer.best[0] for layer in layers)


def _kernels(classes: dict[tuple[str, str], list[Kernels]], floor: float | None) -> str:
    rows = []
    for (kind, direction), layers in classes.items():
        winners: Counter[str] = Counter()
        for layer in layers:
            winners[layer.best[1]] += layer.count
        plain, best = rates(layers)
        row = [f"{kind}, {direction}", str(winners.total()), figure(sum(r.count * r.flops for r in layers), 1e9)]
        row += [figure(sum(layer.plain for layer in layers), 1e-3), figure(plain, 1e9)]
        row += [figure(sum(layer.best[0] for layer in layers), 1e-3), figure(best, 1e9)]
        rows.append([*row, ", ".join(f"{name} {count}" for name, count in winners.most_common())])
    head = ["kernels", "layers", "GFLOP", "plain ms", "plain GFLOP/s", "best ms", "best GFLOP/s", "best by"]
    plain = sum(layer.plain for layers in classes.values() for layer in layers)
    return f"Limit **{figure(floor, 1e-3)} ms**; plain kernels {figure(plain, 1e-3)} ms.\n\n{grid(head, rows)}"


class KernelsBenchmark(Benchmark):
    """``bench kernels``."""

    name = "kernels"
    help = "the isolated-kernel limit: convolutions and linear layers alone, by every kernel at hand"
    record = Kernels
    legend = """\
- GFLOP/s: FLOPs of all layers of a class over the time they take by themselves. plain: the kernel that eager calls;
  best: the fastest of all that were tried for each layer, weights already packed; who won is named with its layers.
- limit: forward and input gradient of all layers, each the fastest way, one after another."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """As ``Benchmark.add_options``."""
        add_cases(parser)
        add_budget(parser, None)
        add_settings(parser)

    def plans(self, arguments: argparse.Namespace, settings: Settings) -> list[Plan]:
        """As ``Benchmark.plans``."""
        cases = chosen_cases(arguments)

        def measure(results: Results[Kernels]) -> None:
            for case in cases:
                if case.name in results.cases:
                    already(case.name, results)
                else:
                    results.add(measure_kernels(case, settings, arguments.rounds))

        return [Plan(self, measure, packages_of(cases), compiles=False)]

    def sections(self, results: Results[Any]) -> list[str]:
        """As ``Benchmark.sections``."""
        body = []
        for case in results.cases:
            body += [f"## {case}", _kernels(kernel_classes(results.records, case), limit(results.records, case))]
        return body

    def draw(self, results: Results[Any]) -> Any:
        """As ``Benchmark.draw``."""
        panels: dict[str, list[Bar]] = {}
        for case in results.cases:
            for (kind, direction), layers in kernel_classes(results.records, case).items():
                plain, best = rates(layers)
                bars = [Bar(f"{kind}, {direction}", best / 1e9), Bar("", plain / 1e9, color=SECOND)]
                panels.setdefault(case, []).extend(bars)
        return draw_bars(panels, "GFLOP/s: best kernel (dark) and plain kernel (light)")
