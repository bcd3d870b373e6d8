"""The table of rules: what it holds, what it lacks and why, and how it is asked."""

from __future__ import annotations

import importlib
import itertools
import operator
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rule_contract import FLAGS, MASKS, call_node, narrow
from torch import fx
from torch._higher_order_ops.flex_attention import flex_attention_backward

import gradprune.passes
from gradprune.passes import rules
from gradprune.passes.rules import RULES, WHOLE, is_unnarrowable, register, register_whole, registry, rule_for

aten = torch.ops.aten

MASKED_WITHOUT_RULE = {
    "aten._convolution_double_backward.default": "its mask fills in zeros; it keeps nothing from being computed",
}
"""Operators that have a mask and no rule, and why."""

NO_FLAGS = {
    "align_corners",
    "batch_first",
    "bidirectional",
    "is_causal",
    "reverse",
    "shared_storage_dqdkdv",
    "train",
    "transposed",
    "update",
}
"""Arguments of type ``bool`` that say how to compute, not what."""

WHOLE_WITH_FLAGS = {
    "aten._thnn_differentiable_gru_cell_backward.default",
    "aten._thnn_differentiable_lstm_cell_backward.default",
    "aten.lstm_mps_backward.default",  # has_biases describes the list of weights
    "aten.mkldnn_rnn_layer_backward.default",  # likewise
}


def functional_schemas() -> Iterator[tuple[str, Any]]:
    """ATen operators that write nothing: the ones a functional graph is made of."""
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("aten::") and not schema.is_mutable:
            yield f"aten.{schema.name.removeprefix('aten::')}.{schema.overload_name or 'default'}", schema


def test_inventory_of_masks_is_complete():
    masked = {
        name: argument.name
        for name, schema in functional_schemas()
        for argument in schema.arguments
        if str(argument.type) == "List[bool]" and argument.N and str(schema.returns[0].type) == "Tensor"
    }
    assert masked.keys() == MASKS.keys() | MASKED_WITHOUT_RULE.keys()
    assert {name: argument for name, argument in masked.items() if name in MASKS} == MASKS


def test_inventory_of_flags_is_complete():
    flagged: dict[str, set[str]] = {}
    for name, schema in functional_schemas():
        if "backward" not in name or len(schema.returns) < 2 or name in MASKS or name in WHOLE_WITH_FLAGS:
            continue
        flags = {argument.name for argument in schema.arguments if str(argument.type) == "bool"} - NO_FLAGS
        if flags:
            flagged[name] = flags
    assert flagged == {name: set(gates) for name, gates in FLAGS.items()}


def test_every_name_is_an_operator():
    known = {name for name, _ in functional_schemas()} | set(torch._ops._higher_order_ops)
    assert RULES.keys() | WHOLE.keys() <= known


def test_double_backward_computes_what_its_mask_leaves_out():
    inputs, weight, gradient = torch.randn(1, 2, 5), torch.randn(2, 2, 3), torch.randn(1, 2, 3)
    geometry = [1], [0], [1], False, [0], 1
    for mask in itertools.product([True, False], repeat=3):
        outputs = aten._convolution_double_backward(
            torch.ones_like(inputs), torch.ones_like(weight), None, gradient, weight, inputs, *geometry, mask
        )
        assert all(output.numel() for output in outputs)


@pytest.fixture
def empty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RULES", {})
    monkeypatch.setattr(registry, "WHOLE", {})


@pytest.mark.usefixtures("empty_tables")
def test_duplicate_registration_raises():
    register("aten.mm.default")(lambda node, used: None)
    register_whole("always whole", "aten.bmm.default")
    for name in ("aten.mm.default", "aten.bmm.default"):
        with pytest.raises(ValueError, match=re.escape(f"two narrowing rules for {name}")):
            register("aten.addmm.default", name)(lambda node, used: None)
        with pytest.raises(ValueError, match=re.escape(f"two narrowing rules for {name}")):
            register_whole("always whole", "aten.addmm.default", name)
    assert registry.RULES.keys() == {"aten.mm.default"}
    assert registry.WHOLE.keys() == {"aten.bmm.default"}


