from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    in_one_piece,
    interpreted,
    relative_error,
    step_by_autograd_grad,
    step_by_backward,
    step_by_func_grad,
)
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import gradprune
from gradprune.compiler import lower
from gradprune.graph.captured_graph import CapturedGraph
from gradprune.graph.editing import copy_graph
from gradprune.passes import fold_batch_norm as module
from gradprune.passes.base import PassResult, Tier
from gradprune.passes.fold_batch_norm import FoldBatchNorm
from gradprune.torch_compat import dynamo

EXACT = 1e-12
"""Relative error in float64 of one that differs by rounding alone."""

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def settled(norm: Any) -> Any:
    """A norm whose statistics and parameters are none of those that a new one has."""
    if norm.running_mean is not None:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


# --- Dynamo graphs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """A Dynamo graph before and after folding, what it computes, and what folding said."""

    before: fx.Graph
    after: fx.Graph
    expected: Tensor
    actual: Tensor
    reasons: list[str]

    @property
    def changed(self) -> bool:
        return str(self.before) != str(self.after)

    def calls(self, *targets: Any) -> list[fx.Node]:
        return [node for node in self.after.nodes if node.target in targets]


def run(graph: fx.Graph) -> PassResult:
    """What the pass does to a graph."""
    weights = frozenset(node for node in graph.find_nodes(op="placeholder") if dynamo.is_module_state(node))
    return FoldBatchNorm().run(CapturedGraph(graph, "step", weights))


