"""What the report says: on one screen, node by node, and in figures that other counts agree with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import eager_flops, step_by_backward
from steps import Tokens, compiled, convolutional, images, network, tokens, training_mode
from torch import Tensor, nn

import gradprune
from gradprune import GradpruneError
from gradprune.compiler.options import Options
from gradprune.inspect.explain import analyse, count_frozen_compile
from gradprune.report.kernels import Kernel, called_kernels

# --- One screen -------------------------------------------------------------------------------------------------------


def many_kept() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Returns the gradients of all weights, each for a reason of its own, from a path as long as paths get."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(30)), nn.Flatten(), nn.Linear(192, 5))
    source = "def step(x, y):\n    x = x.detach().requires_grad_(True)\n    loss = F.cross_entropy(model(x), y)\n"
    source += "    gx, *gw = torch.autograd.grad(loss, [x, *model.parameters()])\n"
    source += "    return gx, [w" + "".join(f" * {k}" for k in range(3)) + " for w in gw], gw\n"
    names: dict[str, Any] = {"model": model, "F": F, "torch": torch}
    exec(compile(source, "/" + "a-long-folder-name/" * 12 + "step.py", "exec"), names)
    return names["step"], (images()[0], images()[2])


@pytest.mark.parametrize("make", [convolutional, training_mode, many_kept], ids=lambda make: make.__name__)
def test_it_fits_on_one_screen(make: Any, no_code: None):
    lines = str(compiled(make())).splitlines()
    assert len(lines) <= 40
    # A path is never cut; nothing else is longer.
    assert [line for line in lines if len(line) > 120 and "a-long-folder-name" not in line] == []


def test_it_says_what_is_kept_and_why(no_code: None):
    report = compiled(many_kept())
    text = " ".join(str(report).split())
    assert len(report.weight_gradients) >= 30  # one for each convolution
    assert f"weight gradients computed by {len(report.weight_gradients)} operators: output" in text
    assert "kept aten." in text
    assert "the step returns this weight gradient" in text


def test_nothing_kept_is_nothing_said(no_code: None):
    report = compiled(convolutional())
    assert report.weight_gradients == []
    assert "weight gradients computed" not in str(report)


# --- Why --------------------------------------------------------------------------------------------------------------


def named(report: gradprune.Report, when: str, operator: str) -> str:
    return next(name for name, seen in report.graphs[when].nodes.items() if seen.operator == operator)


def test_a_kept_node_leads_to_the_output_that_needs_it(no_code: None):
    report = compiled(convolutional())
    sign = report.why(named(report, "after", "aten.sign"))
    assert sign.kept
    assert sign.output == 0
    assert sign.reason == "a value that is asked for"
    assert sign.chain[0] == (sign.node, "aten.sign")
    nodes = report.graphs["after"].nodes
    for (reader, _), (read, _) in zip(sign.chain[1:], sign.chain, strict=False):
        assert read in nodes[reader].inputs
    assert sign.chain[-1][0] == report.graphs["after"].outputs[0][0]
    text = str(sign)
    assert f"{sign.node}: aten.sign" in text
    assert "helpers.py:" in text
    assert "is output 0: a value that is asked for" in text


def test_a_weight_leads_through_what_is_hoisted(no_code: None):
    report = compiled(convolutional())
    weight = next(name for name, seen in report.graphs["after"].nodes.items() if seen.operator == "weight")
    assert "computed once per attack" in report.why(weight).reason


def test_a_removed_node_names_its_pass(no_code: None):
    report = compiled(convolutional())
    for record in report.passes:
        for change in record.result.removed:
            answer = report.why(change.node)
            assert not answer.kept
            assert answer.output is None
            assert record.name in answer.reason
            assert "is not computed" in str(answer)
    backward = report.why(named(report, "before", "aten.convolution_backward"))
    assert "dgrad-as-convolution replaced it" in backward.reason


def test_every_node_has_an_answer(no_code: None):
    report = compiled(training_mode())
    for when, graph in report.graphs.items():
        for name in graph.nodes:
            answer = report.why(name)
            assert answer.kept or when == "before"
            assert answer.reason


def test_a_weight_gradient_that_is_returned(no_code: None):
    report = compiled(many_kept())
    answer = report.why(report.weight_gradients[0].node)
    assert answer.kept
    assert answer.output is not None


def test_an_unknown_node_has_a_nearest_name(no_code: None):
    report = compiled(convolutional())
    with pytest.raises(GradpruneError, match="no node 'convolutoin': did you mean 'convolution"):
        report.why("convolutoin")
    with pytest.raises(GradpruneError, match="no node 'x'"):
        gradprune.Report("step").why("x")


# --- Figures ----------------------------------------------------------------------------------------------------------


def plain(channels: int = 8) -> nn.Module:
    """Nothing that autograd and AOTAutograd save differently: no pooling, whose indices the compiler stores in a byte
    each, and no batch norm, whose operands eager keeps together with two empty tensors."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, stride=2), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(9 * channels, 5)),
    )


