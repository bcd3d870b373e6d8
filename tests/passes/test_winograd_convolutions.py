"""The Winograd kernel against torch in float64, and which convolutions it takes the place of."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, step_by_backward
from pass_testing import captured, find
from torch import nn
from torch.nn import functional as F

import gradprune
from gradprune.graph.cost import count_flops
from gradprune.ops import winograd
from gradprune.passes import winograd_convolutions as module
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.select_outputs import SelectOutputs
from gradprune.passes.winograd_convolutions import winograd_convolutions

aten = torch.ops.aten

needs_kernel = pytest.mark.skipif(not winograd.is_available(), reason="no compiler, or a BLAS that hides sgemm_")


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch: pytest.MonkeyPatch):
    """What is faster is decided on the machine at hand; tests must not depend on it."""
    monkeypatch.setattr(module, "_is_worth_it", lambda convolution: True)


def channels_last(*size: int) -> torch.Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


# --- Kernel -----------------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 2), (0, 2)], ids=str)
@pytest.mark.parametrize(
    ("images", "channels", "outputs", "height", "width"),
    [(1, 16, 16, 3, 3), (2, 16, 48, 5, 4), (3, 32, 16, 8, 7), (2, 48, 32, 13, 31)],
)
def test_convolution(images, channels, outputs, height, width, padding, activation, threads):
    torch.manual_seed(0)
    x, weight, bias = channels_last(images, channels, height, width), torch.randn(outputs, channels, 3, 3), None
    if activation == "relu":
        bias = torch.randn(outputs)
    transformed = winograd.winograd_weight(weight, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = winograd.winograd_convolution(x, transformed, bias, list(padding), activation)
    finally:
        torch.set_num_threads(before)
    expected = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    expected = expected.relu() if activation == "relu" else expected
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, expected) < 2e-6


@needs_kernel
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_transposed_weight(padding):
    torch.manual_seed(0)
    gradient, weight = channels_last(2, 32, 6, 7), torch.randn(32, 16, 3, 3)
    transformed = winograd.winograd_weight(weight, True)
    actual = winograd.winograd_convolution(gradient, transformed, None, [2 - padding] * 2, "none")
    expected = F.conv_transpose2d(gradient.double(), weight.double(), padding=padding)
    assert relative_error(actual, expected) < 2e-6


@needs_kernel
def test_more_tiles_than_a_block_holds():
    torch.manual_seed(0)
    x, weight = channels_last(5, 16, 25, 23), torch.randn(16, 16, 3, 3)
    assert 3 * winograd.TILES < 5 * 13 * 12
    actual = winograd.winograd_convolution(x, winograd.winograd_weight(weight, False), None, [1, 1], "none")
    assert relative_error(actual, F.conv2d(x.double(), weight.double(), padding=1)) < 2e-6


@needs_kernel
def test_any_layout_of_its_operands():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 6, 6), torch.randn(3, 3, 16, 32).permute(3, 2, 0, 1)
    actual = winograd.winograd_convolution(x, winograd.winograd_weight(weight, False), None, [1, 1], "none")
    assert relative_error(actual, F.conv2d(x.double(), weight.double(), padding=1)) < 2e-6


@needs_kernel
def test_no_further_from_float64_than_a_direct_convolution():
    torch.manual_seed(0)
    x, weight = channels_last(8, 128, 14, 14), torch.randn(128, 128, 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    transformed = winograd.winograd_weight(weight, False)
    actual = winograd.winograd_convolution(x, transformed, None, [1, 1], "none")
    direct = F.conv2d(x, weight, padding=1)
    assert (actual - expected).norm() <= 1.2 * (direct - expected).norm()


@needs_kernel
def test_nan_is_not_hidden_by_the_activation():
    x, weight = channels_last(1, 16, 4, 4), torch.randn(16, 16, 3, 3)
    x[0, 3, 1, 1] = torch.nan
    actual = winograd.winograd_convolution(x, winograd.winograd_weight(weight, False), None, [1, 1], "relu")
    assert actual[..., 0, 0].isnan().all()


@needs_kernel
@pytest.mark.parametrize("op", ["winograd_weight", "winograd_convolution"])
def test_operator(op):
    torch.manual_seed(0)
    weight = torch.randn(32, 16, 3, 3)
    transformed = winograd.winograd_weight(weight, False)
    samples = {
        "winograd_weight": [(weight, False), (weight, True)],
        "winograd_convolution": [(channels_last(2, 16, 5, 6), transformed, torch.randn(32), [1, 0], "relu")],
    }
    for arguments in samples[op]:
        torch.library.opcheck(
            getattr(torch.ops.gradprune, op), arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_without_a_blas_the_pass_does_nothing(monkeypatch):
    monkeypatch.setattr(winograd, "_gemm", lambda: 0)
    winograd.is_available.cache_clear()
    try:
        step_graph = pruned(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)))
        assert not winograd_convolutions.run(step_graph).changed
    finally:
        winograd.is_available.cache_clear()


# --- Pass -------------------------------------------------------------------------------------------------------------


def pruned(model: nn.Module, size: int = 9, dtype: torch.dtype = torch.float32):
    """The step graph of an attack on ``model``, with input gradients as convolutions."""
    model = model.to(dtype).eval()
    first = next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)))

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    step_graph = captured(step, torch.randn(2, first.in_channels, size, size, dtype=dtype))
    for rewrite in (SelectOutputs(), NarrowOutputs(), dgrad_as_convolution):
        rewrite.run(step_graph)
    return step_graph


@needs_kernel
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_forward_and_input_gradient_are_replaced(padding):
    step_graph = pruned(nn.Conv2d(16, 32, 3, padding=padding))
    before = count_flops(step_graph)
    result = winograd_convolutions.run(step_graph)
    assert len(result.narrowed) == 2
    paddings = [node.args[3] for node in find(step_graph, winograd.winograd_convolution)]
    assert paddings == [[padding] * 2, [2 - padding] * 2]
    assert not find(step_graph, aten.convolution.default)
    assert count_flops(step_graph) == before


@needs_kernel
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 32, 5),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.Conv2d(16, 32, 3, dilation=2),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(16, 40, 3),
        nn.Conv2d(8, 32, 3),
        nn.Conv2d(16, 32, (3, 1)),
    ],
    ids=str,
)
def test_other_convolutions_are_left(layer):
    assert not winograd_convolutions.run(pruned(layer)).changed


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_are_left(dtype):
    assert not winograd_convolutions.run(pruned(nn.Conv2d(16, 16, 3), dtype=dtype)).changed


@needs_kernel
def test_a_padding_of_more_than_two_is_left_to_a_direct_convolution():
    step_graph = pruned(nn.Conv2d(16, 16, 3, padding=3))
    assert not winograd_convolutions.run(step_graph).changed


def test_what_is_not_faster_is_left(monkeypatch):
    monkeypatch.setattr(module, "_is_worth_it", lambda convolution: False)
    assert not winograd_convolutions.run(pruned(nn.Conv2d(16, 16, 3))).changed


@pytest.mark.inductor
@needs_kernel
def test_compiled_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()
    x, y = torch.rand(3, 3, 11, 11), torch.tensor([0, 5, 9])
    step = gradprune.compile(step_by_backward(model, F.cross_entropy), strict=True)
    exact = step_by_backward(model.double(), F.cross_entropy)
    iterates = [x + 0.01 * torch.randn_like(x) for _ in range(2)]
    expected = [exact(x_adv.double(), x.double(), y)[1] for x_adv in iterates]
    model.float().zero_grad()
    for x_adv, gradient in zip(iterates, expected, strict=True):
        assert relative_error(step(x_adv, x, y)[1], gradient) < 1e-5
    (report,) = gradprune.reports(step)
    assert sum(change.operator == "gradprune.winograd_weight" for change in report.hoisted) == 4