def fold(fn: Callable[..., Any], *args: Any) -> Folded:
    """Capture a function and fold. Folding says what it did, leaves a valid graph, and has nothing to do twice."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append((gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=False)(*args)
    ((gm, inputs),) = captured
    before, expected = copy_graph(gm.graph), evaluate(gm, inputs)
    result = run(gm.graph)
    gm.graph.lint()
    folded = Folded(before, gm.graph, expected, evaluate(gm, inputs), [change.reason for change in result.narrowed])
    assert folded.actual.dtype == expected.dtype
    assert result.changed == folded.changed
    assert result.removed == result.hoisted == result.skipped == []
    text = str(gm.graph)
    assert not run(gm.graph).changed
    assert str(gm.graph) == text
    return folded


def evaluate(gm: fx.GraphModule, inputs: list[Any]) -> Tensor:
    """What the graph returns; its inputs stay as they are."""
    gm.recompile()
    with torch.no_grad():
        (output,) = gm.forward(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    return output


def check_folded(folded: Folded, tolerance: float = EXACT) -> None:
    """Nothing is left of the only norm: its layer is as it was, but for its weight and bias."""
    FileCheck().check_not("batch_norm").run(str(folded.after))
    assert relative_error(folded.actual, folded.expected) < tolerance
    (reason,) = folded.reasons
    assert reason.startswith("folded into")
    layers = [
        [node.target for node in graph.nodes if node.target in module._LAYERS]
        for graph in (folded.before, folded.after)
    ]
    assert layers[0] == layers[1]
    assert len(layers[1]) == 1
    (output,) = folded.after.output_node().args[0]
    assert output.target in module._LAYERS


def check_multiply_add(folded: Folded, tolerance: float = EXACT) -> None:
    """The only norm is a product and a sum with vectors."""
    FileCheck().check_not("batch_norm").run(str(folded.after))
    assert relative_error(folded.actual, folded.expected) < tolerance
    assert folded.reasons == ["one multiply-add instead of a normalization"]


def check_left(folded: Folded) -> None:
    assert not folded.changed
    assert folded.reasons == []
    FileCheck().check("batch_norm").run(str(folded.after))


# --- Layers -----------------------------------------------------------------------------------------------------------


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    # layer, with or without a bias, and shape of its input
    "conv1d": (lambda bias: nn.Conv1d(3, 4, 3, stride=2, padding=1, bias=bias), (2, 3, 9)),
    "conv2d": (lambda bias: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), bias=bias), (2, 3, 7, 8)),
    "conv3d": (lambda bias: nn.Conv3d(2, 3, 2, dilation=2, bias=bias), (2, 2, 5, 6, 5)),
    "one by one": (lambda bias: nn.Conv2d(3, 4, 1, bias=bias), (2, 3, 5, 5)),
    "same padding": (lambda bias: nn.Conv2d(3, 4, 3, padding="same", bias=bias), (2, 3, 5, 5)),
    "groups": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), (2, 4, 6, 6)),
    "depthwise": (lambda bias: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias), (2, 4, 6, 6)),
    "depthwise 1d": (lambda bias: nn.Conv1d(4, 8, 3, groups=4, bias=bias), (2, 4, 6)),
    "transposed 1d": (lambda bias: nn.ConvTranspose1d(3, 4, 3, stride=2, bias=bias), (2, 3, 5)),
    "transposed 2d": (
        lambda bias: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1, dilation=2, bias=bias),
        (2, 3, 4, 5),
    ),
    "transposed 3d": (lambda bias: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=bias), (1, 2, 3, 3, 3)),
    "transposed groups": (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias), (2, 4, 5, 5)),
    "transposed groups 1d": (lambda bias: nn.ConvTranspose1d(6, 3, 3, groups=3, bias=bias), (2, 6, 5)),
    "transposed groups 3d": (lambda bias: nn.ConvTranspose3d(4, 4, 2, groups=2, bias=bias), (1, 4, 3, 3, 3)),
    "transposed depthwise": (lambda bias: nn.ConvTranspose2d(4, 4, 3, groups=4, bias=bias), (2, 4, 5, 5)),
    "linear": (lambda bias: nn.Linear(3, 4, bias=bias), (5, 3)),
}


def channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def layer_and_norm(name: str, bias: bool = True, **options: Any) -> tuple[nn.Sequential, Tensor]:
    make, shape = LAYERS[name]
    layer = make(bias)
    norm = settled(NORMS[max(len(shape) - 2, 1)](channels(layer), **options))
    return nn.Sequential(layer, norm).double().eval(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_norm_is_folded_into_its_layer(name: str, bias: bool, affine: bool):
    check_folded(fold(*layer_and_norm(name, bias, affine=affine)))


@pytest.mark.parametrize("name", ["conv2d", "transposed groups", "linear"])
def test_eps_is_the_norm_s_own(name: str):
    """With a large one, forgetting it or adding it after the root is no small error."""
    check_folded(fold(*layer_and_norm(name, eps=3.0)))
    model, x = layer_and_norm("conv2d", eps=3.0)
    check_multiply_add(fold(nn.Sequential(nn.Tanh(), model[1]).double().eval(), model[0](x).detach()))


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_norm_with_one_of_its_two_parameters(parameter: str):
    model, x = layer_and_norm("conv2d")
    setattr(model[1], parameter, None)
    check_folded(fold(model, x))


def test_text_before_and_after():
    folded = fold(*layer_and_norm("conv2d"))
    before = FileCheck().check("torch.conv2d](args = (%l_args_0_, %l_fn_modules_0_parameters_weight_,")
    before.check("batch_norm](args = (%input_1,").check("return (input_2,)").run(str(folded.before))
    after = FileCheck().check("torch.add](args = (%l_fn_modules_1_buffers_running_var_, 1e-05)")
    after.check("torch.mul](args = (%l_fn_modules_0_parameters_weight_, %reshape)")
    after.check("torch.conv2d](args = (%l_args_0_, %mul_2, %add_1, (2, 1), (0, 1), (1, 1), 1)")
    after.check("return (conv2d_1,)").run(str(folded.after))


def test_linear_layer_with_more_dimensions_is_no_layer_to_fold_into():
    """The norm's channels are the second dimension, the layer's are the last."""
    model = nn.Sequential(nn.Linear(3, 4), settled(nn.BatchNorm1d(5))).double().eval()
    check_multiply_add(fold(model, torch.randn(2, 5, 3, dtype=torch.float64)))


def test_linear_layer_with_as_many_features_as_the_norm_has_channels():
    """Shapes would not object."""
    model = nn.Sequential(nn.Linear(3, 4), settled(nn.BatchNorm1d(4))).double().eval()
    check_multiply_add(fold(model, torch.randn(2, 4, 3, dtype=torch.float64)))


@pytest.mark.parametrize("channels", [4, 6])
def test_convolution_without_a_batch_dimension(channels: int):
    """The norm takes the layer's positions for channels; there may be as many of both."""
    layer = nn.Conv1d(3, channels, 3, padding=1)
    model = nn.Sequential(layer, settled(nn.BatchNorm1d(6))).double().eval()
    check_multiply_add(fold(model, torch.randn(3, 6, dtype=torch.float64)))


