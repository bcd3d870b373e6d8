from __future__ import annotations

from pass_testing import Builder, aten
from torch.testing import FileCheck

from gradprune.passes.dce import eliminate_dead_code


def test_dead_chain_goes_in_one_sweep():
    b = Builder()
    x = b.input("x", 3)
    live = b.call(aten.relu.default, x)
    b.call(aten.sin.default, b.call(aten.cos.default, live))
    step_graph = b.build(live)
    erased = eliminate_dead_code(step_graph.graph, "not needed")
    FileCheck().check("relu").check_not("sin").check_not("cos").run(str(step_graph.graph))
    assert [(change.operator, change.reason) for change in erased] == [
        ("aten.cos", "not needed"),
        ("aten.sin", "not needed"),
    ]


def test_unused_placeholder_stays():
    b = Builder()
    b.input("unused", 3)
    step_graph = b.build(b.call(aten.relu.default, b.input("x", 3)))
    assert eliminate_dead_code(step_graph.graph) == []
    FileCheck().check("%unused").run(str(step_graph.graph))


def test_unused_constant_goes():
    b = Builder()
    x = b.input("x", 3)
    b.graph.get_attr("constant")
    step_graph = b.build(x)
    eliminate_dead_code(step_graph.graph)
    FileCheck().check_not("constant").run(str(step_graph.graph))


def test_unused_random_operator_stays():
    b = Builder()
    x = b.input("x", 3)
    b.call(aten.rand_like.default, x)
    b.call(aten.native_dropout.default, x, 0.5, True)
    step_graph = b.build(b.call(aten.relu.default, x))
    assert eliminate_dead_code(step_graph.graph) == []


def test_write_to_an_input_stays():
    b = Builder()
    x, buffer = b.input("x", 3), b.weight("buffer", 3)
    b.call(aten.copy_.default, buffer, b.call(aten.relu.default, x))
    step_graph = b.build(x)
    assert eliminate_dead_code(step_graph.graph) == []
    FileCheck().check("aten.copy_.default").run(str(step_graph.graph))


def test_assertion_stays():
    b = Builder()
    x = b.input("x", 3)
    positive = b.call(aten.all.default, b.call(aten.gt.Scalar, x, 0))
    b.graph.call_function(aten._assert_async.msg, (positive, "x must be positive"))
    step_graph = b.build(x)
    assert eliminate_dead_code(step_graph.graph) == []
