from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import in_one_piece, interpreted, relative_error
from pass_testing import Builder, apply, aten, captured, copied, find
from torch import Tensor, fx, nn
from torch.testing import FileCheck

import gradprune
from gradprune.compiler.split import Split, split
from gradprune.errors import PassError
from gradprune.graph.invariance import hoisted_values
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph, overload_name
from gradprune.passes.base import PassResult, Tier
from gradprune.passes.hoist_invariants import HoistInvariants
from gradprune.passes.pipeline import run_passes, select_passes
from gradprune.passes.verify import Verifier

# --- Steps ------------------------------------------------------------------------------------------------------------


def input_gradient(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    return step


class Settled(nn.BatchNorm2d):
    """A norm whose statistics are none of those that a new one has."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        nn.init.normal_(self.running_mean)
        nn.init.uniform_(self.running_var, 0.5, 2)


class InAutocast(nn.Module):
    """A model that is computed in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


class StandardisedConvolution(nn.Conv2d):
    """Subtracts mean and divides by deviation, both of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / variance.sqrt(), self.bias)


class SplitWeight(nn.Module):
    """Both halves of a computed weight, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.tanh().chunk(2)
        x = x.mean((2, 3))
        return F.linear(x, first) * F.linear(x, second)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    # model in evaluation mode, and operators among the values that a step reads of the prologue
    "folded norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), Settled(4), nn.ReLU()), {"aten.mul.Tensor"}),
    "norm behind an activation": (
        lambda: nn.Sequential(nn.ReLU(), Settled(3), nn.Conv2d(3, 4, 3)),
        {"aten.mul.Tensor"},
    ),
    "casts": (lambda: InAutocast(nn.Conv2d(3, 4, 3)), {"prims.convert_element_type"}),
    "casts of a folded norm": (
        lambda: InAutocast(nn.Sequential(nn.Conv2d(3, 4, 3), Settled(4))),
        {"prims.convert_element_type"},
    ),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), {"aten.mul.Tensor"}),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), {"aten.div.Tensor"}),
    "weight standardisation": (lambda: StandardisedConvolution(3, 4, 3), {"aten.div.Tensor"}),
    "split": (SplitWeight, {"aten.tanh"}),
}


def network_step(name: str) -> StepGraph:
    model = NETWORKS[name][0]().eval()
    return captured(input_gradient(model), torch.rand(2, 3, 6, 6))


# --- The pass ---------------------------------------------------------------------------------------------------------


def hoisted(result: PassResult) -> set[str]:
    assert all(change.reason == "depends on weights alone: computed once per attack" for change in result.hoisted)
    return {change.operator for change in result.hoisted}


@pytest.mark.parametrize("name", NETWORKS)
def test_values_of_weights_are_hoisted(name: str):
    step_graph = network_step(name)
    gm = fx.GraphModule({}, copied(step_graph).graph)
    result = HoistInvariants().run(step_graph)
    assert hoisted(result) >= NETWORKS[name][1]
    Verifier(step_graph).check(step_graph, after=HoistInvariants.name)
    arguments = graph_arguments(step_graph)
    expected, _ = run(gm, arguments)
    torch.testing.assert_close(run(fx.GraphModule({}, step_graph.graph), arguments)[0], expected, rtol=0, atol=0)


def test_flip_of_a_weight_is_hoisted():
    """The input gradient of a convolution, written as a convolution."""
    applied = apply(HoistInvariants(), by_hand()[0])
    FileCheck().check("flip").check("convolution").run(applied.after)
    (change,) = applied.result.hoisted
    assert (change.node, change.operator) == ("flip_default", "aten.flip")
    assert not applied.changed


def by_hand() -> tuple[StepGraph, dict[str, fx.Node]]:
    b = Builder()
    nodes = {"gy": b.input("gy", 2, 4, 8, 8), "w": b.weight("w", 4, 3, 3, 3)}
    nodes["flip"] = b.call(aten.flip.default, nodes["w"], [2, 3])
    nodes["turned"] = b.call(aten.permute.default, nodes["flip"], [1, 0, 2, 3])
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    nodes["gx"] = b.call(aten.convolution.default, nodes["gy"], nodes["turned"], None, *options)
    return b.build((nodes["gx"], OutputRole.INPUT_GRAD)), nodes