CALLS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    # functional calls and the shape of their weight
    "padding": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (4, 4, 3, 3)),
    "stride": (lambda x, w, b: F.conv2d(x, w, b, stride=2), (4, 4, 3, 3)),
    "groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2), (4, 2, 3, 3)),
    "dilation": (lambda x, w, b: F.conv2d(x, w, b, dilation=2), (4, 4, 3, 3)),
    "no bias": (lambda x, w, b: F.conv2d(x, w, padding=1), (4, 4, 3, 3)),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, dilation=2), (4, 4, 3, 3)),
    "all by name": (lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, stride=1, padding=1), (4, 4, 3, 3)),
    "by position": (lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 1), (4, 4, 3, 3)),
    "defaults": (lambda x, w, b: F.conv2d(x, w, b), (4, 4, 3, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_options_may_be_given_by_name(name: str):
    call, shape = CALLS[name]
    layer, norm = nn.Conv2d(4, 4, 3).double(), settled(nn.BatchNorm2d(4)).double().eval()
    layer.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    check_folded(fold(lambda x: norm(call(x, layer.weight, layer.bias)), torch.randn(2, 4, 7, 7, dtype=torch.float64)))


# --- What is not folded -----------------------------------------------------------------------------------------------


class Pieces(nn.Module):
    """A convolution and two norms, put together by a function."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.other = settled(nn.BatchNorm2d(4)), settled(nn.BatchNorm2d(4))
        self.to_scale = nn.Linear(4, 4)
        self.function = forward
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def fold_pieces(forward: Callable[[Any, Tensor], Tensor]) -> Folded:
    return fold(Pieces(forward), torch.randn(2, 4, 5, 5, dtype=torch.float64))


BEHIND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "first layer": lambda m, x: m.conv(m.norm(x)),
    "before an activation": lambda m, x: m.conv(F.relu(m.norm(x))),
    "residual sum": lambda m, x: m.norm(x + m.conv(x)),
    "activation": lambda m, x: m.norm(F.relu(m.conv(x))),
    "pooling": lambda m, x: m.norm(F.avg_pool2d(m.conv(x), 2)),
    "layer read twice": lambda m, x: (lambda c: m.norm(c) * c.sigmoid())(m.conv(x)),
    "layer returned too": lambda m, x: (lambda c: torch.cat([m.norm(c), c]))(m.conv(x)),
    "view of the layer": lambda m, x: m.norm(m.conv(x).transpose(2, 3)),
    "dynamic convolution": lambda m, x: m.norm(F.conv2d(x, m.conv.weight * x.mean(), m.conv.bias, 1, 1)),
    "dynamic bias": lambda m, x: m.norm(F.conv2d(x, m.conv.weight, x.mean((0, 2, 3)), 1, 1)),
    "weight of the caller": lambda m, x: m.norm(F.conv2d(x, x.view(4, 2, 5, 5)[:, :, :3, :3], None, 1, 1, 1, 2)),
}


@pytest.mark.parametrize("case", BEHIND)
def test_behind_anything_else_a_norm_becomes_a_multiply_add(case: str):
    check_multiply_add(fold_pieces(BEHIND[case]))


def test_layer_that_another_norm_reads_too():
    folded = fold_pieces(lambda m, x: (lambda c: m.norm(c) + m.other(c))(m.conv(x)))
    assert folded.reasons == ["one multiply-add instead of a normalization"] * 2
    assert len(folded.calls(torch.conv2d)) == 1
    assert relative_error(folded.actual, folded.expected) < EXACT


def test_norm_behind_a_norm():
    """The first is folded into the convolution, and so there is none before the second any more."""
    folded = fold_pieces(lambda m, x: m.other(m.norm(m.conv(x))))
    FileCheck().check_not("batch_norm").run(str(folded.after))
    assert folded.reasons[0].startswith("folded")
    assert len(folded.reasons) == 2
    assert relative_error(folded.actual, folded.expected) < EXACT


def test_pre_activation_block():
    """The norm between two convolutions is folded into the first, the one that opens the block is not."""
    folded = fold_pieces(lambda m, x: x + m.conv(F.relu(m.norm(m.conv(F.relu(m.other(x)))))))
    assert folded.reasons == ["one multiply-add instead of a normalization", "folded into conv2d"]
    assert relative_error(folded.actual, folded.expected) < EXACT


def test_convolution_that_is_called_twice_with_a_norm_each():
    """Each call has a weight of its own, scaled by its own norm."""
    folded = fold_pieces(lambda m, x: m.other(m.conv(m.norm(m.conv(x)).relu())))
    assert [reason.split()[0] for reason in folded.reasons] == ["folded", "folded"]
    weights = {node.args[1] for node in folded.calls(torch.conv2d)}
    assert len(weights) == 2
    assert relative_error(folded.actual, folded.expected) < EXACT


def test_norm_that_is_called_twice():
    folded = fold_pieces(lambda m, x: m.norm(m.conv(m.norm(x))))
    assert [reason.split()[0] for reason in folded.reasons] == ["one", "folded"]
    assert relative_error(folded.actual, folded.expected) < EXACT


def test_weight_computed_from_weights_is_folded():
    """Weight standardisation."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)
        return m.norm(F.conv2d(x, weight, m.conv.bias, (1, 1), (1, 1), (1, 1), 1))

    check_folded(fold_pieces(forward))


def test_scale_computed_after_the_layer_becomes_a_multiply_add():
    """Folding would read it before it is there."""

    def forward(m: Any, x: Tensor) -> Tensor:
        value = m.conv(x)
        return F.batch_norm(value, m.norm.running_mean, m.norm.running_var, m.norm.weight.exp(), m.norm.bias)

    check_multiply_add(fold_pieces(forward))


def test_scale_computed_before_the_layer_is_folded():
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = m.norm.weight.exp()
        return F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, scale, m.norm.bias)

    check_folded(fold_pieces(forward))


LEFT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scale of the input": lambda m, x: F.batch_norm(
        m.conv(x), m.norm.running_mean, m.norm.running_var, m.to_scale(x.mean((0, 2, 3))), m.norm.bias
    ),
    "shift of the input": lambda m, x: F.batch_norm(
        m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.to_scale(x.mean((0, 2, 3)))
    ),
    "mean of the input": lambda m, x: F.batch_norm(m.conv(x), x.mean((0, 2, 3)), m.norm.running_var),
    "variance of the input": lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, x.var((0, 2, 3))),
    "training": lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, training=True),
    "no statistics": lambda m, x: F.batch_norm(m.conv(x), None, None, m.norm.weight, m.norm.bias, training=True),
}


