from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pass_testing import Builder, apply, aten, captured, copied, evaluate, find, random_arguments
from torch.testing import FileCheck

from gradprune.graph.step_graph import StepGraph
from gradprune.passes.rules import SHAPE_ONLY
from gradprune.passes.shape_only_operands import shape_only_operands

Operands = tuple[Any, ...]


def _pool(rank: int) -> Iterator[Operands]:
    """Gradient of the output, saved input and the rest, with and without padding and a divisor of one's own."""
    for padding, ceil_mode, include_pad, divisor in itertools.product((0, 1), (False, True), (False, True), (None, 3)):
        options = ([3] * rank, [2] * rank, [padding] * rank, ceil_mode, include_pad, divisor)
        x = torch.rand(2, 3, *[7] * rank)
        pool = aten.avg_pool2d if rank == 2 else aten.avg_pool3d
        yield torch.rand_like(pool(x, *options)), x, *options


def _adaptive_pool(rank: int) -> Iterator[Operands]:
    for size in (1, 2, 5):
        yield torch.rand(2, 3, *[size] * rank), torch.rand(2, 3, *[7] * rank)


def _max_pool(rank: int) -> Iterator[Operands]:
    for padding, dilation, ceil_mode in itertools.product((0, 1), (1, 2), (False, True)):
        options = ([2] * rank, [2] * rank, [padding] * rank, [dilation] * rank, ceil_mode)
        x = torch.rand(2, 3, *[7] * rank)
        pool = aten.max_pool2d_with_indices if rank == 2 else aten.max_pool3d_with_indices
        values, indices = pool(x, *options)
        yield torch.rand_like(values), x, *options, indices


def _adaptive_max_pool(rank: int) -> Iterator[Operands]:
    x = torch.rand(2, 3, *[7] * rank)
    pool = aten.adaptive_max_pool2d if rank == 2 else aten.adaptive_max_pool3d
    values, indices = pool(x, [3] * rank)
    yield torch.rand_like(values), x, indices


def _pad(rank: int) -> Iterator[Operands]:
    for before, after in ((1, 2), (0, 3)):
        yield torch.rand(2, 3, *[5 + before + after] * rank), torch.rand(2, 3, *[5] * rank), [before, after] * rank


CASES: dict[str, Callable[[], Iterator[Operands]]] = {
    "aten._adaptive_avg_pool2d_backward.default": lambda: _adaptive_pool(2),
    "aten._adaptive_avg_pool3d_backward.default": lambda: _adaptive_pool(3),
    "aten.adaptive_max_pool2d_backward.default": lambda: _adaptive_max_pool(2),
    "aten.adaptive_max_pool3d_backward.default": lambda: _adaptive_max_pool(3),
    "aten.avg_pool2d_backward.default": lambda: _pool(2),
    "aten.avg_pool3d_backward.default": lambda: _pool(3),
    "aten.max_pool2d_with_indices_backward.default": lambda: _max_pool(2),
    "aten.max_pool3d_with_indices_backward.default": lambda: _max_pool(3),
    "aten.reflection_pad1d_backward.default": lambda: _pad(1),
    "aten.reflection_pad2d_backward.default": lambda: _pad(2),
    "aten.reflection_pad3d_backward.default": lambda: _pad(3),
    "aten.replication_pad1d_backward.default": lambda: _pad(1),
    "aten.replication_pad2d_backward.default": lambda: _pad(2),
    "aten.replication_pad3d_backward.default": lambda: _pad(3),
}

FORMATS = {"contiguous": {}, "channels last": {4: torch.channels_last, 5: torch.channels_last_3d}}


def operator_of(name: str) -> torch._ops.OpOverload:
    return getattr(aten, name.split(".")[1]).default


def test_every_operator_has_a_case():
    assert CASES.keys() == SHAPE_ONLY.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_no_element_of_the_operand_is_read(name: str, memory_format: str, dtype: torch.dtype):
    torch.manual_seed(0)
    target, position = operator_of(name), SHAPE_ONLY[name]
    if dtype is torch.bfloat16 and not _runs_in(target, next(CASES[name]()), dtype):
        pytest.skip("the operator has no bfloat16 kernel on this device")
    for operands in CASES[name]():
        arguments = [_converted(operand, dtype, memory_format) for operand in operands]
        expected = target(*arguments)
        saved = arguments[position]
        for stand_in in (torch.full_like(saved, torch.nan), saved.new_zeros([1] * saved.dim()).expand(saved.shape)):
            arguments[position] = stand_in
            torch.testing.assert_close(target(*arguments), expected, rtol=0, atol=0)