@pytest.mark.parametrize("name", ["spectral norm", "norm"])
def test_weights_that_a_training_step_writes_are_not_hoisted(name: str):
    """Power iteration and running statistics: the next step has others."""
    if name == "norm":
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), Settled(4), nn.ReLU())
    else:
        model = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    step_graph = captured(input_gradient(model.train()), torch.rand(2, 3, 6, 6))
    assert find(step_graph, aten.copy_.default)
    applied = apply(HoistInvariants(), step_graph)
    assert applied.result.hoisted == []


def test_model_form():
    """Its backward is called from outside: what depends on weights alone is the same as in a step."""
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    step_graph = captured(model, torch.rand(2, 3, 6, 6, requires_grad=True))
    assert step_graph.form == "model"
    assert [change.operator for change in apply(HoistInvariants(), step_graph).result.hoisted]
    by_form = {}
    for form in ("step", "model"):
        step_graph = twice(lambda b, w: b.call(aten.exp.default, w), lambda b, w: b.call(aten.exp.default, w))
        by_form[form] = apply(HoistInvariants(), dataclasses.replace(step_graph, form=form)).result
    assert by_form["model"].hoisted
    assert by_form["model"] == by_form["step"]


def test_it_is_exact():
    assert HoistInvariants().tier is Tier.EXACT


# --- Merging ----------------------------------------------------------------------------------------------------------

Make = Callable[[Builder, fx.Node], fx.Node]


def twice(first: Make, second: Make) -> StepGraph:
    """A step that reads two values of a weight."""
    b = Builder()
    x, w = b.input("x", 2, 3, 3, 3), b.weight("w", 2, 3, 3, 3)
    one, other = first(b, w), second(b, w)
    return b.build(b.call(aten.mul.Tensor, b.call(aten.add.Tensor, x, one), other))


def calling(target: Any, *args: Any, **kwargs: Any) -> Make:
    return lambda b, w: b.call(target, w, *args, **kwargs)


EQUAL: dict[str, Make] = {
    "one operand": calling(aten.exp.default),
    "list": calling(aten.flip.default, [2, 3]),
    "number": calling(aten.mul.Tensor, 2.0),
    "not a number": calling(aten.add.Tensor, float("nan")),
    "option": calling(aten.add.Tensor, 2, alpha=3),
    "none": calling(aten.clamp.default, None, 1.0),
    "type": calling(torch.ops.prims.convert_element_type.default, torch.float64),
    "memory format": calling(aten.clone.default, memory_format=torch.channels_last),
    "view": calling(aten.permute.default, [0, 1, 3, 2]),
    "chain": lambda b, w: b.call(aten.exp.default, b.call(aten.neg.default, b.call(aten.alias.default, w))),
    "constant": lambda b, w: b.call(aten.full.default, [2, 3, 3, 3], 2.0),
    "several results": lambda b, w: b.item(b.call(aten.var_mean.correction, w, [1], keepdim=True), 1),
}


@pytest.mark.parametrize("value", EQUAL)
def test_equal_values_are_merged(value: str):
    step_graph = twice(EQUAL[value], EQUAL[value])
    before = len(list(step_graph.calls()))
    if value == "not a number":
        result, changed = HoistInvariants().run(step_graph), True
    else:
        applied = apply(HoistInvariants(), step_graph)
        result, changed = applied.result, applied.changed
    assert changed
    made = (before - 2) // 2
    assert len(result.removed) == made
    assert len(list(step_graph.calls())) == before - made
    (multiplication,) = (node for node in step_graph.output_values() if node is not None)
    sum_, value_read = multiplication.args
    assert sum_.args[1] is value_read
    assert all(change.reason.startswith("the same value as ") for change in result.removed)