@pytest.mark.parametrize("case", LEFT)
def test_norm_of_what_is_no_weight_is_left(case: str):
    check_left(fold_pieces(LEFT[case]))


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "transposed 2d", "linear"])
def test_training_mode_is_left(name: str):
    """The statistics are those of the batch, and the running ones are written."""
    model, x = layer_and_norm(name)
    check_left(fold(model.train(), x))


def test_norm_without_running_statistics_is_left():
    check_left(fold(*layer_and_norm("conv2d", track_running_stats=False)))


def test_norm_in_training_beside_one_in_evaluation():
    def forward(m: Any, x: Tensor) -> Tensor:
        m.other.training = True
        return m.other(m.norm(m.conv(x)))

    folded = fold_pieces(forward)
    (reason,) = folded.reasons
    assert reason.startswith("folded")
    assert len(folded.calls(F.batch_norm)) == 1
    assert relative_error(folded.actual, folded.expected) < EXACT


# --- Weights that the graph writes ------------------------------------------------------------------------------------


def in_place(tensor: Tensor) -> None:
    tensor.mul_(2)


def in_place_function(tensor: Tensor) -> None:
    torch.relu_(tensor)


def out(tensor: Tensor) -> None:
    torch.mul(tensor, 2, out=tensor)


def element(tensor: Tensor) -> None:
    tensor[0] = 3.0


