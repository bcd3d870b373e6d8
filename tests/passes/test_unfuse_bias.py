from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, relative_error, step_by_autograd_grad, step_by_backward
from pass_testing import Builder, apply, aten, captured, copied, evaluate, find, random_arguments
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

import gradprune
from gradprune.graph.cost import count_flops
from gradprune.graph.step_graph import InputRole, StepGraph
from gradprune.ops import mm
from gradprune.passes.base import PassResult, Tier
from gradprune.passes.unfuse_bias import unfuse_bias
from gradprune.passes.verify import Verifier


def linear(
    rows: int = 4, bias: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32, **options: float
) -> StepGraph:
    """A step that is a linear layer from 6 to 5 features."""
    b = Builder()
    x, w, shift = (
        b.input(name, *shape, role=role, dtype=dtype)
        for name, shape, role in (
            ("x", (rows, 6), InputRole.DATA),
            ("w", (5, 6), InputRole.WEIGHT),
            ("b", bias, InputRole.WEIGHT),
        )
    )
    return b.build(b.call(aten.addmm.default, shift, x, b.call(aten.permute.default, w, [1, 0]), **options))


def check_left(step_graph: StepGraph) -> None:
    applied = apply(unfuse_bias, step_graph)
    assert not applied.changed
    assert applied.result == PassResult()
    FileCheck().check("aten.addmm").run(applied.after)


def test_text_before_and_after():
    applied = apply(unfuse_bias, linear())
    FileCheck().check("addmm.default](args = (%b, %x, %permute_default)").run(applied.before)
    after = FileCheck().check("gradprune.mm.default](args = (%x, %permute_default)")
    after.check("add.Tensor](args = (%mm_default, %b)").check("return (add_tensor,)").run(applied.after)
    FileCheck().check_not("addmm").run(applied.after)
    (change,) = applied.result.narrowed
    assert change.operator == "aten.addmm"
    assert change.reason == "bias added where the product is read"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("bias", [(5,), (1,)])
def test_it_is_the_product_plus_the_bias(bias: tuple[int, ...], rows: int, dtype: torch.dtype):
    """To the last bit: nothing is rounded but by the two operators."""
    step_graph = linear(rows, bias, dtype)
    x, w, shift = arguments = random_arguments(step_graph)
    (fused,) = evaluate(copied(step_graph), arguments)
    verifier = Verifier(step_graph)
    assert unfuse_bias.run(step_graph).changed
    verifier.check(step_graph, after=unfuse_bias.name)
    (actual,) = evaluate(step_graph, arguments)
    assert torch.equal(actual, torch.mm(x, w.t()) + shift)
    assert relative_error(actual, fused) < 4 * torch.finfo(dtype).eps


def test_product_is_no_operator_that_inductor_knows():
    """It would merge product and sum again."""
    assert mm is not aten.mm.default
    x, w = torch.randn(3, 4), torch.randn(4, 2)
    assert torch.equal(mm(x, w), torch.mm(x, w))


@pytest.mark.parametrize("form", ["step", "model"])
def test_both_forms(form: Any):
    applied = apply(unfuse_bias, dataclasses.replace(linear(), form=form))
    assert applied.changed


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (4, 1)])
def test_bias_of_two_dimensions_is_left(shape: tuple[int, int]):
    check_left(linear(bias=shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left(dtype: torch.dtype):
    """The product would be rounded before the bias is added, and the sum again."""
    step_graph = linear(dtype=dtype)
    before = str(step_graph.graph)
    assert not unfuse_bias.run(step_graph).changed
    assert str(step_graph.graph) == before


@pytest.mark.parametrize("options", [{"beta": 2}, {"alpha": 0.5}, {"beta": 0, "alpha": 1}])
def test_scaled_product_is_left(options: dict[str, float]):
    check_left(linear(**options))


def test_other_devices_are_left():
    """A GPU's BLAS adds the bias for nothing."""
    b = Builder(device="meta")
    x, w, shift = b.input("x", 4, 6), b.weight("w", 6, 5), b.weight("b", 5)
    assert not unfuse_bias.run(b.build(b.call(aten.addmm.default, shift, x, w))).changed


def test_products_without_a_bias_are_left():
    b = Builder()
    x, w = b.input("x", 4, 6), b.weight("w", 6, 5)
    y = b.call(aten.mm.default, x, w)
    total = b.call(aten.add.Tensor, y, b.weight("b", 5))
    assert not apply(unfuse_bias, b.build(total)).changed


def test_bias_and_operands_may_be_anything():
    """Nothing is hoisted, so nothing has to be a weight."""
    b = Builder()
    x, z, shift = b.input("x", 4, 6), b.input("z", 6, 5), b.input("shift", 5)
    assert apply(unfuse_bias, b.build(b.call(aten.addmm.default, shift, x, z))).changed


def test_every_layer_is_unfused():
    model = perceptron()

    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    step_graph = captured(step, torch.rand(4, 6))
    assert len(find(step_graph, aten.addmm.default)) == 3
    gradients = len(find(step_graph, aten.mm.default))
    applied = apply(unfuse_bias, step_graph)
    assert len(applied.result.narrowed) == len(find(step_graph, mm)) == 3
    assert len(find(step_graph, aten.mm.default)) == gradients
    assert not find(step_graph, aten.addmm.default)


def test_source_and_pass_are_kept():
    step_graph = linear()
    (node,) = find(step_graph, aten.addmm.default)
    node.meta.update({"stack_trace": '  File "attack.py", line 7, in step', "gradprune_backward": True})
    result = unfuse_bias.run(step_graph)
    assert result.narrowed[0].source == "attack.py:7"
    for target in (mm, aten.add.Tensor):
        (node,) = find(step_graph, target)
        assert node.meta["gradprune_backward"]
        assert "attack.py" in node.meta["stack_trace"]


def test_flops_are_those_of_the_product():
    step_graph = linear()
    before = count_flops(step_graph)
    unfuse_bias.run(step_graph)
    assert count_flops(step_graph) == before
    assert before["forward"] == 2 * 4 * 6 * 5


def test_it_may_round_differently():
    assert unfuse_bias.tier is Tier.REORDERS_FLOAT


# --- Through Inductor -------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def code_of(compiled: Callable[..., Any], *arguments: Tensor) -> tuple[Any, str]:
    result, codes = run_and_get_code(compiled, *arguments)
    (code,) = codes
    return result, code


@pytest.mark.inductor
@pytest.mark.parametrize("disabled", [False, True], ids=["", "disabled"])
def test_generated_code(disabled: bool):
    """Inductor turns a product and a sum into ``addmm`` where it finds them."""
    model = perceptron()
    reference = step_by_autograd_grad(copy.deepcopy(model).double(), F.cross_entropy)
    left_out = ["prepack-linears", *([unfuse_bias.name] if disabled else [])]
    step = gradprune.compile(step_by_backward(model, F.cross_entropy), strict=True, verify=True, disable=left_out)
    x, y = torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
    x_adv = x + EPS * torch.rand_like(x)
    (_, gradient), code = code_of(step, x_adv, x, y)
    assert relative_error(gradient, reference(x_adv.double(), x.double(), y)[1]) < 1e-5
    fused, separate = (code.count(f"extern_kernels.{name}(") for name in ("addmm", "mm"))
    assert (fused, separate) == ((3, 3) if disabled else (0, 6))