DIFFERENT: dict[str, tuple[Make, Make]] = {
    "operators": (calling(aten.exp.default), calling(aten.expm1.default)),
    "overloads": (calling(aten.mul.Tensor, 2), calling(aten.mul.Scalar, 2)),
    "lists": (calling(aten.flip.default, [2, 3]), calling(aten.flip.default, [3])),
    "order of a list": (calling(aten.permute.default, [0, 1, 2, 3]), calling(aten.permute.default, [0, 1, 3, 2])),
    "integer and float": (calling(aten.mul.Tensor, 1), calling(aten.mul.Tensor, 1.0)),
    "integer and boolean": (calling(aten.mul.Tensor, 1), calling(aten.mul.Tensor, True)),
    "float and boolean": (calling(aten.mul.Tensor, 1.0), calling(aten.mul.Tensor, True)),
    "signs of zero": (calling(aten.mul.Tensor, 0.0), calling(aten.mul.Tensor, -0.0)),
    "options": (calling(aten.add.Tensor, 2, alpha=3), calling(aten.add.Tensor, 2, alpha=4)),
    "option and none": (calling(aten.add.Tensor, 2), calling(aten.add.Tensor, 2, alpha=2)),
    "types": (
        calling(torch.ops.prims.convert_element_type.default, torch.float64),
        calling(torch.ops.prims.convert_element_type.default, torch.bfloat16),
    ),
    "names of options": (calling(aten.clamp.default, 1.0), calling(aten.clamp.default, max=1.0)),
    "bounds": (calling(aten.clamp.default, None, 1.0), calling(aten.clamp.default, 1.0, None)),
    "items": (
        lambda b, w: b.item(b.call(aten.var_mean.correction, w, [1], keepdim=True), 0),
        lambda b, w: b.item(b.call(aten.var_mean.correction, w, [1], keepdim=False), 1),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_values_are_told_apart(case: str):
    first, second = DIFFERENT[case]
    b = Builder()
    x, w = b.input("x", 2, 3, 3, 3), b.weight("w", 2, 3, 3, 3)
    values = [b.call(aten.sum.default, make(b, w)) for make in (first, second)]
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, values[0]), values[1])
    step_graph = b.build(y)
    applied = apply(HoistInvariants(), step_graph)
    assert not applied.changed
    assert applied.result.removed == []


def test_operands_are_told_apart():
    b = Builder()
    x, w, v = b.input("x", 3), b.weight("w", 3), b.weight("v", 3)
    one, other = b.call(aten.sub.Tensor, w, v), b.call(aten.sub.Tensor, v, w)
    applied = apply(HoistInvariants(), b.build(b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, one), other)))
    assert not applied.changed


def test_random_values_are_not_merged():
    step_graph = twice(calling(aten.rand_like.default), calling(aten.rand_like.default))
    assert not apply(HoistInvariants(), step_graph).changed


def test_values_of_the_input_are_not_merged():
    """That is Inductor's business; here it is what is kept from step to step."""
    b = Builder()
    x = b.input("x", 3)
    b.weight("w", 3)
    step_graph = b.build(b.call(aten.mul.Tensor, b.call(aten.exp.default, x), b.call(aten.exp.default, x)))
    assert not apply(HoistInvariants(), step_graph).changed


def test_values_that_the_step_returns_are_not_merged():
    """Each has memory of its own."""
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    values = [b.call(aten.exp.default, w) for _ in range(3)]
    step_graph = b.build(b.call(aten.mul.Tensor, x, values[0]), values[1], values[2])
    assert not apply(HoistInvariants(), step_graph).changed


def test_merged_values_are_hoisted_once():
    make = calling(aten.flip.default, [2])
    step_graph = twice(make, make)
    applied = apply(HoistInvariants(), step_graph)
    assert [change.node for change in applied.result.hoisted] == ["flip_default"]
    assert [change.node for change in applied.result.removed] == ["flip_default_1"]
    assert len(find(step_graph, aten.flip.default)) == 1


# --- Splitting --------------------------------------------------------------------------------------------------------


def graph_arguments(step_graph: StepGraph) -> list[Any]:
    """A value for every placeholder, a number for a symbolic one."""
    generator = torch.Generator().manual_seed(0)
    arguments: list[Any] = []
    for node in step_graph.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        if not isinstance(like, Tensor):
            arguments.append(like.node.hint)
            continue
        size = [n if isinstance(n, int) else n.node.hint for n in like.shape]
        value = torch.rand(size, generator=generator) + 0.1
        arguments.append(value.to(like.dtype) if like.dtype.is_floating_point else (value > 0.5).to(like.dtype))
    return arguments