def through_view(tensor: Tensor) -> None:
    tensor.view(-1).mul_(2)


def through_detached(tensor: Tensor) -> None:
    tensor.detach().mul_(2)


def augmented(tensor: Tensor) -> None:
    tensor *= 2


WRITES = [in_place, in_place_function, out, element, through_view, through_detached, augmented]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("operand", ["weight", "bias", "running_mean", "running_var"])
def test_norm_that_the_graph_writes_to_is_left(operand: str, write: Callable[[Tensor], None]):
    """The layer comes before the write, the norm after it: folded, it would have the values of before."""

    def forward(m: Any, x: Tensor) -> Tensor:
        value = m.conv(x)
        with torch.no_grad():
            write(getattr(m.norm, operand))
        return m.norm(value)

    folded = fold_pieces(forward)
    assert relative_error(folded.actual, folded.expected) < EXACT
    check_left(folded)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("operand", ["weight", "bias"])
def test_layer_that_the_graph_writes_to_is_not_folded_into(operand: str, write: Callable[[Tensor], None]):
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(getattr(m.conv, operand))
        return m.norm(m.conv(x))

    check_multiply_add(fold_pieces(forward))


# --- Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["conv2d", "transposed groups", "linear"])
def test_half_precision_weights_with_statistics_in_float32(name: str, dtype: torch.dtype):
    """The folded weight is rounded once, to the weight's type; so is the bias."""
    model, x = layer_and_norm(name)
    exact, model, x = model(x), nn.Sequential(model[0].to(dtype), model[1].float()), x.to(dtype)
    folded = fold(model, x)
    rounding = torch.finfo(dtype).eps
    check_folded(folded, tolerance=4 * rounding)
    assert relative_error(folded.actual, exact) < 4 * rounding
    (output,) = folded.after.output_node().args[0]
    weight, bias = output.args[1:3]
    for node in (weight, bias):
        assert (node.op, node.target, node.args[1]) == ("call_method", "to", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiply_add_of_a_half_precision_value_is_rounded_at_the_end(dtype: torch.dtype):
    norm, x = settled(nn.BatchNorm2d(4)).eval(), torch.randn(2, 4, 5, 5).to(dtype)
    folded = fold(lambda x: norm(x.tanh()), x)
    check_multiply_add(folded, tolerance=torch.finfo(dtype).eps)
    (output,) = folded.after.output_node().args[0]
    assert output.target == "to"
    assert output.args[0].target is torch.add


@pytest.mark.parametrize("case", ["folded", "multiply-add"])
def test_autocast(case: str):
    """Inside the region the layer is computed in bfloat16, and the scale is not."""
    m, x = Pieces(lambda m, x: m.norm(m.conv(x))).float(), torch.randn(2, 4, 5, 5)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value = m.conv(x)
            return m.norm(value if case == "folded" else value.relu())

    folded = fold(forward, x)
    assert folded.actual.dtype == torch.bfloat16
    (check_folded if case == "folded" else check_multiply_add)(folded, 4 * torch.finfo(torch.bfloat16).eps)


# --- Steps ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block that adds its input, before or after which there is a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (settled(nn.BatchNorm2d(4)) for _ in range(3))
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value = self.conv2(self.second(self.conv1(self.first(x).relu())).relu())
        return self.last(x + value)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), settled(nn.BatchNorm2d(4)), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(64, 8), settled(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 5)),
    ),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Residual(), nn.Flatten(), nn.Linear(144, 5)),
    "transposed": lambda: nn.Sequential(
        *(nn.Conv2d(3, 4, 2, stride=2, groups=1), settled(nn.BatchNorm2d(4, affine=False)), nn.SiLU()),
        *(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), settled(nn.BatchNorm2d(6)), nn.Flatten(), nn.Linear(486, 5)),
    ),
}