def _converted(operand: Any, dtype: torch.dtype, memory_format: str) -> Any:
    if not isinstance(operand, torch.Tensor):
        return operand
    layout = FORMATS[memory_format].get(operand.dim(), torch.contiguous_format)
    return operand.to(dtype if operand.is_floating_point() else operand.dtype).contiguous(memory_format=layout)


def _runs_in(target: torch._ops.OpOverload, operands: Operands, dtype: torch.dtype) -> bool:
    try:
        target(*(_converted(operand, dtype, "contiguous") for operand in operands))
    except NotImplementedError:
        return False
    return True


def average_pool() -> StepGraph:
    b = Builder()
    x = b.input("x", 2, 3, 8, 8)
    saved = b.call(aten.relu.default, x)
    pooled = b.call(aten.avg_pool2d.default, saved, [2, 2])
    backward = b.call(aten.avg_pool2d_backward.default, pooled, saved, [2, 2], [], [0, 0], False, True, None)
    return b.build(backward)


def test_text_before_and_after():
    applied = apply(shape_only_operands, average_pool())
    FileCheck().check("avg_pool2d_backward.default](args = (%avg_pool2d_default, %relu_default,").run(applied.before)
    after = FileCheck().check("full.default](args = ([1, 1, 1, 1], 0)")
    after.check("expand.default]").check_same("[2, 3, 8, 8]")
    after.check("avg_pool2d_backward.default](args = (%avg_pool2d_default, %expand_default,").run(applied.after)
    (change,) = applied.result.narrowed
    assert change.operator == "aten.avg_pool2d_backward"


def test_operand_that_nothing_else_needs_goes():
    b = Builder()
    saved = b.call(aten.relu.default, b.input("x", 2, 3, 8, 8))
    options = ([2, 2], [], [0, 0], False, True, None)
    step_graph = b.build(b.call(aten.avg_pool2d_backward.default, b.input("gy", 2, 3, 4, 4), saved, *options))
    applied = apply(shape_only_operands, step_graph)
    FileCheck().check_not("relu").run(applied.after)
    assert [change.operator for change in applied.result.removed] == ["aten.relu"]


def test_graph_it_does_not_apply_to_is_untouched():
    b = Builder()
    gy, x = b.input("gy", 2, 3), b.input("x", 2, 3)
    assert not apply(shape_only_operands, b.build(b.call(aten.threshold_backward.default, gy, x, 0))).changed


POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "average": lambda x: F.avg_pool2d(x, 2),
    "overlapping": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "maximum": lambda x: F.max_pool2d(x, 4, stride=2, padding=2, dilation=1),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "volume": lambda x: F.avg_pool3d(x, 2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_captured_step(pool: str):
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(POOLS[pool](x.tanh()).square().sum(), x)[0]

    step_graph = captured(step, torch.rand(2, 2, 8, 8, 8)[:, :, :, :, : 8 if pool == "volume" else 1].squeeze(-1))
    applied = apply(shape_only_operands, step_graph)
    operators = {operator_of(name) for name in SHAPE_ONLY}
    backward = [node for node in step_graph.calls() if node.target in operators]
    # Some of them Inductor takes apart before the passes see the graph; then there is nothing to do.
    assert applied.changed == bool(backward)
    assert all(node.args[1].target is aten.expand.default for node in backward)


def test_symbolic_shape_is_left_alone_and_reported():
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(F.avg_pool2d(x.tanh(), 2).square().sum(), x)[0]

    x = torch.rand(4, 2, 8, 8)
    torch._dynamo.mark_dynamic(x, 0)
    step_graph = captured(step, x)
    before = str(step_graph.graph)
    result = shape_only_operands.run(step_graph)
    assert str(step_graph.graph) == before
    assert not result.changed
    (skipped,) = result.skipped
    assert skipped.operator == "aten.avg_pool2d_backward"
    assert "symbolic" in skipped.reason


def test_dtype_of_the_operand_is_kept():
    step_graph = average_pool()
    for node in step_graph.graph.nodes:
        if node.op != "output":
            node.meta["val"] = node.meta["val"].to(torch.float64)
    original = copied(step_graph)
    shape_only_operands.run(step_graph)
    (scalar,) = find(step_graph, aten.full.default)
    assert scalar.kwargs["dtype"] is torch.float64
    arguments = random_arguments(original)
    torch.testing.assert_close(evaluate(step_graph, arguments), evaluate(original, arguments), rtol=0, atol=0)