def run(gm: fx.GraphModule, arguments: list[Any]) -> tuple[list[Any], Tensor]:
    """What a graph returns, and a random number drawn after it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return list(gm(*arguments)), torch.rand(1)


def divided(step_graph: StepGraph, **constants: Tensor) -> tuple[Split, fx.GraphModule]:
    """Both parts of a copy of a graph, and the step as a function."""
    part = copied(step_graph)
    gm = fx.GraphModule(constants, part.graph)
    part.graph = gm.graph
    part.inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), part.inputs.values(), strict=True))
    parts = split(part, {node.name for node in hoisted_values(part)})
    gm.recompile()
    assert parts.step is gm.graph
    return parts, gm


def check_split(step_graph: StepGraph) -> Split:
    """Prologue and step compute what the graph computes, bit for bit, and write what it writes."""
    gm = fx.GraphModule({}, step_graph.graph)
    parts, step = divided(step_graph)

    whole, parted, kept = graph_arguments(step_graph), graph_arguments(step_graph), graph_arguments(step_graph)
    expected, next_number = run(gm, whole)
    values, _ = run(parts.prologue, [parted[index] for index in parts.prologue_inputs])
    torch.testing.assert_close(parted, kept, rtol=0, atol=0)  # the prologue writes nothing
    actual, next_number_of_step = run(step, [*(parted[index] for index in parts.step_inputs), *values])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(parted, whole, rtol=0, atol=0)
    assert torch.equal(next_number_of_step, next_number)

    assert len(values) == len(parts.values)
    for value, fake in zip(values, parts.values, strict=True):
        assert (value.shape, value.dtype) == (fake.shape, fake.dtype)
    check_inputs(parts, step_graph)
    check_nothing_left(parts, step_graph)
    return parts


def check_inputs(parts: Split, step_graph: StepGraph) -> None:
    """Inputs are those of the graph in its order, then the hoisted values; none that is not read."""
    names = [node.name for node in step_graph.graph.find_nodes(op="placeholder")]
    weights = {node.name for node in step_graph.weights()}
    prologue, step = ([n.name for n in p.find_nodes(op="placeholder")] for p in (parts.prologue.graph, parts.step))
    assert prologue == [names[index] for index in parts.prologue_inputs]
    assert parts.prologue_inputs == sorted(parts.prologue_inputs)
    assert weights.issuperset(prologue)
    assert step[: len(parts.step_inputs)] == [names[index] for index in parts.step_inputs]
    assert parts.step_inputs == sorted(parts.step_inputs)
    assert all(name.startswith("hoisted_") for name in step[len(parts.step_inputs) :])
    assert len(step) == len(parts.step_inputs) + len(parts.values)
    for part in (parts.prologue.graph, parts.step):
        assert all(node.users for node in part.find_nodes(op="placeholder"))


def check_nothing_left(parts: Split, step_graph: StepGraph) -> None:
    """No operator of the step computes anything from weights and hoisted values alone."""
    written = {node.args[0].name for node in find(step_graph, aten.copy_.default)}
    placeholders = parts.step.find_nodes(op="placeholder")
    weights = {node.name for node in step_graph.weights()} - written
    known = {node for node in placeholders if node.name in weights or node.name.startswith("hoisted_")}
    views = (aten.permute.default, aten.view.default, aten.unsqueeze.default, aten.alias.default, aten.split.Tensor)
    for node in parts.step.nodes:
        is_call = node.op == "call_function" and not node.is_impure()
        if is_call and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            assert node.target in (*views, operator.getitem), f"{node.format_node()} computes from weights alone"
            known.add(node)


def operators(graph: fx.Graph) -> list[str]:
    return [overload_name(node) for node in graph.nodes if node.op == "call_function"]


def test_text_of_prologue_and_step():
    parts = check_split(by_hand()[0])
    FileCheck().check("%w : [num_users=1] = placeholder").check_next("flip").check_next("return (flip_default,)").run(
        str(parts.prologue.graph)
    )
    FileCheck().check("%gy").check_next("%hoisted_flip_default").check_next("permute").check_next("convolution").run(
        str(parts.step)
    )
    assert (parts.prologue_inputs, parts.step_inputs) == ([1], [0])


@pytest.mark.parametrize("name", NETWORKS)
def test_prologue_and_step_compute_what_the_step_graph_computes(name: str):
    step_graph = network_step(name)
    HoistInvariants().run(step_graph)
    check_split(step_graph)


@pytest.mark.parametrize("name", NETWORKS)
def test_after_all_passes(name: str):
    """Packed weights too are values that a step takes as inputs."""
    step_graph = network_step(name)
    result = run_passes(step_graph, select_passes(), verify=True)[-1].result
    parts = check_split(step_graph)
    assert len(result.hoisted) == len(parts.values)


def test_graph_with_nothing_to_hoist_is_not_split():
    b = Builder()
    x, w = b.input("x", 3, 3), b.weight("w", 3, 3)
    step_graph = b.build(b.call(aten.mm.default, x, b.call(aten.permute.default, w, [1, 0])))
    assert not HoistInvariants().run(step_graph).hoisted


def test_weight_that_both_parts_read():
    b = Builder()
    x, w, v = b.input("x", 3), b.weight("w", 3), b.weight("v", 3)
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w)), w)
    parts = check_split(b.build(b.call(aten.add.Tensor, y, v)))
    assert (parts.prologue_inputs, parts.step_inputs) == ([1], [0, 1, 2])


def test_inputs_that_nothing_reads_are_inputs_of_neither():
    b = Builder()
    b.weight("unread_weight", 3)
    w, _, x = b.weight("w", 3), b.input("unread", 3), b.input("x", 3)
    parts = check_split(b.build(b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w))))
    assert (parts.prologue_inputs, parts.step_inputs) == ([1], [3])


def test_constants_are_computed_where_they_are_read():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    two = b.call(aten.full.default, [3], 2.0)
    y = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, two), b.call(aten.mul.Tensor, w, two))
    parts = check_split(b.build(y))
    assert operators(parts.prologue.graph) == ["aten.full", "aten.mul.Tensor"]
    assert operators(parts.step) == ["aten.full", "aten.mul.Tensor", "aten.mul.Tensor"]


def test_constants_that_the_graph_holds():
    """Tensors that are attributes of the graph's module, known by their name."""
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    constant = b.graph.get_attr("constant")
    constant.meta["val"] = w.meta["val"]
    y = b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, b.call(aten.mul.Tensor, w, constant)), constant)
    step_graph = b.build(y)
    parts, step = divided(step_graph, constant=torch.tensor([1.0, 2.0, 3.0]))
    values = parts.prologue(torch.ones(3))
    assert step(torch.ones(3), *values)[0].tolist() == [2, 4, 6]