def problem(name: str = "plain", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A network in evaluation mode and the arguments of a step."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8, dtype=dtype)
    return NETWORKS[name]().to(dtype).eval(), (x + 0.01 * torch.rand_like(x), x, torch.tensor([1, 3]))


@pytest.fixture
def left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The Dynamo graphs as they go on to autograd."""
    graphs: list[fx.Graph] = []
    compile_fx = lower._compile_fx

    def record(gm: fx.GraphModule, *args: Any, **options: Any) -> Any:
        graphs.append(copy_graph(gm.graph))
        assert ("batch_norm" in gm.code) == (norms(gm.graph) > 0), "the code is that of another graph"
        return compile_fx(gm, *args, **options)

    monkeypatch.setattr(lower, "_compile_fx", record)
    return graphs


def norms(graph: fx.Graph) -> int:
    return sum(node.target is F.batch_norm for node in graph.nodes)


@in_one_piece
@pytest.mark.parametrize(
    "make",
    [
        step_by_autograd_grad,
        step_by_backward,
        step_by_func_grad,
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_is_eager_s(name: str, make: Callable[..., Any], left_to_autograd: list[fx.Graph]):
    model, arguments = problem(name)
    _, expected = make(model, F.cross_entropy)(*arguments)
    model.zero_grad()
    with interpreted():
        step = gradprune.compile(make(model, F.cross_entropy), strict=True, verify=True)
        for _ in range(2):
            _, gradient = step(*arguments)
            assert relative_error(gradient, expected) < EXACT
    (graph,) = left_to_autograd
    assert norms(graph) == 0
    report = gradprune.reports(step)[-1]
    (record,) = (record for record in report.passes if record.name == FoldBatchNorm.name)
    assert record.tier is Tier.REORDERS_FLOAT
    assert len(record.result.narrowed) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


@in_one_piece
def test_requires_grad_is_no_write(left_to_autograd: list[fx.Graph]):
    """Dynamo traces the call for values that a step makes."""
    conv, norm = nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)).eval()

    def model(x: Tensor) -> Tensor:
        weight = conv.weight.detach().requires_grad_(True)
        return norm(F.conv2d(x, weight, conv.bias, (1, 1), (0, 0), (1, 1), 1)).flatten(1)

    _, arguments = problem(dtype=torch.float32)
    gradprune.explain(step_by_autograd_grad(model, F.cross_entropy), *arguments, strict=True)
    (graph,) = left_to_autograd
    assert len(graph.find_nodes(op="call_method", target="requires_grad_")) == 2  # the image's too
    (layer,) = graph.find_nodes(op="call_function", target=torch.conv2d)
    assert layer.args[1].target is torch.mul


def test_gradient_in_autocast():
    model, arguments = problem(dtype=torch.float32)

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y)

    def make(model: nn.Module) -> Callable[..., Any]:
        def autocast_model(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return step_by_autograd_grad(autocast_model, loss)

    _, exact = step_by_autograd_grad(problem()[0], loss)(
        *(a.double() if a.is_floating_point() else a for a in arguments)
    )
    _, eager = make(model)(*arguments)
    with interpreted():
        step = gradprune.compile(make(model), strict=True, verify=True)
        _, gradient = step(*arguments)
    assert len(gradprune.reports(step)[-1].narrowed) > 0
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact) < 2 * relative_error(eager, exact)


@in_one_piece
@pytest.mark.parametrize(
    "options",
    [{"fold_batch_norm": False}, {"disable": [FoldBatchNorm.name]}, {"exact_order": True}],
    ids=["fold_batch_norm=False", "disable", "exact_order"],
)
def test_options_leave_the_norm(options: dict[str, Any], left_to_autograd: list[fx.Graph]):
    model, arguments = problem()
    step = step_by_backward(model, F.cross_entropy)
    report = gradprune.explain(step, *arguments, strict=True, **options)
    assert FoldBatchNorm.name not in [record.name for record in report.passes]
    (graph,) = left_to_autograd
    assert norms(graph) == 2


def test_model_form(left_to_autograd: list[fx.Graph]):
    model, (x_adv, _, _) = problem()
    gradprune.explain(model, x_adv.requires_grad_(True))
    (graph,) = left_to_autograd
    assert norms(graph) == 0


# --- Failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding fails at the second norm, when it has changed the first."""
    original, calls = module._scale_and_shift, []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) % 2 == 0:
            raise KeyError("boom")
        return original(*args)

    monkeypatch.setattr(module, "_scale_and_shift", fails)


