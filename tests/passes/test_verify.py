"""For each check of the verifier a graph that it must refuse, naming the pass and the node."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from pass_testing import Builder, aten
from torch import fx

from gradprune.errors import PassError
from gradprune.graph.step_graph import InputRole, OutputRole, StepGraph
from gradprune.passes.verify import Verifier


def valid() -> StepGraph:
    """A step with a random operator, two gradients and a written buffer."""
    b = Builder()
    x, w, buffer = b.input("x", 2, 3), b.weight("w", 4, 3), b.weight("buffer", 2, 3)
    noise = b.call(aten.rand_like.default, x)
    more = b.call(aten.bernoulli.p, x, 0.5)
    noisy = b.call(aten.add.Tensor, x, b.call(aten.mul.Tensor, noise, more))
    y = b.call(aten.mm.default, noisy, b.call(aten.permute.default, w, [1, 0]))
    gx = b.call(aten.mm.default, y, w, backward=True)
    normed = b.call(
        aten.native_layer_norm_backward.default, gx, x, [3], x, x, None, None, [True, False, False], backward=True
    )
    normed.meta["val"] = (normed.meta["val"][0], None, None)
    first = b.item(normed, 0)
    gw = b.call(aten.mm.default, b.call(aten.permute.default, y, [1, 0]), noisy, backward=True)
    b.call(aten.copy_.default, buffer, noisy)
    return b.build((first, OutputRole.INPUT_GRAD), (gw, OutputRole.WEIGHT_GRAD), y)


def node(step_graph: StepGraph, name: str) -> fx.Node:
    (found,) = (n for n in step_graph.graph.nodes if n.name == name)
    return found


def append(step_graph: StepGraph, after: str, target: Callable, *args: object) -> fx.Node:
    with step_graph.graph.inserting_after(node(step_graph, after)):
        new = step_graph.graph.call_function(target, args)
    return new


def check(step_graph: StepGraph, break_it: Callable[[StepGraph], object]) -> None:
    verifier = Verifier(step_graph)
    break_it(step_graph)
    verifier.check(step_graph, after="some-pass")


def test_valid_graph():
    check(valid(), lambda step_graph: None)


def test_weight_gradient_may_be_dropped():
    check(valid(), lambda g: g.set_output_values([g.output_values()[0], None, g.output_values()[2]]))


def use_before_definition(step_graph: StepGraph) -> None:
    node(step_graph, "x").append(node(step_graph, "add_tensor"))


def node_of_another_graph(step_graph: StepGraph) -> None:
    step_graph.inputs[next(iter(valid().inputs))] = InputRole.DATA


def fewer_roles(step_graph: StepGraph) -> None:
    step_graph.set_output_values(step_graph.output_values()[:2])


def mutation_in_the_middle(step_graph: StepGraph) -> None:
    append(step_graph, "add_tensor", aten.relu_.default, node(step_graph, "add_tensor"))


def copy_to_no_input(step_graph: StepGraph) -> None:
    append(step_graph, "add_tensor", aten.copy_.default, node(step_graph, "add_tensor"), node(step_graph, "x"))


def copy_before_a_read(step_graph: StepGraph) -> None:
    append(step_graph, "rand_like_default", aten.copy_.default, node(step_graph, "x"), node(step_graph, "buffer"))


def read_of_a_masked_output(step_graph: StepGraph) -> None:
    masked = append(step_graph, "getitem", operator.getitem, node(step_graph, "native_layer_norm_backward_default"), 1)
    with step_graph.graph.inserting_after(masked):
        step_graph.graph.call_function(aten.neg.default, (masked,))


def wrong_shape(step_graph: StepGraph) -> None:
    with node(step_graph, "mm_default").meta["val"].fake_mode:
        node(step_graph, "mm_default").meta["val"] = torch.empty(2, 5)


def wrong_dtype(step_graph: StepGraph) -> None:
    node(step_graph, "mm_default_1").meta["val"] = node(step_graph, "mm_default_1").meta["val"].double()


def impossible_operands(step_graph: StepGraph) -> None:
    node(step_graph, "mm_default_1").args = (node(step_graph, "x"), node(step_graph, "w"))


def another_output(step_graph: StepGraph) -> None:
    step_graph.set_output_values([node(step_graph, "mm_default"), *step_graph.output_values()[1:]])


def another_layout(step_graph: StepGraph) -> None:
    """Same shape, other strides."""
    with step_graph.graph.inserting_before(step_graph.output_node):
        turned = step_graph.graph.call_function(aten.clone.default, (node(step_graph, "getitem"),))
        turned.meta["val"] = node(step_graph, "getitem").meta["val"].new_empty_strided((2, 3), (1, 2))
    step_graph.set_output_values([turned, *step_graph.output_values()[1:]])


def dropped_update(step_graph: StepGraph) -> None:
    step_graph.set_output_values([*step_graph.output_values()[:2], None])


def one_output_more(step_graph: StepGraph) -> None:
    step_graph.set_output_values([*step_graph.output_values(), node(step_graph, "getitem")])
    step_graph.outputs.append(OutputRole.UPDATE)


def another_role(step_graph: StepGraph) -> None:
    step_graph.outputs[2] = OutputRole.WEIGHT_GRAD


def one_input_more(step_graph: StepGraph) -> None:
    with step_graph.graph.inserting_before(node(step_graph, "x")):
        step_graph.graph.placeholder("intruder")


def random_operator_dropped(step_graph: StepGraph) -> None:
    node(step_graph, "mul_tensor").replace_input_with(node(step_graph, "rand_like_default"), node(step_graph, "x"))
    step_graph.graph.erase_node(node(step_graph, "rand_like_default"))


def random_operators_swapped(step_graph: StepGraph) -> None:
    node(step_graph, "rand_like_default").prepend(node(step_graph, "bernoulli_p"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (use_before_definition, "'add_tensor' was used before it has been defined"),
        (node_of_another_graph, "an input with a role is not in the graph.*%x"),
        (fewer_roles, "outputs and roles differ in number"),
        (mutation_in_the_middle, "a mutating operator.*relu_"),
        (copy_to_no_input, "a mutating operator.*copy_"),
        (copy_before_a_read, "it reads x, which copy__default_1 has overwritten.*%bernoulli_p"),
        (read_of_a_masked_output, "it reads an output that is not computed.*%getitem_1"),
        (wrong_shape, r"it computes \[2, 4\] torch.float32, the graph says otherwise.*%mm_default "),
        (wrong_dtype, "it computes .* torch.float32, the graph says otherwise.*%mm_default_1"),
        (impossible_operands, "the operator does not accept its operands.*%mm_default_1"),
        (another_output, r"output 0 was .*\(2, 3\).* and is .*\(2, 4\).*%mm_default"),
        (another_layout, r"output 0 was .*\(3, 1\).* and is .*\(1, 2\).*%clone_default"),
        (dropped_update, "output 2 was .* and is NoneType"),
        (one_output_more, "the roles of its outputs changed"),
        (another_role, "the roles of its outputs changed"),
        (one_input_more, "its inputs or the roles of its outputs changed"),
        (random_operator_dropped, "random operators are not the same"),
        (random_operators_swapped, "random operators are not the same, in the same order"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_graph_is_refused(break_it: Callable[[StepGraph], None], message: str):
    with pytest.raises(PassError, match=f"(?s)^pass 'some-pass' left an invalid graph: .*{message}"):
        check(valid(), break_it)


def test_message_shows_the_neighbours():
    with pytest.raises(PassError) as caught:
        check(valid(), wrong_dtype)
    lines = str(caught.value).splitlines()[1:4]
    assert [line.split()[0] for line in lines] == [
        "%mm_default",
        "%mm_default_1",
        "%native_layer_norm_backward_default",
    ]
