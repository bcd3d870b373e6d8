from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EPS, interpreted, relative_error, step_by_autograd_grad, step_by_backward
from pass_testing import Builder, apply, aten, captured, copied, evaluate, find, random_arguments, step_of
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import gradprune
from gradprune.graph.cost import count_flops
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph
from gradprune.ops import pack_linear, packed_linear
from gradprune.passes import prepack_linears as module
from gradprune.passes.base import PassResult, Tier
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.pipeline import run_passes, select_passes
from gradprune.passes.prepack_convolutions import is_computed_by_onednn
from gradprune.passes.prepack_linears import prepack_linears
from gradprune.passes.verify import Verifier

TOLERANCE = 1e-5
"""Relative error in float32, of the result in float64."""

pytestmark = pytest.mark.skipif(not is_computed_by_onednn(torch.float32), reason="torch was built without oneDNN")

HALF_TYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not is_computed_by_onednn(dtype), reason="no kernels on this processor")
    )
    for dtype in (torch.bfloat16, torch.float16)
]

Question = tuple[int, int, int, torch.dtype]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Packing is always faster; for what that was asked."""
    questions: list[Question] = []

    def is_packed_faster(*question: Any) -> bool:
        questions.append(question)
        return True

    monkeypatch.setattr(module, "is_packed_faster", is_packed_faster)
    return questions


# --- Graphs -----------------------------------------------------------------------------------------------------------


def forward(
    rows: int = 4, inputs: int = 6, outputs: int = 5, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> StepGraph:
    """A step that is a linear layer."""
    b = Builder()
    x = b.input("x", rows, inputs, dtype=dtype)
    w = b.input("w", outputs, inputs, role=InputRole.WEIGHT, dtype=dtype)
    shift = b.input("b", outputs, role=InputRole.WEIGHT, dtype=dtype)
    turned = b.call(aten.permute.default, w, [1, 0])
    return b.build(b.call(aten.addmm.default, shift, x, turned) if bias else b.call(aten.mm.default, x, turned))


def input_gradient(
    rows: int = 4, inputs: int = 6, outputs: int = 5, *, dtype: torch.dtype = torch.float32
) -> StepGraph:
    """A step that is the input gradient of a linear layer."""
    b = Builder()
    gy = b.input("gy", rows, outputs, dtype=dtype)
    w = b.input("w", outputs, inputs, role=InputRole.WEIGHT, dtype=dtype)
    return b.build((b.call(aten.mm.default, gy, w, backward=True), OutputRole.INPUT_GRAD))


def prepack(step_graph: StepGraph, tolerance: float = TOLERANCE) -> PassResult:
    """Run the pass; the graph stays valid and computes what it computed in float64, of one packed weight."""
    verifier, original = Verifier(step_graph), copied(step_graph)
    arguments = random_arguments(step_graph)
    result = prepack_linears.run(step_graph)
    verifier.check(step_graph, after=prepack_linears.name)
    (actual,) = evaluate(step_graph, arguments)
    (expected,) = evaluate(original, [argument.double() for argument in arguments])
    (value,) = original.output_values()
    assert value is not None
    assert actual.dtype == value.meta["val"].dtype
    assert relative_error(actual, expected) < tolerance
    (change,) = result.narrowed
    assert change.reason == "weight packed once per attack"
    assert not find(step_graph, aten.mm.default)
    assert not find(step_graph, aten.addmm.default)
    (node,) = find(step_graph, packed_linear)
    assert node.args[1].target is pack_linear
    return result


SIZES = {
    "square": (6, 6, 6),
    "one row": (1, 6, 5),
    "one input": (4, 1, 5),
    "one output": (4, 6, 1),
    "one of each": (1, 1, 1),
    "large": (33, 130, 70),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward(size: str, bias: bool, asked: list[Question]):
    rows, inputs, outputs = SIZES[size]
    step_graph = forward(rows, inputs, outputs, bias=bias)
    prepack(step_graph)
    assert asked == [(rows, inputs, outputs, torch.float32)]
    (node,) = find(step_graph, packed_linear)
    assert (node.args[2] is not None) == bias
    assert node.args[1].args[1] == rows


@pytest.mark.parametrize("size", SIZES)
def test_input_gradient(size: str, asked: list[Question]):
    """Its weight is that of the forward pass, the other way around."""
    rows, inputs, outputs = SIZES[size]
    prepack(input_gradient(rows, inputs, outputs))
    assert asked == [(rows, outputs, inputs, torch.float32)]


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_precision(dtype: torch.dtype, asked: list[Question]):
    tolerance = 2 * torch.finfo(dtype).eps
    prepack(forward(4, 64, 32, dtype=dtype), tolerance)
    prepack(input_gradient(4, 64, 32, dtype=dtype), tolerance)
    assert {question[3] for question in asked} == {dtype}


def test_rows_may_have_any_strides(asked: list[Question]):
    b = Builder()
    x, w = b.input("x", 6, 4), b.weight("w", 6, 5)
    prepack(b.build(b.call(aten.mm.default, b.call(aten.permute.default, x, [1, 0]), w)))


def test_text_before_and_after(asked: list[Question]):
    applied = apply(prepack_linears, forward())
    FileCheck().check("permute.default](args = (%w, [1, 0])").check("addmm.default](args = (%b, %x, %permute").run(
        applied.before
    )
    after = FileCheck().check("pack_linear.default](args = (%permute_default_1, 4)")
    after.check("packed_linear.default](args = (%x, %pack_linear_default, %b)")
    after.check("return (packed_linear_default,)").run(applied.after)
    (change,) = applied.result.narrowed
    assert change.operator == "aten.addmm"


def test_backward_marks_and_source_are_kept(asked: list[Question]):
    step_graph = input_gradient()
    (node,) = find(step_graph, aten.mm.default)
    node.meta["stack_trace"] = '  File "attack.py", line 7, in step'
    result = prepack_linears.run(step_graph)
    assert result.narrowed[0].source == "attack.py:7"
    for node in step_graph.calls():
        assert node.meta.get("gradprune_backward"), node


@pytest.mark.parametrize("make", [forward, input_gradient])
def test_flops_are_those_of_the_product(make: Callable[[], StepGraph], asked: list[Question]):
    step_graph = make()
    before = count_flops(step_graph)
    prepack_linears.run(step_graph)
    assert count_flops(step_graph) == before
    assert sum(before.values()) == 2 * 4 * 6 * 5


# --- The decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [forward, input_gradient])
def test_what_is_not_faster_is_left_alone(make: Callable[[], StepGraph], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "is_packed_faster", lambda *question: False)
    applied = apply(prepack_linears, make())
    assert not applied.changed
    assert applied.result == PassResult()


def test_each_product_is_decided_on_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "is_packed_faster", lambda rows, inputs, outputs, dtype: outputs == 7)
    b = Builder()
    x, w, v = b.input("x", 4, 6), b.weight("w", 6, 5), b.weight("v", 5, 7)
    step_graph = b.build(b.call(aten.mm.default, b.call(aten.mm.default, x, w), v))
    assert len(apply(prepack_linears, step_graph).result.narrowed) == 1
    (node,) = find(step_graph, aten.mm.default)
    assert node.args[1] is w


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_kernels_that_are_timed(answer: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """They compute the same, from operands of the sizes that were asked for; the answer is that of the clock."""
    if not is_computed_by_onednn(dtype):
        pytest.skip("no kernels on this processor")
    seen: list[str] = []

    def is_faster(what: str, make: Callable[[], tuple[Callable[[], Tensor], Callable[[], Tensor]]]) -> bool:
        seen.append(what)
        candidate, baseline = make()
        packed, plain = candidate(), baseline()
        assert packed.shape == plain.shape == (4, 5)
        assert packed.dtype == plain.dtype == dtype
        assert relative_error(packed, plain) < 2 * torch.finfo(dtype).eps
        return answer

    monkeypatch.setattr(module, "is_faster", is_faster)
    assert module.is_packed_faster(4, 6, 5, dtype) is answer
    assert all(text in seen[0] for text in ("4", "6", "5", str(dtype)))


def test_questions_differ_by_all_that_is_asked(monkeypatch: pytest.MonkeyPatch):
    """An answer is remembered by the text of its question."""
    seen: list[str] = []
    monkeypatch.setattr(module, "is_faster", lambda what, make: bool(seen.append(what)))
    questions = [(4, 6, 5), (6, 4, 5), (4, 5, 6), (46, 5, 5), (4, 65, 5)]
    for question in questions:
        for dtype in (torch.float32, torch.bfloat16):
            module.is_packed_faster(*question, dtype)
    assert len(set(seen)) == 2 * len(questions)


# --- What is left alone -----------------------------------------------------------------------------------------------


def left_alone(step_graph: StepGraph, asked: list[Question]) -> None:
    applied = apply(prepack_linears, step_graph)
    assert not applied.changed
    assert applied.result == PassResult()
    assert asked == []  # nothing is measured for it either


def test_model_form(asked: list[Question]):
    assert apply(prepack_linears, dataclasses.replace(forward(), form="model")).changed
    assert asked


@pytest.mark.parametrize("make", [forward, input_gradient])
def test_float64_is_left_alone(make: Callable[..., StepGraph], asked: list[Question]):
    left_alone(make(dtype=torch.float64), asked)


def test_torch_without_onednn(asked: list[Question], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    left_alone(forward(), asked)


@pytest.mark.parametrize("shape", [(4, 5), (1, 5), (4, 1)])
def test_bias_of_two_dimensions_is_left_alone(shape: tuple[int, int], asked: list[Question]):
    b = Builder()
    x, w, shift = b.input("x", 4, 6), b.weight("w", 6, 5), b.weight("b", *shape)
    left_alone(b.build(b.call(aten.addmm.default, shift, x, w)), asked)


@pytest.mark.parametrize("options", [{"beta": 2}, {"alpha": 0.5}, {"beta": 0, "alpha": 1}])
def test_scaled_product_is_left_alone(options: dict[str, float], asked: list[Question]):
    b = Builder()
    x, w, shift = b.input("x", 4, 6), b.weight("w", 6, 5), b.weight("b", 5)
    left_alone(b.build(b.call(aten.addmm.default, shift, x, w, **options)), asked)


def test_bias_of_one_element_for_all_outputs_is_left_alone(asked: list[Question]):
    """oneDNN takes one element for each."""
    b = Builder()
    x, w, shift = b.input("x", 4, 6), b.weight("w", 6, 5), b.weight("b", 1)
    left_alone(b.build(b.call(aten.addmm.default, shift, x, w)), asked)


def test_bias_may_depend_on_anything(asked: list[Question]):
    b = Builder()
    x, w = b.input("x", 4, 6), b.weight("w", 6, 5)
    shift = b.call(aten.sum.dim_IntList, b.input("z", 3, 5), [0])
    prepack(b.build(b.call(aten.addmm.default, shift, x, w)))


OPERANDS: dict[str, Callable[[Builder], fx.Node]] = {
    "no weight": lambda b: b.call(aten.mm.default, b.input("x", 4, 6), b.input("z", 6, 5)),
    "weight times input": lambda b: b.call(aten.mm.default, b.weight("w", 4, 6), b.input("x", 6, 5)),
    "weights alone": lambda b: b.call(aten.mm.default, b.weight("w", 4, 6), b.weight("v", 6, 5)),
    "weight that depends on the input": lambda b: b.call(
        aten.mm.default, b.input("x", 4, 6), b.call(aten.mul.Tensor, b.weight("w", 6, 5), b.input("z", 5))
    ),
    "random weight": lambda b: b.call(
        aten.mm.default, b.input("x", 4, 6), b.call(aten.rand_like.default, b.weight("w", 6, 5))
    ),
    "batched": lambda b: b.call(aten.bmm.default, b.input("x", 2, 4, 6), b.weight("w", 2, 6, 5)),
}


@pytest.mark.parametrize("case", OPERANDS)
def test_other_products_are_left_alone(case: str, asked: list[Question]):
    b = Builder()
    left_alone(b.build(b.call(aten.mul.Tensor, OPERANDS[case](b), b.input("factor", 1))), asked)


def test_weight_that_the_step_writes_is_left_alone(asked: list[Question]):
    b = Builder()
    x, w = b.input("x", 4, 6), b.weight("w", 6, 5)
    y = b.call(aten.mm.default, x, w)
    b.call(aten.copy_.default, w, b.call(aten.neg.default, w))
    left_alone(b.build(y), asked)


def test_other_devices_are_left_alone(asked: list[Question]):
    b = Builder(device="meta")
    step_graph = b.build(b.call(aten.mm.default, b.input("x", 4, 6), b.weight("w", 6, 5)))
    assert not prepack_linears.run(step_graph).changed
    assert asked == []


@pytest.mark.parametrize("name", ["x", "w", "b"])
def test_operands_of_another_type_are_left_alone(name: str, asked: list[Question]):
    step_graph = forward()
    operand = next(node for node in step_graph.inputs if node.name == name)
    for node in [operand, *(user for user in operand.users if user.target is aten.permute.default)]:
        node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    assert not prepack_linears.run(step_graph).changed
    assert asked == []


def test_it_may_round_differently():
    assert prepack_linears.tier is Tier.REORDERS_FLOAT


def test_it_needs_hoisting():
    names = [step.name for step in select_passes(["hoist-invariants"])]
    assert prepack_linears.name not in names
    assert prepack_linears.name in [step.name for step in select_passes(["prepack-convolutions"])]


# --- Steps ------------------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 5))


@pytest.mark.parametrize(("shape", "expected"), [((4, 6), 6), ((2, 3, 6), 6), ((1, 6), 4)])
def test_every_product_of_a_step_is_packed(shape: tuple[int, ...], expected: int, asked: list[Question]):
    """More dimensions are rows to a product. Of one row, torch makes sums of the products with a bias beforehand."""
    step_graph = captured(step_of(perceptron()), torch.rand(shape))
    products = len(find(step_graph, aten.mm.default)) + len(find(step_graph, aten.addmm.default))
    applied = apply(prepack_linears, step_graph)
    assert len(applied.result.narrowed) == products == expected
    FileCheck().check_not("aten.mm").check_not("aten.addmm").run(applied.after)
    apply(HoistInvariants(), step_graph)
    assert len(find(step_graph, pack_linear)) == expected


def test_layer_that_is_called_twice_is_packed_once(asked: list[Question]):
    layer = nn.Linear(6, 6)
    step_graph = captured(step_of(nn.Sequential(layer, nn.Tanh(), layer)), torch.rand(4, 6))
    run_passes(step_graph, select_passes(), verify=True)
    assert len(find(step_graph, packed_linear)) == 4
    assert len(find(step_graph, pack_linear)) == 2


def test_symbolic_batch(asked: list[Question]):
    """Packed for the batch at hand, right for all."""
    model = perceptron()
    exact = step_of(copy.deepcopy(model).double())
    with interpreted():
        step = gradprune.compile(step_of(model), strict=True, verify=True, dynamic=True)
        for rows in (4, 2, 7):
            x = torch.rand(rows, 6)
            assert relative_error(step(x), exact(x.double())) < TOLERANCE
    report = gradprune.reports(step)[-1]
    assert {question[0] for question in asked} == {4}
    assert "gradprune.pack_linear" in {change.operator for change in report.hoisted}


@pytest.mark.inductor
def test_gradient_of_the_compiled_step(asked: list[Question]):
    """Inductor has no operator for a packed weight that is an input; it is lowered to oneDNN's all the same."""
    model = perceptron().eval()
    reference = step_by_autograd_grad(copy.deepcopy(model).double(), F.cross_entropy)
    step = gradprune.compile(step_by_backward(model, F.cross_entropy), strict=True, verify=True)
    x, y = torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
    x_adv = x + EPS * torch.rand_like(x)
    for _ in range(3):
        x_next, gradient = step(x_adv, x, y)
        assert relative_error(gradient, reference(x_adv.double(), x.double(), y)[1]) < TOLERANCE
        x_adv = x_next
    report = gradprune.reports(step)[-1]
    assert [change.operator for change in report.hoisted].count("gradprune.pack_linear") == 6