@in_one_piece
def test_failing_fold_is_undone_and_reported(
    broken: None, left_to_autograd: list[fx.Graph], caplog: pytest.LogCaptureFixture
):
    model, arguments = problem()
    _, expected = step_by_autograd_grad(model, F.cross_entropy)(*arguments)
    with interpreted():
        step = gradprune.compile(step_by_autograd_grad(model, F.cross_entropy), verify=True)
        _, gradient = step(*arguments)
    assert relative_error(gradient, expected) < EXACT
    (graph,) = left_to_autograd
    assert norms(graph) == 2
    assert "rsqrt" not in str(graph)
    report = gradprune.reports(step)[-1]
    assert report.fallback == "pass 'fold-batch-norm' failed: KeyError('boom')"
    assert FoldBatchNorm.name not in [record.name for record in report.passes]
    (warning,) = (record for record in caplog.records if record.name.startswith("gradprune"))
    assert warning.levelno == logging.WARNING
    assert "folding failed: pass 'fold-batch-norm' failed: KeyError('boom')" in warning.getMessage()


def test_the_other_passes_run_all_the_same(broken: None):
    model, arguments = problem()
    report = gradprune.explain(step_by_autograd_grad(model, F.cross_entropy), *arguments)
    assert report.fallback is not None
    assert report.ops["after"] < report.ops["before"]
    assert "select-outputs" in [record.name for record in report.passes]


def test_strict_raises(broken: None):
    model, arguments = problem()
    with interpreted(), pytest.raises(gradprune.PassError, match=r"pass 'fold-batch-norm' failed: KeyError\('boom'\)"):
        gradprune.compile(step_by_autograd_grad(model, F.cross_entropy), strict=True)(*arguments)


@in_one_piece
def test_invalid_graph_is_a_failure(monkeypatch: pytest.MonkeyPatch, left_to_autograd: list[fx.Graph]):
    def corrupts(self: FoldBatchNorm, captured: CapturedGraph) -> Any:
        layer = next(node for node in captured.graph.nodes if node.target is torch.conv2d)
        layer.args = (next(iter(layer.users)), *layer.args[1:])
        return PassResult()

    monkeypatch.setattr(FoldBatchNorm, "run", corrupts)
    model, arguments = problem()
    report = gradprune.explain(step_by_autograd_grad(model, F.cross_entropy), *arguments)
    assert "pass 'fold-batch-norm' failed" in (report.fallback or "")
    (graph,) = left_to_autograd
    graph.lint()
