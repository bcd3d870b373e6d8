"""Graphs as plain data: the same graph comes back, and what cannot be written is not."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from gradprune.graph import plain


def graph_of(target: Any, *args: Any, op: str = "call_function", **kwargs: Any) -> fx.Graph:
    """A graph of one call; the argument ``"x"`` stands for the input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with_x = fx.node.map_aggregate(args, lambda one: x if one == "x" else one)
    graph.output((graph.create_node(op, target, with_x, kwargs), None))  # type: ignore[arg-type]
    return graph


def again(graph: fx.Graph) -> fx.Graph:
    return plain.from_data(json.loads(json.dumps(plain.to_data(graph))))


@pytest.mark.parametrize(
    "graph",
    [
        graph_of(torch.ops.aten.clamp.default, "x", -float("inf"), 0.1),
        graph_of(torch.ops.aten.index.Tensor, "x", [None, "x"]),
        graph_of(torch.conv2d, "x", "x", None, (1, 1), (0, 0)),
        graph_of(torch.nn.functional.relu, "x", inplace=False),
        graph_of(torch._C._nn.linear, "x", "x"),
        graph_of(torch.zeros, torch.Size([2, 3]), dtype=torch.float16, device=torch.device("cpu")),
        graph_of(torch.empty_like, "x", memory_format=torch.channels_last, layout=torch.strided),
        graph_of(operator.getitem, "x", (slice(None, -1, 2), Ellipsis, None)),
        graph_of("flatten", "x", 1, -1, op="call_method"),
        graph_of(torch.cat, ["x", "x"], dim=True),
    ],
    ids=str,
)
def test_graphs_come_back(graph: fx.Graph):
    back = again(graph)
    assert str(back) == str(graph)
    assert [node.target for node in back.nodes] == [node.target for node in graph.nodes]
    assert [type(one) for node in back.nodes for one in node.args] == [
        type(one) for node in graph.nodes for one in node.args
    ]


def test_names_are_kept_though_nodes_are_gone():
    graph = graph_of(torch.ops.aten.neg.default, "x")
    middle = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)))
    with graph.inserting_after(middle):
        last = graph.call_function(torch.ops.aten.neg.default, (middle,))
    graph.output_node().args = ((last, None),)
    middle.replace_all_uses_with(middle.args[0], delete_user_cb=lambda user: user is last)
    graph.erase_node(middle)
    assert [node.name for node in again(graph).nodes] == [node.name for node in graph.nodes]


def of_somebody(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("target", [of_somebody, lambda x: x, plain.to_data], ids=["own", "lambda", "gradprune"])
def test_functions_of_others_are_not_written(target: Callable[..., Any]):
    with pytest.raises(plain.NotPlain, match="function"):
        plain.to_data(graph_of(target, "x"))


def test_what_belongs_to_a_module_is_not_written():
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph
    with pytest.raises(plain.NotPlain, match="call_module"):
        plain.to_data(graph)


def test_other_values_are_not_written():
    with pytest.raises(plain.NotPlain, match="a complex"):
        plain.to_data(graph_of(torch.add, "x", 1j))