def test_rules_load_without_the_operators(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith(rules.__name__)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(gradprune.passes, "rules", rules)
    monkeypatch.setattr(torch.ops, "aten", object())
    again = importlib.import_module(rules.__name__)
    assert again is not rules
    assert again.RULES.keys() == RULES.keys()


def linear_backward(mask: list[bool], *, keyword: bool = False) -> fx.Node:
    tensors = torch.randn(2, 3), torch.randn(2, 4), torch.randn(4, 3)
    if keyword:
        return call_node(aten.linear_backward.default, tensors, {"output_mask": mask})[0]
    return call_node(aten.linear_backward.default, (*tensors, mask), {})[0]


def test_nothing_to_narrow():
    assert narrow(linear_backward([True, False, False]), frozenset({0})) is None
    assert narrow(linear_backward([True, True, True]), frozenset({0, 1, 2})) is None


def test_narrowed_mask_stays_where_it_was_passed():
    narrowed = narrow(linear_backward([True, True, True]), frozenset({0}))
    assert narrowed is not None
    assert narrowed.args[3] == [True, False, False]
    assert narrowed.kwargs == {}
    narrowed = narrow(linear_backward([True, True, True], keyword=True), frozenset({0}))
    assert narrowed is not None
    assert len(narrowed.args) == 3
    assert narrowed.kwargs == {"output_mask": [True, False, False]}


def test_a_rule_does_not_edit_the_node():
    node = linear_backward([True, True, True])
    before = node.args
    narrow(node, frozenset({0}))
    assert node.args == before


def test_arguments_that_were_not_passed_have_their_default():
    node, _ = call_node(aten._scaled_dot_product_efficient_attention_backward.default, (), {})
    assert registry.argument(node, "is_causal") is False
    assert registry.with_arguments(node, {"is_causal": True}).kwargs == {"is_causal": True}


def test_unknown_arguments_raise():
    node = linear_backward([True, True, True])
    with pytest.raises(KeyError, match="no argument 'grad_input_mask'"):
        registry.argument(node, "grad_input_mask")
    with pytest.raises(KeyError, match="no argument 'grad_input_mask'"):
        registry.with_arguments(node, {"grad_input_mask": [True]})


@pytest.fixture
def custom_operators() -> Iterator[Any]:
    library = torch.library.Library("gradprune_rule_tests", "FRAGMENT")
    library.define("fused_backward(Tensor gradient) -> (Tensor, Tensor)")
    library.define("listed_backward(Tensor gradient) -> Tensor[]")
    library.define("single_backward(Tensor gradient) -> Tensor")
    library.define("fused(Tensor inputs) -> (Tensor, Tensor)")
    yield torch.ops.gradprune_rule_tests
    library._destroy()


def node_of(target: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("gradient"),))


def test_operators_with_a_rule_are_narrowable():
    for name in RULES:
        _, packet, overload = name.split(".")
        node = node_of(getattr(getattr(aten, packet), overload))
        assert rule_for(node) is RULES[name]
        assert is_unnarrowable(node) is None


def test_whole_operators_say_why():
    together = "the kernel computes the gradients of query, key and value together"
    for target in (
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
        flex_attention_backward,
    ):
        assert rule_for(node_of(target)) is None
        assert is_unnarrowable(node_of(target)) == together
    assert (
        is_unnarrowable(node_of(aten.mkldnn_rnn_layer_backward.default))
        == WHOLE["aten.mkldnn_rnn_layer_backward.default"]
    )


def test_unknown_backward_operators_have_no_rule(custom_operators: Any):
    reason = "no narrowing rule for this operator"
    assert is_unnarrowable(node_of(custom_operators.fused_backward.default)) == reason
    assert is_unnarrowable(node_of(custom_operators.listed_backward.default)) == reason
    assert is_unnarrowable(node_of(aten._thnn_differentiable_lstm_cell_backward.default)) == reason


def test_other_operators_are_not_reported(custom_operators: Any):
    for target in (
        custom_operators.single_backward.default,
        custom_operators.fused.default,
        aten.threshold_backward.default,
        aten.native_layer_norm.default,
        operator.getitem,
    ):
        assert is_unnarrowable(node_of(target)) is None
    graph = fx.Graph()
    assert is_unnarrowable(graph.placeholder("linear_backward")) is None
    assert is_unnarrowable(graph.get_attr("fused_backward")) is None


def test_higher_order_operators_are_known_by_their_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(WHOLE, "flex_attention_backward")
    node = node_of(flex_attention_backward)
    assert is_unnarrowable(node) is None
    node.graph.call_function(operator.getitem, (node, 0))
    assert is_unnarrowable(node) == "no narrowing rule for this operator"