def test_what_the_step_writes_is_written_by_the_step():
    b = Builder()
    x, w, state = b.input("x", 3), b.weight("w", 3), b.weight("state", 3)
    y = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w)), state)
    b.call(aten.copy_.default, state, y)
    parts = check_split(b.build(b.call(aten.neg.default, x)))
    assert "aten.copy_" in operators(parts.step)
    assert operators(parts.prologue.graph) == ["aten.exp"]


def test_random_operators_stay_in_the_step_in_their_order():
    """Even one whose numbers nothing reads: it moves the generator on."""
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    first = b.call(aten.rand.default, [3])
    b.call(aten.rand.default, [5])
    last = b.call(aten.rand_like.default, w)
    y = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, first), b.call(aten.mul.Tensor, last, w))
    parts = check_split(b.build(b.call(aten.mul.Tensor, y, b.call(aten.exp.default, w))))
    assert [name for name in operators(parts.step) if "rand" in name] == ["aten.rand", "aten.rand", "aten.rand_like"]
    assert operators(parts.prologue.graph) == ["aten.exp"]


def test_output_that_is_none():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    y = b.call(aten.mul.Tensor, x, b.call(aten.exp.default, w))
    check_split(b.build((None, OutputRole.WEIGHT_GRAD), y, (None, OutputRole.UPDATE)))


