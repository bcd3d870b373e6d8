from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pass_testing import Builder, apply, aten, captured, evaluate, find
from torch import Tensor, fx, nn
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

from gradprune.graph.regions import BACKWARD
from gradprune.graph.step_graph import Form, StepGraph
from gradprune.ops import max_pool_backward, realize
from gradprune.passes.dgrad_as_convolution import dgrad_as_convolution
from gradprune.passes.early_masks import EarlyMasks
from gradprune.passes.gather_max_pool import GatherMaxPool
from gradprune.passes.narrow_outputs import NarrowOutputs
from gradprune.passes.select_outputs import SelectOutputs
from gradprune.passes.shape_only_operands import shape_only_operands

prims = torch.ops.prims
aten_backward = aten.max_pool2d_with_indices_backward.default


@dataclass(frozen=True)
class Pool:
    """A max pooling and the size of what it is applied to."""

    size: tuple[int, ...]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    dilation: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    @property
    def pooled_size(self) -> tuple[int, ...]:
        return tuple(self(torch.empty(self.size)).shape)

    def gradient(self, x: Tensor, gy: Tensor) -> Tensor:
        """What eager autograd computes."""
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self(x), x, gy)[0]


POOLS = {
    "2 by 2": Pool((2, 3, 8, 8), (2, 2), (2, 2)),
    "does not divide": Pool((2, 3, 9, 7), (2, 2), (2, 2)),
    "does not divide, ceil": Pool((2, 3, 9, 7), (2, 2), (2, 2), ceil_mode=True),
    "padded": Pool((1, 4, 7, 8), (2, 2), (2, 2), (1, 1)),
    "padded, ceil": Pool((2, 3, 8, 7), (2, 2), (2, 2), (1, 1), ceil_mode=True),
    "overlapping": Pool((2, 3, 8, 8), (3, 3), (2, 2), (1, 1)),
    "overlapping, odd": Pool((3, 2, 9, 11), (3, 3), (2, 2), (1, 1)),
    "overlapping, not padded": Pool((2, 3, 9, 10), (3, 3), (2, 2)),
    "overlapping, ceil": Pool((2, 3, 10, 10), (3, 3), (2, 2), ceil_mode=True),
    "overlapping, padded, ceil": Pool((2, 3, 8, 10), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    "every place": Pool((2, 3, 6, 7), (3, 3), (1, 1), (1, 1)),
    "every place, 5 by 5": Pool((2, 2, 7, 6), (5, 5), (1, 1), (2, 2)),
    "gaps": Pool((2, 3, 11, 10), (2, 2), (3, 3)),
    "gaps, ceil": Pool((2, 3, 12, 11), (2, 2), (4, 3), (1, 1), ceil_mode=True),
    "not square": Pool((2, 3, 9, 8), (3, 2), (2, 1), (1, 0)),
    "not square, ceil": Pool((2, 3, 10, 9), (2, 4), (3, 2), (0, 2), ceil_mode=True),
    "rows": Pool((2, 3, 9, 8), (1, 3), (1, 2), (0, 1)),
    "one window": Pool((1, 3, 2, 3), (2, 3), (2, 3)),
    "unbatched": Pool((3, 8, 9), (3, 3), (2, 2), (1, 1)),
}

FORMATS = [torch.contiguous_format, torch.channels_last]


def numbers(pool: Pool, kind: str) -> Tensor:
    """Something to pool: all different, few integers with many ties, or what a ReLU leaves."""
    values = torch.randn(pool.size, dtype=torch.float64)
    return {"distinct": values, "ties": values.round(), "zeros": values.relu()}[kind]


# --- The operator -----------------------------------------------------------------------------------------------------


def pooling(b: Builder, x: fx.Node, pool: Pool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The nodes of a pooling's maxima, offsets and indices, as Inductor's decompositions leave them."""
    windows = (list(pool.stride), list(pool.padding), list(pool.dilation))
    both = b.call(prims._low_memory_max_pool_with_offsets.default, x, list(pool.kernel_size), *windows, pool.ceil_mode)
    maxima, offsets = b.item(both, 0), b.item(both, 1)
    to_indices = prims._low_memory_max_pool_offsets_to_indices.default
    size = list(x.meta["val"].shape[-2:])
    return maxima, offsets, b.call(to_indices, offsets, list(pool.kernel_size), size, *windows)


def backward(b: Builder, gy: fx.Node, x: fx.Node, pool: Pool, indices: fx.Node) -> fx.Node:
    windows = (list(pool.kernel_size), list(pool.stride), list(pool.padding), list(pool.dilation), pool.ceil_mode)
    return b.call(aten_backward, gy, x, *windows, indices, backward=True)


def gradient_of(pool: Pool, device: str = "cpu", dtype: torch.dtype = torch.float64) -> StepGraph:
    """A graph that computes the gradient of a pooling; its inputs are what is pooled and the gradient of the maxima."""
    b = Builder(device=device)
    x = b.input("x", *pool.size, dtype=dtype)
    gy = b.input("gy", *pool.pooled_size, dtype=dtype)
    _, _, indices = pooling(b, x, pool)
    return b.build(backward(b, gy, x, pool, indices))


def test_text_before_and_after():
    step_graph = gradient_of(POOLS["overlapping"])
    applied = apply(GatherMaxPool(), step_graph)
    before = FileCheck().check("_low_memory_max_pool_with_offsets").check("_low_memory_max_pool_offsets_to_indices")
    before.check("max_pool2d_with_indices_backward.default](args = (%gy, %x, [3, 3], [2, 2], [1, 1], [1, 1], False, ")
    before.run(applied.before)
    after = FileCheck().check("_low_memory_max_pool_with_offsets").check_not("_low_memory_max_pool_offsets_to_indices")
    after.check("gradprune.max_pool_backward.default](args = (%gy, %getitem_1, [3, 3], [2, 2], [1, 1], 8, 8)")
    after.run(applied.after)
    FileCheck().check_not("max_pool2d_with_indices_backward").run(applied.after)
    (change,) = applied.result.narrowed
    assert change.operator == "aten.max_pool2d_with_indices_backward"
    assert not applied.result.skipped


@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
@pytest.mark.parametrize("name", POOLS)
def test_gradient_is_that_of_autograd(name: str, kind: str):
    pool = POOLS[name]
    step_graph = gradient_of(pool)
    assert apply(GatherMaxPool(), step_graph).changed
    x, gy = numbers(pool, kind), torch.randn(pool.pooled_size, dtype=torch.float64)
    for layout in FORMATS[: len(pool.size) - 2]:
        arguments = [value.contiguous(memory_format=layout) for value in (x, gy)]
        (actual,) = evaluate(step_graph, arguments)
        expected = pool.gradient(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("name", ["overlapping", "unbatched", "gaps, ceil"])
def test_operator_says_what_it_computes(name: str, layout: torch.memory_format):
    pool = POOLS[name]
    x = torch.randn(pool.size)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    maxima, offsets = offsets_of(x, pool)
    arguments = (torch.randn_like(maxima), offsets, *windows_of(pool), *pool.size[-2:])
    assert max_pool_backward(*arguments).stride() == x.stride()
    torch.library.opcheck(max_pool_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def offsets_of(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    windows = (list(pool.kernel_size), list(pool.stride), list(pool.padding), list(pool.dilation), pool.ceil_mode)
    return prims._low_memory_max_pool_with_offsets(x, *windows)


def windows_of(pool: Pool) -> tuple[list[int], list[int], list[int]]:
    return list(pool.kernel_size), list(pool.stride), list(pool.padding)


def test_not_a_number_in_a_gradient_stays_where_it_is():
    pool = POOLS["overlapping"]
    step_graph = gradient_of(pool)
    GatherMaxPool().run(step_graph)
    gy = torch.randn(pool.pooled_size, dtype=torch.float64)
    gy[0, 0, 1, 1], gy[1, 2, 0, 3] = math.nan, math.inf
    x = numbers(pool, "distinct")
    torch.testing.assert_close(evaluate(step_graph, [x, gy])[0], pool.gradient(x, gy), equal_nan=True)


def test_metadata_is_kept():
    step_graph = gradient_of(POOLS["overlapping"])
    (node,) = find(step_graph, aten_backward)
    node.meta["stack_trace"] = "somewhere"
    value = node.meta["val"]
    GatherMaxPool().run(step_graph)
    (gathered,) = find(step_graph, max_pool_backward)
    assert gathered.meta == {"val": value, BACKWARD: True, "stack_trace": "somewhere"}
    assert gathered.meta["val"] is value


def left_alone(step_graph: StepGraph) -> str:
    """The reason that the pass gives for leaving a graph alone."""
    applied = apply(GatherMaxPool(), step_graph)
    assert not applied.changed
    (skipped,) = applied.result.skipped
    assert skipped.operator == "aten.max_pool2d_with_indices_backward"
    return skipped.reason


def test_dilated_windows_are_left_alone():
    assert "dilated" in left_alone(gradient_of(Pool((2, 3, 9, 9), (2, 2), (2, 2), dilation=(2, 1))))
    assert "dilated" in left_alone(gradient_of(Pool((2, 3, 9, 9), (2, 2), (2, 2), dilation=(1, 2))))


def test_indices_without_offsets_are_left_alone():
    b = Builder()
    x, gy = b.input("x", 2, 3, 12, 12), b.input("gy", 2, 3, 2, 2)
    both = b.call(aten.max_pool2d_with_indices.default, x, [6, 6])
    pool = Pool((2, 3, 12, 12), (6, 6), (6, 6))
    assert "offsets" in left_alone(b.build(backward(b, gy, x, pool, b.item(both, 1))))


def test_elsewhere_than_on_a_cpu_nothing_changes():
    step_graph = gradient_of(POOLS["overlapping"], device="cuda")
    before = str(step_graph.graph)
    result = GatherMaxPool().run(step_graph)
    assert str(step_graph.graph) == before
    assert not result.changed
    assert not result.skipped


@pytest.mark.parametrize("dimension", [0, 2, 3])
def test_symbolic_sizes_are_not_guarded_on(dimension: int):
    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(F.max_pool2d(x.tanh(), 3, 2, 1).square().sum(), x)[0]

    x = torch.rand(4, 3, 12, 10)
    torch._dynamo.mark_dynamic(x, dimension)
    step_graph = captured(step, x)
    (node,) = find(step_graph, aten_backward)
    shape_env = node.meta["val"].fake_mode.shape_env
    guards = len(shape_env.guards)
    assert GatherMaxPool().run(step_graph).changed
    assert len(shape_env.guards) == guards
    (gathered,) = find(step_graph, max_pool_backward)
    sizes = gathered.args[-2:]
    assert [isinstance(size, fx.Node) for size in sizes] == [dimension == 2, dimension == 3]


# --- The mask of a ReLU before the pooling ----------------------------------------------------------------------------


@dataclass
class Masked:
    """Builds the gradient of ``maximum of relu(x)``, masked as autograd masks it, or not quite."""

    pool: Pool = POOLS["overlapping"]
    form: Form = "step"
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    pool_through_alias: bool = False
    mask_of_alias: bool = True
    mask_of_other: bool = False
    compare: Any = aten.le.Scalar
    threshold: float = 0
    zero: Any = aten.scalar_tensor.default
    fill: float = 0
    zero_shape: tuple[int, ...] = ()
    swapped: bool = False
    gradient_is_read: bool = False
    maxima_are_read: bool = True

    def build(self) -> StepGraph:
        b = Builder(self.form, device=self.device)
        x = b.input("x", *self.pool.size, dtype=self.dtype)
        gy = b.input("gy", *self.pool.pooled_size, dtype=self.dtype)
        r = b.call(aten.relu.default, x)
        alias = b.call(aten.alias.default, r)
        maxima, _, indices = pooling(b, alias if self.pool_through_alias else r, self.pool)
        outputs = [b.call(aten.exp.default, maxima)] if self.maxima_are_read else []
        if not self.maxima_are_read:
            b.graph.erase_node(maxima)
        gy = b.call(aten.neg.default, gy, backward=True)
        gx = backward(b, gy, r, self.pool, indices)
        compared = b.call(aten.relu.default, b.call(aten.neg.default, x)) if self.mask_of_other else r
        compared = b.call(aten.alias.default, compared) if self.mask_of_alias else compared
        mask = b.call(self.compare, compared, self.threshold, backward=self.form == "step")
        options = {"dtype": self.dtype, "device": self.device}
        shape = [list(self.zero_shape)] if self.zero is aten.full.default else []
        zero = b.call(self.zero, *shape, self.fill, **options)
        branches = (gx, zero) if self.swapped else (zero, gx)
        g = b.call(aten.where.self, mask, *branches, backward=True)
        outputs += [g, gx] if self.gradient_is_read else [g]
        return b.build(*outputs)


def is_masked_before(step_graph: StepGraph) -> bool:
    """Whether the gradient is masked at the size of the maxima, before the pooling's backward."""
    (where,) = find(step_graph, aten.where.self)
    backwards = find(step_graph, max_pool_backward) + find(step_graph, aten_backward)
    assert len(backwards) == 1
    return backwards[0].args[0] is where and tuple(where.meta["val"].shape) == Masked.pool.pooled_size


def test_text_of_the_mask_before_and_after():
    step_graph = Masked().build()
    applied = apply(GatherMaxPool(), step_graph)
    before = FileCheck().check("max_pool2d_with_indices_backward").check("%alias_default")
    before.check("le.Scalar](args = (%alias_default").check("where.self](args = (%le_scalar, %scalar_tensor")
    before.run(applied.before)
    after = FileCheck().check("%getitem :").check("le.Scalar](args = (%getitem, 0)")
    after.check("where.self](args = (%le_scalar_1, %scalar_tensor_default, %neg_default)")
    after.check("gradprune.max_pool_backward.default](args = (%where_self_1, %getitem_1, ").check("return (")
    after.run(applied.after)
    FileCheck().check_not("alias").check_count("le.Scalar", 1, exactly=True).run(applied.after)
    operators = [change.operator for change in applied.result.narrowed]
    assert operators == ["aten.where.self", "aten.max_pool2d_with_indices_backward"]


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize(
    "name", ["2 by 2", "overlapping", "every place", "gaps, ceil", "not square, ceil", "unbatched"]
)
def test_masked_gradient_is_that_of_autograd(name: str, kind: str):
    pool = POOLS[name]
    step_graph = Masked(pool).build()
    apply(GatherMaxPool(), step_graph)
    (mask,) = find(step_graph, aten.le.Scalar)
    assert tuple(mask.meta["val"].shape) == pool.pooled_size
    x, gy = numbers(pool, kind), torch.randn(pool.pooled_size, dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(pool(leaf.relu()), leaf, -gy)
    torch.testing.assert_close(evaluate(step_graph, [x, gy])[1], expected, rtol=1e-14, atol=1e-14)


def test_not_a_number_in_the_activation_masks_what_it_masked():
    pool = Masked.pool
    step_graph = Masked().build()
    x = numbers(pool, "distinct")
    x[0, 0, 3, 3] = x[1, 1, 0, 0] = math.nan
    x[0, 1, :4, :4] = -math.inf
    gy = torch.randn(pool.pooled_size, dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(pool(leaf.relu()), leaf, -gy)
    assert expected[0, 0, 3, 3] != 0
    GatherMaxPool().run(step_graph)
    assert is_masked_before(step_graph)
    torch.testing.assert_close(evaluate(step_graph, [x, gy])[1], expected, rtol=1e-14, atol=1e-14)


FIRES = {
    "as autograd leaves it": Masked(),
    "pooling of an alias": Masked(pool_through_alias=True),
    "mask without an alias": Masked(mask_of_alias=False),
    "zero by full": Masked(zero=aten.full.default),
    "another threshold": Masked(threshold=0.5),
    "model form": Masked(form="model"),
}


@pytest.mark.parametrize("case", FIRES)
def test_mask_moves(case: str):
    step_graph = FIRES[case].build()
    apply(GatherMaxPool(), step_graph)
    assert is_masked_before(step_graph)


DOES_NOT_FIRE = {
    "mask of another value": Masked(mask_of_other=True),
    "another comparison": Masked(compare=aten.lt.Scalar),
    "something else than zero": Masked(fill=1),
    "something else than zero, by full": Masked(zero=aten.full.default, fill=1),
    "zero that is no scalar": Masked(zero=aten.full.default, zero_shape=(8,)),
    "kept where it is zero": Masked(swapped=True),
    "gradient that is read without the mask": Masked(gradient_is_read=True),
    "maxima that are not computed": Masked(maxima_are_read=False),
}


@pytest.mark.parametrize("case", DOES_NOT_FIRE)
def test_mask_stays(case: str):
    step_graph = DOES_NOT_FIRE[case].build()
    applied = apply(GatherMaxPool(), step_graph)
    assert not is_masked_before(step_graph)
    assert len(applied.result.narrowed) == 1  # gathered all the same
    (where,) = find(step_graph, aten.where.self)
    assert find(step_graph, max_pool_backward)[0] in where.all_input_nodes


def test_mask_moves_where_the_operator_stays():
    step_graph = Masked(device="cuda").build()
    result = GatherMaxPool().run(step_graph)
    assert [change.operator for change in result.narrowed] == ["aten.where.self"]
    assert not result.skipped
    assert is_masked_before(step_graph)
    (node,) = find(step_graph, aten_backward)
    assert node.args[1].target is aten.relu.default
    assert not GatherMaxPool().run(step_graph).changed


def test_mask_moves_before_windows_that_have_no_offsets():
    b = Builder()
    pool = Pool((2, 3, 12, 12), (6, 6), (6, 6))
    r = b.call(aten.relu.default, b.input("x", *pool.size))
    both = b.call(aten.max_pool2d_with_indices.default, r, [6, 6])
    gx = backward(b, b.input("gy", *pool.pooled_size), r, pool, b.item(both, 1))
    mask = b.call(aten.le.Scalar, r, 0, backward=True)
    zero = b.call(aten.full.default, [], 0.0, device="cpu")
    step_graph = b.build(b.item(both, 0), b.call(aten.where.self, mask, zero, gx, backward=True))
    applied = apply(GatherMaxPool(), step_graph)
    assert (len(applied.result.narrowed), len(applied.result.skipped)) == (1, 1)
    (where,) = find(step_graph, aten.where.self)
    assert where.meta["val"].shape == pool.pooled_size


def test_metadata_of_the_mask_is_kept():
    step_graph = Masked().build()
    for node in step_graph.calls():
        node.meta["stack_trace"] = node.name
    (value,) = (node.meta["val"] for node in find(step_graph, aten.where.self))
    GatherMaxPool().run(step_graph)
    ((mask,), (where,), (gathered,)) = (
        find(step_graph, target) for target in (aten.le.Scalar, aten.where.self, max_pool_backward)
    )
    traces = [node.meta["stack_trace"] for node in (mask, where, gathered)]
    assert traces == ["le_scalar", "where_self", "max_pool2d_with_indices_backward_default"]
    assert all(BACKWARD in node.meta for node in (mask, where, gathered))
    assert mask.meta["val"].dtype is torch.bool
    assert gathered.meta["val"] is value


# --- Steps, and through Inductor --------------------------------------------------------------------------------------


def network(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 4, 2))
    return layers.to(memory_format=layout)  # type: ignore[call-overload]


def step_of(model: nn.Module) -> Any:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    return step


def with_passes(step_graph: StepGraph) -> StepGraph:
    """What a step graph is after the pass and its neighbours."""
    for step in (SelectOutputs(), NarrowOutputs(), dgrad_as_convolution, shape_only_operands):
        step.run(step_graph)
    assert len(GatherMaxPool().run(step_graph).narrowed) == 2
    EarlyMasks().run(step_graph)
    return step_graph


def test_mask_that_is_stored_has_the_size_of_the_maxima():
    step_graph = with_passes(captured(step_of(network(torch.contiguous_format)), torch.rand(2, 3, 15, 15)))
    assert [tuple(node.meta["val"].shape) for node in find(step_graph, realize)] == [(2, 16, 7, 7)]
    # What is pooled does not live on to the backward pass.
    (pool,) = find(step_graph, prims._low_memory_max_pool_with_offsets.default)
    assert list(pool.args[0].users) == [pool]


def compiled(function: Any, *args: Any) -> tuple[Any, str]:
    """What Inductor's code for a function returns, and the code."""
    with torch.no_grad():
        # Inductor would convert convolutions to channels-last.
        options = {"layout_optimization": False, "fx_graph_cache": False}
        result, code = run_and_get_code(torch.compile(function, fullgraph=True, options=options), *args)
    return result, "\n".join(code)


@pytest.mark.inductor
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_compiled_step(layout: torch.memory_format):
    model = network(layout)
    x = torch.rand(2, 3, 15, 15).round(decimals=1).contiguous(memory_format=layout)
    step_graph = with_passes(captured(step_of(model), x))
    arguments = []
    candidates = [*model.parameters(), x]
    for node in step_graph.graph.find_nodes(op="placeholder"):
        (argument,) = (value for value in candidates if value.shape == node.meta["val"].shape)
        arguments.append(argument.detach())
    (logits, gradient), code = compiled(fx.GraphModule({}, step_graph.graph), *arguments)
    expected_logits, expected = step_of(model)(x)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(gradient, expected)
    # Which way it goes depends on the layout that Inductor gives to the convolutions' results.
    if layout is torch.channels_last:
        FileCheck().check("(2, 16, 13, 13), (2704, 1, 208, 16)").run(code)
        FileCheck().check_not("max_pool2d_with_indices_backward").run(code)
    else:
        FileCheck().check_count("max_pool2d_with_indices_backward.default(", 1, exactly=True).run(code)


COMPILED = [
    "2 by 2",
    "does not divide, ceil",
    "gaps, ceil",
    "overlapping, odd",
    "overlapping, not padded",
    "every place",
    "not square, ceil",
]


def inputs_of(pool: Pool, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """What is pooled, with ties, and the gradient of the maxima; more channels than a vector has elements."""
    x, gy = (torch.randn(size[0], 19, *size[2:]) for size in (pool.size, pool.pooled_size))
    return x.round().contiguous(memory_format=layout), gy.contiguous(memory_format=layout)


def gradients(inputs: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    """The gradients of several poolings of sums, some from their forward passes on."""
    results = []
    for name, (a, b, gy, offsets) in zip(COMPILED, inputs, strict=True):
        if offsets is None:
            _, offsets = offsets_of(a + b, POOLS[name])
        results.append(max_pool_backward(gy, offsets, *windows_of(POOLS[name]), *a.shape[-2:]))
    return results


@pytest.mark.inductor
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_compiled_operator(layout: torch.memory_format):
    pools = [POOLS[name] for name in COMPILED]
    inputs = [inputs_of(pool, layout) for pool in pools]
    if layout is torch.contiguous_format:
        # The first window of "gaps, ceil" has but this element inside; Inductor finds the maximum in the padding.
        inputs[2][0][:, :, 0, 0] = -math.inf
    else:  # one of the two suffices
        inputs[0] = (inputs[0][0].contiguous(), inputs[0][1])
        inputs[1] = (inputs[1][0], inputs[1][1].contiguous())
    arguments: list[Any] = []
    for pool, (x, gy) in zip(pools, inputs, strict=True):
        # The sum of two inputs becomes a buffer, whose layout Inductor is free to choose.
        offsets = None if pool.kernel_size == (2, 2) else offsets_of(x, pool)[1]
        arguments.append((x, torch.zeros_like(x), gy, offsets))
    results, code = compiled(gradients, arguments)
    for pool, result, (x, gy) in zip(pools, results, inputs, strict=True):
        torch.testing.assert_close(result, pool.gradient(x, gy))
    if layout is torch.channels_last:
        FileCheck().check_not("max_pool2d_with_indices_backward").check_not("atomic_add").run(code)
        if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            FileCheck().check("Vectorized<int8_t>::loadu").check("VecMask<int32_t,1>(").run(code)


@pytest.mark.inductor
def test_compiled_gather_keeps_channels_innermost():
    pool = POOLS["overlapping"]
    x, gy = inputs_of(pool, torch.channels_last)
    _, offsets = offsets_of(x, pool)

    def smallest(gy: Tensor, offsets: Tensor) -> Tensor:
        gradient = max_pool_backward(gy, offsets, *windows_of(pool), *x.shape[-2:])
        return gradient.unsqueeze(0).kthvalue(1, dim=2).values  # reads a view, and demands no layout of what is below

    result, code = compiled(smallest, gy, offsets)
    torch.testing.assert_close(result[0], pool.gradient(x, gy).amin(1))
    FileCheck().check("(2, 19, 8, 8), (1216, 1, 152, 19)").run(code)


@pytest.mark.inductor
def test_compiled_operator_with_symbolic_sizes():
    pools = {"batch alone": POOLS["overlapping, odd"], "any": POOLS["overlapping, ceil"]}

    @torch.compile(fullgraph=True, options={"fx_graph_cache": False})
    def gradients(inputs: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        sizes = (x.shape[-2:] for x, _, _ in inputs)
        return [
            max_pool_backward(gy, offsets, *windows_of(pool), *size)
            for pool, size, (_, gy, offsets) in zip(pools.values(), sizes, inputs, strict=True)
        ]

    for batch, more in ((2, 0), (3, 4)):
        batch_alone, any_size = pools.values()
        batch_alone = dataclasses.replace(batch_alone, size=(batch, *batch_alone.size[1:]))
        any_size = dataclasses.replace(any_size, size=(batch, 3, *(n + more for n in any_size.size[2:])))
        inputs = []
        for pool, dimensions in ((batch_alone, [0]), (any_size, [0, 2, 3])):
            x, gy = inputs_of(pool)
            _, offsets = offsets_of(x, pool)
            inputs.append((x, gy, offsets))
            for value in inputs[-1]:
                torch._dynamo.mark_dynamic(value, dimensions)
        with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
            results = gradients(inputs)
        for pool, result, (x, gy, _) in zip((batch_alone, any_size), results, inputs, strict=True):
            torch.testing.assert_close(result, pool.gradient(x, gy))