def saved_by_eager(function: Callable[..., Any], args: tuple[Tensor, ...], owned: list[Tensor]) -> int:
    """Bytes of storages that eager autograd saves during a call, other than those of arguments and weights."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in (*owned, *args)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in addresses)


CASES: dict[str, Callable[[], nn.Module]] = {"convolutions": plain, "batch norm and pooling": network}


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_torch_counts_while_eager_runs(name: str, no_code: None):
    """Before: the step as it is. After: the step with frozen weights, which computes no weight gradient either.

    torch counts the weight gradient of a grouped convolution once per group too often; there is none here.
    """
    model, args = CASES[name](), images()
    step = step_by_backward(model, F.cross_entropy)
    report = compiled((step, args))
    assert sum(report.flops["before"].values()) == pytest.approx(eager_flops(step, *args), rel=0.01)
    model.requires_grad_(False)
    assert sum(report.flops["after"].values()) == pytest.approx(eager_flops(step, *args), rel=0.01)


def test_flops_of_attention(no_code: None):
    step, args = tokens()
    report = compiled((step, args))
    model = Tokens().eval().requires_grad_(False)

    def frozen(x_adv: Tensor, x: Tensor, y: Tensor, numbers: Tensor) -> None:
        F.cross_entropy(model(x_adv.requires_grad_(True), numbers), y).backward()

    assert sum(report.flops["after"].values()) == pytest.approx(eager_flops(frozen, *args), rel=0.01)


def test_bytes_saved_before_are_those_that_eager_saves(no_code: None):
    """The loss saves what eager saves too, a few bytes; hence a batch that makes them negligible."""
    model, (x, clean, y) = plain(), images(64)
    report = compiled((step_by_backward(model, F.cross_entropy), (x, clean, y)))
    eager = saved_by_eager(lambda x: model(x), (x.clone().requires_grad_(True),), list(model.parameters()))
    assert report.saved_bytes["before"] == pytest.approx(eager, rel=0.01)


def test_curve_of_memory(no_code: None):
    report = compiled(convolutional())
    for when in ("before", "after"):
        assert len(report.memory[when]) == report.ops[when]
        assert max(report.memory[when]) == report.peak_bytes[when]
    assert report.to_dict()["memory"] == report.memory


def test_prediction(no_code: None):
    """FLOPs fall by a third, traffic by what is saved; the prediction lies between, and there is none of one graph."""
    report = compiled((step_by_backward(plain(32), F.cross_entropy), images(16)))
    ratios = report.speedup
    assert ratios["flops"] == pytest.approx(1.5)
    assert ratios["bytes"] > 1
    assert min(ratios["flops"], ratios["bytes"]) <= ratios["predicted"] <= max(ratios["flops"], ratios["bytes"])
    assert f"{ratios['predicted']:.2f}x" in str(report)
    assert gradprune.Report("step").speedup == {}


def test_bytes_of_hoisted_values(no_code: None):
    report = compiled(convolutional())
    sizes = {change["node"]: change["bytes"] for change in report.to_dict()["hoisted"]}
    assert sum(sizes.values()) == report.hoisted_bytes > 0
    # The folded weight of the first convolution, as large as the weight itself.
    assert 4 * 8 * 3 * 9 in sizes.values()


# --- Against torch.compile --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def saved_by_compiled() -> Iterator[list[Tensor]]:
    """The tensors that a compiled forward pass saves while it runs."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def test_frozen_compile_is_counted_as_it_is():
    """Against a frozen model that torch.compile really compiled: what it saves, and what eager computes."""
    model, args = network(), images()
    step = step_by_backward(model, F.cross_entropy)
    analysis = analyse(step, args, Options())
    counted = count_frozen_compile(step, args, analysis.weights)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    assert sum(counted.flops.values()) == pytest.approx(eager_flops(step, *args), rel=0.01)
    assert counted.flops["weight_grad"] == 0
    # In channels-last order it would save copies of the input and of weights besides.
    run = torch.compile(lambda x, y: F.cross_entropy(model(x), y), options={"layout_optimization": False})
    x = args[0].clone().requires_grad_(True)
    with saved_by_compiled() as saved:
        run(x, args[2])
    owned = {t.untyped_storage().data_ptr() for t in (x, args[2], *model.parameters(), *model.buffers())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    actual = sum(size for address, size in storages.items() if address not in owned)
    assert counted.saved_bytes == pytest.approx(actual, rel=0.01)


def test_frozen_compile_of_a_model():
    model = network()
    args = (images()[0].requires_grad_(True),)
    analysis = analyse(model, args, Options())
    counted = count_frozen_compile(model, args, analysis.weights)
    assert counted.flops["forward"] == counted.flops["input_grad"] == analysis.report.flops["after"]["forward"]
    assert counted.flops["weight_grad"] == 0
    assert args[0].grad is None


# --- Kernels ----------------------------------------------------------------------------------------------------------

CODE = """
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()
cpp_fused_relu_0 = async_compile.cpp_pybinding(['float*'], r'''void kernel() { other_0(); }''')
triton_poi_fused_add_1 = async_compile.triton('triton_', '''code''')
async_compile.wait(globals())

class Runner:
    def call(self, args):
        buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
        cpp_fused_relu_0(buf0)
        extern_kernels.mm(reinterpret_tensor(buf0, (2, 3), (3, 1), 0), arg, out=buf1)
        buf2 = torch.ops.mkldnn._convolution_pointwise.default(buf1)
        triton_poi_fused_add_1.run(buf0, 3, stream=stream0)
        cpp_fused_relu_0(buf2)
        return (buf2,)

def benchmark_compiled_module(args):
    return extern_kernels.addmm(args)
"""


def test_kernels_of_generated_code():
    assert called_kernels(CODE, "step") == [
        Kernel("cpp_fused_relu_0", 2, "generated", "step"),
        Kernel("extern_kernels.mm", 1, "external", "step"),
        Kernel("mkldnn._convolution_pointwise", 1, "external", "step"),
        Kernel("triton_poi_fused_add_1", 1, "generated", "step"),
    ]


def test_kernels_of_what_is_unknown():
    assert called_kernels("", "step") == called_kernels("not python (", "step") == []


def test_kernels_of_a_compilation():
    report = compiled(convolutional())
    names = {kernel.name for kernel in report.kernels}
    assert any(name.startswith("cpp_fused") for name in names)
    assert any("convolution" in name for name in names)
    assert f"kernels {sum(kernel.count for kernel in report.kernels)}:" in str(report)