def test_parts_of_one_value():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 9)
    parts = b.call(aten.split.Tensor, b.call(aten.exp.default, w), 3)
    y = x
    for index in range(3):
        y = b.call(aten.mul.Tensor, y, b.item(parts, index))
    check_split(b.build(y))


def test_returned_value_is_computed_by_the_step():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.exp.default, w)
    y = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, x, value), b.call(aten.neg.default, w))
    step_graph = b.build(y, b.call(aten.alias.default, value))
    parts, _ = divided(step_graph)
    assert operators(parts.prologue.graph) == ["aten.neg"]
    assert "aten.exp" in operators(parts.step)


def test_symbolic_sizes():
    """The number that varies is an input of the step; values of weights have none."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(4, 3, 6, 6)
    torch._dynamo.mark_dynamic(x, 0)
    step_graph = captured(input_gradient(model), x)
    assert InputRole.SIZE in step_graph.inputs.values()
    HoistInvariants().run(step_graph)
    parts = check_split(step_graph)
    assert all(isinstance(size, int) for value in parts.values for size in value.shape)


def test_prologue_shares_no_node_with_the_step():
    parts, step = divided(by_hand()[0])
    original = str(step.graph)
    for node in reversed(parts.prologue.graph.nodes):
        parts.prologue.graph.erase_node(node)
    assert str(step.graph) == original


# --- Whole steps ------------------------------------------------------------------------------------------------------


def attack_step(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
        return x.detach() + 0.01 * gradient

    return step


@in_one_piece
def test_noise_on_a_weight_differs_from_step_to_step():
    """Whichever generator Inductor takes: here its own, whose seed is an operator of its own."""
    layer = nn.Linear(3, 4)

    def noisy(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.exp() * torch.rand_like(layer.weight))

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        y = noisy(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return x.detach() + 0 * gradient, y.detach()

    with interpreted():
        compiled = gradprune.compile(step, strict=True, verify=True)
        x, first = compiled(torch.ones(1, 3))
        x, second = compiled(x)
        _, third = compiled(x)
    report = gradprune.reports(compiled)[-1]
    assert [change.operator for change in report.hoisted] == ["aten.exp"]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize("name", NETWORKS)
def test_iterates_are_eager_s(name: str):
    model = NETWORKS[name][0]().eval()
    x = expected = torch.rand(2, 3, 6, 6)
    with interpreted():
        step = gradprune.compile(attack_step(model), strict=True, verify=True)
        for _ in range(3):
            x, expected = step(x), attack_step(model)(expected)
            assert relative_error(x, expected) < (1e-2 if "casts" in name else 1e-5)
    report = gradprune.reports(step)[-1]
    assert report.hoisted


def test_caller_may_write_to_a_returned_part_of_a_value():
    weight = nn.Module()
    weight.value = nn.Parameter(torch.zeros(4))

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        scale = weight.value.exp()
        first, _ = scale.chunk(2)
        (gradient,) = torch.autograd.grad((x * scale).sum(), x)
        return x.detach() + gradient, first.detach()

    with interpreted():
        compiled = gradprune.compile(step, strict=True, verify=True)
        x, part = compiled(torch.zeros(4))
        part.zero_()
        x, part = compiled(x)
    assert x.tolist() == [2, 2, 2, 2]
    assert part.tolist() == [1, 1]


def test_returned_item_of_an_operator_with_several_results():
    layer = nn.Linear(3, 3)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        variance, mean = torch.var_mean(layer.weight, 1)
        (gradient,) = torch.autograd.grad((x * variance).sum(), x)
        return x.detach() + gradient, mean.detach()

    with interpreted():
        actual = gradprune.compile(step, strict=True, verify=True)(torch.zeros(3))
    torch.testing.assert_close(actual, step(torch.zeros(3)))


def test_a_value_that_is_no_weights_is_not_hoisted():
    b = Builder()
    x, w = b.input("x", 3), b.weight("w", 3)
    value = b.call(aten.mul.Tensor, x, w)
    step_graph = b.build(b.call(aten.neg.default, value))
    with pytest.raises(PassError, match="a hoisted value depends on x, which is no weight"):
        split(step_graph, {value.name})
